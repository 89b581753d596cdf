#include "nbd/server.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <list>

#include "nbd/connection.h"
#include "nbd/export.h"
#include "nbd/listener.h"
#include "runtime/io.h"
#include "runtime/log.h"
#include "runtime/socket.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"

namespace gantry::nbd {

namespace {

/// Memory of all sessions together, as far as each keeps enough for its largest request.
constexpr uint64_t kServerMemory = uint64_t{2} << 30;
constexpr uint64_t kSessionMemoryMax = 64u << 20;
constexpr uint64_t kSessionMemoryMin = kMaxPayload;
constexpr int kSendBuffer = 2 << 20;
/// Connections taken from one listener before others run.
constexpr int kAcceptBatch = 16;
/// How long a listener rests when the process is out of descriptors or memory.
constexpr std::chrono::milliseconds kAcceptPause{200};
/// Warnings about misbehaving clients in a second.
constexpr unsigned kWarningsPerSecond = 5;

Server* the_process_server = nullptr;

bool out_of_resources(int error) { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

void prepare_socket(int fd, bool is_unix) {
    if (is_unix) {
        // Replies to several large reads fit; beyond the system's limit only with privileges.
        if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &kSendBuffer, sizeof kSendBuffer) != 0) {
            ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSendBuffer, sizeof kSendBuffer);
        }
        return;
    }
    // Both are refinements: a connection without them works.
    if (auto r = set_tcp_nodelay(fd); !r) log::debug("{}", r.error().message());
    if (auto r = set_keepalive(fd); !r) log::debug("{}", r.error().message());
}

struct Listener {
    explicit Listener(ListenSocket s) : socket(std::move(s)) {}
    ListenSocket socket;
    CancellableIo* waiting = nullptr;
    Timer pause;
};

}  // namespace

struct Server::Impl final : ExportDirectory {
    Impl(Server& s, Runtime& r) : server(s), runtime(r) {}

    std::optional<ExportFacts> find(std::string_view name) const override;
    std::vector<Listed> list() const override;

    Task<void> accept_clients(Listener* listener);
    Task<void> serve(UniqueFd fd);
    void take(Listener& listener);
    bool full() const { return options.max_connections != 0 && clients.size() >= options.max_connections; }
    ConnectionLimits limits() const;
    void warn_about(const Connection& connection);

    Server& server;
    Runtime& runtime;
    ServerOptions options;
    enum class State : uint8_t { kStopped, kStarting, kRunning, kStopping } state = State::kStopped;
    std::vector<std::unique_ptr<Listener>> listeners;
    std::map<std::string, NbdExport*, std::less<>> exports;
    std::list<Connection*> clients;
    bool held = false;    // nobody is let in yet
    WaitQueue slot_free;  // or no longer held
    TaskScope scope;
    Clock::time_point warning_second{};
    unsigned warnings = 0;
};

std::optional<ExportFacts> Server::Impl::find(std::string_view name) const {
    const auto it = exports.find(name);
    if (it == exports.end()) return std::nullopt;
    return it->second->facts(options.max_connections != 1);
}

std::vector<ExportDirectory::Listed> Server::Impl::list() const {
    std::vector<Listed> all;
    for (const auto& [name, e] : exports) all.push_back({name, e->description()});
    return all;
}

ConnectionLimits Server::Impl::limits() const {
    const uint64_t share = kServerMemory / (clients.size() + 1);
    return {options.handshake_max, std::clamp(share, kSessionMemoryMin, kSessionMemoryMax)};
}

Task<void> Server::Impl::accept_clients(Listener* listener) {
    while (state == State::kRunning) {
        if (held || full()) {
            co_await slot_free.wait();
            continue;
        }
        CancellableIo readable(io_poll(listener->socket.fd(), POLLIN));
        listener->waiting = &readable;
        co_await readable;
        listener->waiting = nullptr;
        if (state != State::kRunning) break;
        int error = 0;
        for (int i = 0; i < kAcceptBatch && !full(); ++i) {
            UniqueFd fd(::accept4(listener->socket.fd(), nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC));
            if (!fd) {
                error = errno;
                break;
            }
            prepare_socket(fd.get(), listener->socket.is_unix());
            scope.spawn(serve(std::move(fd)));
        }
        // What else can happen (ECONNABORTED, EPROTO, ...) concerns one client that is gone already.
        if (out_of_resources(error)) {
            log::warn("NBD server: cannot accept a client: {}; trying again shortly", errno_text(error));
            co_await listener->pause.after(kAcceptPause);
        } else {
            co_await listener->pause.until(Clock::time_point::min());
        }
    }
}

