#include "qmp/monitor.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>

#include "qmp/session.h"
#include "runtime/log.h"
#include "runtime/socket.h"
#include "runtime/timer.h"
#include "schema/identifier.h"
#include "schema/options.h"

namespace gantry::qmp {

namespace {

/// A client that waits, or -errno. Who waits with io_accept() on a socket that outlives him may take the waking of a
/// client that comes after him; polls take none.
int accept_now(int listener) {
    const int fd = ::accept4(listener, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

/// Whoever was there has left, or went to somebody else who has the socket.
bool is_gone(int error) { return error == -EAGAIN || error == -EINTR || error == -ECONNABORTED || error == -EPROTO; }

}  // namespace

/// A character device: listening sockets, or one connected pair of descriptors.
struct Monitors::Chardev {
    std::string id;
    std::vector<UniqueFd> listeners;
    SocketFile socket_file;
    UniqueFd in, out;  // connected already (client socket, stdio, or the client that wait=on waited for)
    bool used = false;
    std::vector<CancellableIo*> accepting;
};

Monitors::Monitors() = default;

Monitors::~Monitors() { CHECK(sessions_.empty(), "monitors are stopped before they are destroyed"); }

Task<Result<>> Monitors::add_chardev(json::object raw) {
    schema::Options options(raw);
    auto chardev = std::make_unique<Chardev>();
    chardev->id = options.str("id");
    if (chardev->id.empty()) co_return fail(ErrorKind::kInvalid, "chardev: no id specified");
    if (!schema::is_identifier(chardev->id)) {
        co_return fail(
            ErrorKind::kInvalid,
            "Parameter 'id' expects an identifier; '{}' is not letters, digits, '-', '.', '_' after a letter",
            chardev->id);
    }
    if (chardevs_.contains(chardev->id))
        co_return fail(ErrorKind::kExists, "Chardev with id '{}' already exists", chardev->id);
    if (options.str("backend") == "stdio") {
        chardev->in.reset(::fcntl(STDIN_FILENO, F_DUPFD_CLOEXEC, 3));
        chardev->out.reset(::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 3));
        if (!chardev->in || !chardev->out) co_return fail_errno(errno, "chardev '{}': stdio", chardev->id);
        CO_CHECK(set_nonblocking(chardev->in.get()));
        CO_CHECK(set_nonblocking(chardev->out.get()));
    } else {
        Result<> opened = co_await open_socket(*chardev, raw);
        if (!opened) co_return std::unexpected(std::move(opened).error());
    }
    std::string id = chardev->id;
    chardevs_.emplace(std::move(id), std::move(chardev));
    co_return Result<>();
}

Task<Result<>> Monitors::open_socket(Chardev& chardev, const json::object& raw) {
    schema::Options options(raw);
    bool server = options.flag("server");
    if (options.has("path") + options.has("host") + options.has("fd") > 1) {
        co_return fail(ErrorKind::kInvalid, "None or one of 'path', 'fd' or 'host' option required.");
    }
    if (options.has("host") && !options.has("port"))
        co_return fail(ErrorKind::kInvalid, "chardev: socket: no port given");
    if (options.has("fd")) {
        CO_TRY(UniqueFd fd, services_->resolve_fd(options.str("fd")));
        CO_CHECK(check_listening_socket(fd.get()));
        CO_CHECK(set_nonblocking(fd.get()));
        chardev.listeners.push_back(std::move(fd));
        server = true;
    } else if (options.has("path")) {
        if (server) {
            CO_TRY(UniqueFd fd, listen_unix(options.str("path"), 0600));
            chardev.listeners.push_back(std::move(fd));
            chardev.socket_file = SocketFile(options.str("path"));
        } else {
            CO_TRY(chardev.in, co_await connect_unix(options.str("path")));
        }
    } else if (options.has("host") || options.has("port")) {
        InetFamilies families;
        if (options.has("ipv4")) families.ipv4 = options.flag("ipv4");
        if (options.has("ipv6")) families.ipv6 = options.flag("ipv6");
        if (server) {
            CO_TRY(chardev.listeners, co_await listen_inet(options.str("host"), options.str("port"), families));
        } else {
            CO_TRY(chardev.in, co_await connect_inet(options.str("host"), options.str("port"), families));
        }
    } else {
        co_return fail(ErrorKind::kInvalid, "chardev: socket: no path, host and port, or fd specified");
    }
    // Like the reference a server waits for its first client unless told not to.
    if (server && options.flag("wait", true)) {
        log::warn("chardev '{}': waiting for a connection; use wait=off to start without", chardev.id);
        const int listener = chardev.listeners.front().get();
        int fd = -EAGAIN;
        while (is_gone(fd)) {
            CancellableIo readable(io_poll(listener, POLLIN));
            first_client_ = &readable;
            const int events = co_await readable;
            first_client_ = nullptr;
            fd = waits_no_more_ ? -ECANCELED : events < 0 ? events : accept_now(listener);
        }
        if (fd < 0) co_return fail_errno(-fd, "chardev '{}': accept", chardev.id);
        chardev.in.reset(fd);
    }
    co_return Result<>();
}

Result<> Monitors::add_monitor(const json::object& raw) {
    schema::Options options(raw);
    if (options.str("mode", "control") != "control") return fail(ErrorKind::kUnsupported, "Only QMP is supported");
    std::string id = options.str("chardev");
    auto it = chardevs_.find(id);
    if (it == chardevs_.end()) return fail(ErrorKind::kNotFound, "chardev \"{}\" not found", id);
    if (it->second->used) return fail(ErrorKind::kBusy, "Device '{}' is in use", id);
    start_monitor(*it->second, options.flag("pretty"));
    return {};
}

void Monitors::start_monitor(Chardev& chardev, bool pretty) {
    chardev.used = true;
    if (chardev.in) scope_.spawn(serve(std::move(chardev.in), std::move(chardev.out), pretty));
    for (UniqueFd& listener : chardev.listeners) scope_.spawn(accept_loop(&chardev, listener.get(), pretty));
}

void Monitors::add_listener(UniqueFd listener, std::string path) {
    if (const Result<> set = set_nonblocking(listener.get()); !set) log::warn("monitor: {}", set.error().message());
    auto chardev = std::make_unique<Chardev>();
    chardev->id = fmt::format("#control{}", chardevs_.size());
    chardev->socket_file = SocketFile(std::move(path));
    chardev->listeners.push_back(std::move(listener));
    start_monitor(*chardev, false);
    std::string id = chardev->id;
    chardevs_.emplace(std::move(id), std::move(chardev));
}

Task<void> Monitors::accept_loop(Chardev* chardev, int listener, bool pretty) {
    constexpr std::chrono::milliseconds kPause{100};  // without descriptors or memory for one more
    while (clients_held_ && !stopping_) co_await clients_let_in_.wait();
    while (!stopping_) {
        CancellableIo readable(io_poll(listener, POLLIN));
        chardev->accepting.push_back(&readable);
        const int events = co_await readable;
        std::erase(chardev->accepting, &readable);
        if (stopping_) break;
        const int fd = events < 0 ? events : accept_now(listener);
        if (fd >= 0) {
            log::debug("monitor: client connected peer={}", peer_name(fd));
            scope_.spawn(serve(UniqueFd(fd), UniqueFd(), pretty));
        } else if (fd == -EINVAL || fd == -EBADF || fd == -ECANCELED) {
            break;
        } else if (!is_gone(fd)) {
            co_await sleep_for(kPause);
        }
    }
}

Task<void> Monitors::serve(UniqueFd in, UniqueFd out, bool pretty) {
    while (clients_held_ && !stopping_) co_await clients_let_in_.wait();
    if (stopping_) co_return;
    int out_fd = out ? out.get() : in.get();
    Session session(*services_, in.get(), out_fd, pretty);
    sessions_.push_back(&session);
    if (held_) session.hold_commands();
    co_await session.run();
    std::erase(sessions_, &session);
    Loop::current().forget_fd(in.get());
    if (out) Loop::current().forget_fd(out.get());
}

void Monitors::let_clients_in() {
    clients_held_ = false;
    clients_let_in_.notify_all();
}

void Monitors::broadcast(const json::object& event) {
    for (Session* session : sessions_) session->send_event(event);
}

UniqueFd Monitors::take_descriptor(std::string_view name) {
    for (Session* session : sessions_) {
        if (UniqueFd fd = session->take_descriptor(name)) return fd;
    }
    return UniqueFd();
}

void Monitors::hold_commands() {
    held_ = true;
    for (Session* session : sessions_) session->hold_commands();
}

Task<void> Monitors::commands_done() {
    while (std::ranges::any_of(sessions_, &Session::executing)) co_await command_done_.wait();
}

void Monitors::stop_waiting() {
    waits_no_more_ = true;
    if (first_client_) first_client_->cancel();
}

Task<void> Monitors::stop() {
    stopping_ = true;
    clients_let_in_.notify_all();
    for (auto& [id, chardev] : chardevs_) {
        for (CancellableIo* accept : chardev->accepting) accept->cancel();
        chardev->socket_file.remove();
    }
    for (Session* session : sessions_) session->close();
    co_await scope_.join();
    for (auto& [id, chardev] : chardevs_) {
        for (UniqueFd& listener : chardev->listeners) Loop::current().forget_fd(listener.get());
        chardev->listeners.clear();
    }
}

}  // namespace gantry::qmp
