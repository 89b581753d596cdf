#include "nbd/client/attempt.h"

#include <netinet/in.h>
#include <netinet/tcp.h>

#include <algorithm>
#include <cerrno>

#include "runtime/socket.h"
#include "runtime/task_scope.h"

namespace gantry::nbd::client {

namespace {

/// A server that has vanished without a word is missed after about a minute, idle or not, unless the address says
/// otherwise.
void watch_peer(int fd, const ServerAddress& address) {
    [[maybe_unused]] const Result<> probes = set_keepalive(fd, address.keep_alive(), address.probes());
    const int unanswered_ms = 60'000;
    ::setsockopt(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, &unanswered_ms, sizeof unanswered_ms);
    [[maybe_unused]] const Result<> no_delay = set_tcp_nodelay(fd);
}

}  // namespace

void Attempt::interrupt() {
    if (transport_) transport_->shut_down();
    if (connecting_) connecting_->cancel();
    pause_.cancel();
}

void Attempt::cancel() {
    if (!running_) return;
    cancelled_ = true;
    interrupt();
}

Task<void> Attempt::watch(Clock::time_point deadline) {
    if (co_await limit_.until(deadline)) {
        expired_ = true;
        interrupt();
    }
}

Task<int> Attempt::connect_to(int fd, const SocketTarget* target) {
    for (std::chrono::milliseconds pause(1);; pause = std::min(pause * 2, std::chrono::milliseconds(50))) {
        if (cancelled_ || expired_) co_return -ECANCELED;
        CancellableIo io(io_connect(fd, target->get(), target->length));
        connecting_ = &io;
        const int result = co_await io;
        connecting_ = nullptr;
        if (cancelled_ || expired_) co_return -ECANCELED;
        // The backlog of a unix socket is full, and nothing tells when it has room.
        if (result != -EAGAIN) co_return result;
        (void)co_await pause_.after(pause);
    }
}

Task<Result<UniqueFd>> Attempt::connect(const ClientConfig* config) {
    const ServerAddress& address = config->address;
    UniqueFd given = address.take_socket();
    if (given) co_return given;
    if (!address.can_connect_again()) {
        co_return fail(ErrorKind::kShutdown, "Failed to connect to '{}': a descriptor serves one connection",
                       address.text());
    }
    auto targets = co_await address.resolve();
    if (!targets) {
        co_return fail(targets.error().kind(), "Failed to connect to '{}': {}", address.text(),
                       targets.error().message());
    }
    int error = ECANCELED;
    for (const SocketTarget& target : *targets) {
        UniqueFd fd(::socket(target.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
        if (!fd) {
            error = errno;
            continue;
        }
        const int result = co_await connect_to(fd.get(), &target);
        if (result >= 0) {
            if (target.storage.ss_family == AF_INET || target.storage.ss_family == AF_INET6)
                watch_peer(fd.get(), address);
            co_return fd;
        }
        Loop::current().forget_fd(fd.get());
        error = -result;
        if (cancelled_ || expired_) break;
    }
    co_return fail_errno(error, "Failed to connect to '{}'", address.text());
}

Task<Result<Connected>> Attempt::run(std::shared_ptr<const ClientConfig> config, Clock::time_point deadline) {
    CHECK(!running_, "one attempt at a time");
    running_ = true;
    cancelled_ = expired_ = false;
    TaskScope scope;
    scope.spawn(watch(std::min(deadline, deadline_in(config->attempt_limit))));

    Connected out;
    std::optional<Error> error;
    Result<UniqueFd> socket = co_await connect(config.get());
    if (socket) {
        out.transport = std::make_unique<Transport>(std::move(*socket));
        transport_ = out.transport.get();
        if (cancelled_ || expired_) interrupt();
        Result<Negotiated> agreed = co_await negotiate(*out.transport, *config);
        transport_ = nullptr;
        if (agreed) {
            out.negotiated = *agreed;
        } else {
            error.emplace(agreed.error().kind(),
                          fmt::format("NBD server '{}': {}", config->address.text(), agreed.error().message()),
                          agreed.error().errno_value());
            out.transport.reset();
        }
    } else {
        error.emplace(std::move(socket).error());
    }
    limit_.cancel();
    co_await scope.join();
    running_ = false;
    if (!error) co_return std::move(out);
    if (cancelled_) {
        co_return fail(ErrorKind::kCancelled, "Failed to connect to '{}': given up on request", config->address.text());
    }
    if (expired_) {
        co_return fail(ErrorKind::kTimedOut, "Failed to connect to '{}': no answer in time", config->address.text());
    }
    co_return std::unexpected(std::move(*error));
}

}  // namespace gantry::nbd::client