Task<void> Server::Impl::serve(UniqueFd fd) {
    Connection connection(server, *this, std::move(fd), limits());
    clients.push_back(&connection);
    co_await connection.run();
    std::erase(clients, &connection);
    if (!connection.violation().empty()) warn_about(connection);
    slot_free.notify_all();
}

void Server::Impl::warn_about(const Connection& connection) {
    const auto now = Clock::now();
    if (now - warning_second >= std::chrono::seconds(1)) {
        warning_second = now;
        warnings = 0;
    }
    if (warnings++ < kWarningsPerSecond) {
        log::warn("NBD client {} disconnected: {}", connection.peer(), connection.violation());
    }
}

Server::Server(Runtime& runtime) : impl_(std::make_unique<Impl>(*this, runtime)) {}

Server::~Server() { CHECK(impl_->state == Impl::State::kStopped, "the NBD server is stopped before it is destroyed"); }

void Server::hold_clients() { impl_->held = true; }

void Server::let_clients_in() {
    impl_->held = false;
    impl_->slot_free.notify_all();
}

bool Server::running() const { return impl_->state == Impl::State::kRunning; }

Task<Result<>> Server::start(ServerOptions options) {
    Impl& in = *impl_;
    if (in.state != Impl::State::kStopped) co_return fail(ErrorKind::kExists, "NBD server already running");
    in.state = Impl::State::kStarting;
    auto sockets = co_await open_listeners(options.address, options.resolve_fd);
    if (!sockets) {
        in.state = Impl::State::kStopped;
        co_return std::unexpected(std::move(sockets).error());
    }
    in.options = std::move(options);
    in.state = Impl::State::kRunning;
    for (ListenSocket& socket : *sockets) {
        in.listeners.push_back(std::make_unique<Listener>(std::move(socket)));
        in.scope.spawn(in.accept_clients(in.listeners.back().get()));
    }
    co_return Result<>();
}

Task<void> Server::stop() {
    Impl& in = *impl_;
    if (in.state != Impl::State::kRunning) co_return;
    in.state = Impl::State::kStopping;
    for (const auto& listener : in.listeners) {
        if (listener->waiting) listener->waiting->cancel();
        listener->pause.cancel();
    }
    in.slot_free.notify_all();
    for (Connection* client : in.clients) client->cut();
    co_await in.scope.join();
    for (const auto& listener : in.listeners) Loop::current().forget_fd(listener->socket.fd());
    in.listeners.clear();
    in.options = {};
    in.state = Impl::State::kStopped;
}

Result<> Server::add_export(NbdExport& e) {
    if (!running()) return fail(ErrorKind::kInvalid, "NBD server not running");
    if (!impl_->exports.emplace(e.name(), &e).second) {
        return fail(ErrorKind::kExists, "NBD server already has export named '{}'", e.name());
    }
    return {};
}

void Server::remove_export(NbdExport& e) {
    const auto it = impl_->exports.find(e.name());
    if (it != impl_->exports.end() && it->second == &e) impl_->exports.erase(it);
}

NbdExport* Server::find(std::string_view name) const {
    const auto it = impl_->exports.find(name);
    return it == impl_->exports.end() ? nullptr : it->second;
}

std::vector<NbdExport*> Server::exports() const {
    std::vector<NbdExport*> all;
    for (const auto& [name, e] : impl_->exports) all.push_back(e);
    return all;
}

uint32_t Server::max_connections() const { return impl_->options.max_connections; }

std::vector<std::string> Server::uris() const {
    std::vector<std::string> all;
    for (const auto& listener : impl_->listeners) {
        if (impl_->exports.empty()) all.push_back(listener->socket.uri(""));
        for (const auto& [name, e] : impl_->exports) all.push_back(listener->socket.uri(name));
    }
    return all;
}

size_t Server::connections() const { return impl_->clients.size(); }

void set_process_server(Server* server) { the_process_server = server; }
Server* process_server() { return the_process_server; }

}  // namespace gantry::nbd
