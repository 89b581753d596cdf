// QmpBench: the parts of the daemon that a monitor acts on, with null and raw nodes and no export types. SessionClient:
// a client of one session, in its own thread.

#pragma once

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <array>
#include <catch2/catch.hpp>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "block/formats/raw.h"
#include "block/jobs/job.h"
#include "block/protocols/null.h"
#include "qmp/events.h"
#include "qmp/monitor.h"
#include "qmp/objects.h"
#include "qmp/session.h"
#include "runtime/socket.h"
#include "tests/support/test_runtime.h"

namespace gantry::test {

struct QmpBench {
    QmpBench()
        : events(monitors),
          graph(*rt.runtime, kDrivers, &events),
          exports(*rt.runtime, graph, {}, [this](std::string_view id) { events.export_deleted(id); }),
          nbd_servers(*rt.runtime),
          objects(*rt.runtime, exports, graph.secrets()),
          services{*rt.runtime,
                   graph,
                   exports,
                   nbd_servers,
                   objects,
                   monitors,
                   [this] { quits++; },
                   [](std::string_view name) -> Result<UniqueFd> {
                       return fail(ErrorKind::kNotFound, "no descriptor '{}'", name);
                   }} {
        monitors.set_services(&services);
        ::signal(SIGPIPE, SIG_IGN);  // as the daemon does
    }
    ~QmpBench() { rt.run(end(this)); }

    static Task<void> end(QmpBench* self) {
        co_await self->graph.jobs().cancel_all();
        co_await self->graph.close_all();
        co_await self->monitors.stop();
        self->objects.clear();
    }

    static const std::array<block::Driver, 2> kDrivers;
    TestRuntime rt;
    qmp::Monitors monitors;
    qmp::Events events;
    block::Graph graph;
    exports::Registry exports;
    nbd::Servers nbd_servers;
    qmp::Objects objects;
    qmp::Services services;
    int quits = 0;
};

inline const std::array<block::Driver, 2> QmpBench::kDrivers = {block::kNullCoDriver, block::kRawDriver};

/// The client's end of a connection: blocking, with a time limit.
class Wire {
  public:
    explicit Wire(UniqueFd fd) : fd_(std::move(fd)) {}
    void send(std::string_view text) const {
        while (!text.empty()) {
            const ssize_t n = ::send(fd_.get(), text.data(), text.size(), MSG_NOSIGNAL);
            if (n <= 0) return;  // the other side has closed
            text.remove_prefix(static_cast<size_t>(n));
        }
    }
    /// The next line without its CR LF; "<end>" when the connection ends, "<late>" after the time limit.
    std::string line() {
        for (;;) {
            if (const size_t end = buffer_.find("\r\n"); end != std::string::npos) {
                std::string text = buffer_.substr(0, end);
                buffer_.erase(0, end + 2);
                return text;
            }
            pollfd wait{fd_.get(), POLLIN, 0};
            if (::poll(&wait, 1, 20000) != 1) return "<late>";
            std::array<char, 65536> chunk;
            const ssize_t n = ::recv(fd_.get(), chunk.data(), chunk.size(), 0);
            if (n <= 0) return "<end>";
            buffer_.append(chunk.data(), static_cast<size_t>(n));
        }
    }
    /// Without reading anything: whether the other side closes in time.
    bool closed_by_peer() const {
        pollfd wait{fd_.get(), 0, 0};  // POLLHUP and POLLERR are always told
        return ::poll(&wait, 1, 30000) == 1;
    }
    void half_close() const { ::shutdown(fd_.get(), SHUT_WR); }
    void close() { fd_.reset(); }

  private:
    UniqueFd fd_;
    std::string buffer_;
};

/// A session over a socket pair: `client` talks in a thread while the main loop serves. Returns when both have ended.
inline void with_session(QmpBench& bench, std::function<void(Wire&)> client, bool pretty = false,
                         std::function<void(qmp::Session&)> started = {}) {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    UniqueFd ours(fds[0]);
    REQUIRE(set_nonblocking(ours.get()));
    std::thread thread([&client, fd = fds[1]] {
        Wire wire{UniqueFd(fd)};
        client(wire);
    });
    qmp::Session session(bench.services, ours.get(), ours.get(), pretty);
    struct Serve {
        static Task<void> run(qmp::Session* s, std::function<void(qmp::Session&)>* started, int fd) {
            if (*started) (*started)(*s);
            co_await s->run();
            Loop::current().forget_fd(fd);
        }
    };
    bench.rt.run(Serve::run(&session, &started, ours.get()));
    ours.reset();
    thread.join();
}

constexpr std::string_view kNegotiate = "{\"execute\": \"qmp_capabilities\"}";

}  // namespace gantry::test
