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
/// What of a warning is logged: names in a stranger's certificate may have 64 KiB each.
constexpr size_t kLongestWarning = 1024;

/// At the end of a server clients are told so for a while: as long as they ask for something, up to a limit.
constexpr std::chrono::milliseconds kGoodByeLook{10};
constexpr std::chrono::milliseconds kGoodByeMax{500};

bool out_of_resources(int error) { return error == EMFILE || error == ENFILE || error == ENOBUFS || error == ENOMEM; }

/// A connection takes TCP_NODELAY and keepalive over from its listener; the buffer of a unix socket is its own.
void prepare_socket(int fd, bool is_unix) {
    if (!is_unix) return;
    // Replies to several large reads fit; beyond the system's limit only with privileges.
    if (::setsockopt(fd, SOL_SOCKET, SO_SNDBUFFORCE, &kSendBuffer, sizeof kSendBuffer) != 0) {
        ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kSendBuffer, sizeof kSendBuffer);
    }
}

struct Listener {
    explicit Listener(ListenSocket s) : socket(std::move(s)) {}
    ListenSocket socket;
    CancellableIo* waiting = nullptr;
    Timer pause;
};

}  // namespace

struct Server::Impl final : ExportDirectory {
    Impl(Server& s, Runtime& r, std::string name) : server(s), runtime(r), id(std::move(name)) {}

    std::optional<ExportFacts> find(std::string_view name) const override;
    std::vector<Listed> list() const override;

    Task<void> accept_clients(Listener* listener);
    Task<void> serve(UniqueFd fd);
    bool full() const { return options.max_connections != 0 && clients.size() >= options.max_connections; }
    ConnectionLimits limits() const;
    void warn_about(const Connection& connection);
    void close_listeners();
    /// Changes whenever a client does something.
    uint64_t activity() const;

    Server& server;
    Runtime& runtime;
    const std::string id;
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
    return {options.handshake_max, std::clamp(share, kSessionMemoryMin, kSessionMemoryMax), options.tls};
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
    Loop::current().forget_fd(listener->socket.fd());
    listener->socket.close();
}

Task<void> Server::Impl::serve(UniqueFd fd) {
    // Not in the coroutine's frame: its counters ask for more alignment than a frame has.
    const auto connection = std::make_unique<Connection>(server, *this, std::move(fd), limits());
    clients.push_back(connection.get());
    co_await connection->run();
    std::erase(clients, connection.get());
    if (!connection->violation().empty()) warn_about(*connection);
    slot_free.notify_all();
}

void Server::Impl::warn_about(const Connection& connection) {
    const auto now = Clock::now();
    if (now - warning_second >= std::chrono::seconds(1)) {
        warning_second = now;
        warnings = 0;
    }
    if (warnings++ < kWarningsPerSecond) {
        log::warn("NBD client {} disconnected: {}", connection.peer(),
                  connection.violation().substr(0, kLongestWarning));
    }
}

Server::Server(Runtime& runtime, std::string id) : impl_(std::make_unique<Impl>(*this, runtime, std::move(id))) {}

Server::~Server() { CHECK(impl_->state == Impl::State::kStopped, "the NBD server is stopped before it is destroyed"); }

const std::string& Server::id() const { return impl_->id; }

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
    std::vector<ListenSocket> sockets;
    json::array addresses{options.address};
    for (json::value& address : options.more_addresses) addresses.push_back(address);
    for (json::value& address : addresses) {
        auto opened = co_await open_listeners(address.get_object(), options.resolve_fd);
        if (!opened) {
            in.state = Impl::State::kStopped;
            co_return std::unexpected(std::move(opened).error());
        }
        std::ranges::move(*opened, std::back_inserter(sockets));
    }
    in.options = std::move(options);
    in.state = Impl::State::kRunning;
    for (ListenSocket& socket : sockets) {
        in.listeners.push_back(std::make_unique<Listener>(std::move(socket)));
        in.scope.spawn(in.accept_clients(in.listeners.back().get()));
    }
    co_return Result<>();
}

void Server::Impl::close_listeners() {
    state = State::kStopping;
    for (const auto& listener : listeners) {
        if (listener->waiting) listener->waiting->cancel();
        listener->pause.cancel();
    }
    slot_free.notify_all();
}

uint64_t Server::Impl::activity() const {
    uint64_t sum = clients.size();
    for (const Connection* client : clients) sum += client->activity();
    return sum;
}

Task<void> Server::say_good_bye() {
    Impl& in = *impl_;
    if (in.state != Impl::State::kRunning) co_return;
    in.close_listeners();
    for (Connection* client : in.clients) client->say_good_bye();
    const auto end = deadline_in(kGoodByeMax);
    while (!in.clients.empty() && Clock::now() < end) {
        const uint64_t before = in.activity();
        co_await sleep_for(kGoodByeLook);
        const bool busy = std::ranges::any_of(in.clients, [](const Connection* c) { return c->busy(); });
        if (!busy && in.activity() == before) break;
    }
}

Task<void> Server::stop() {
    Impl& in = *impl_;
    if (in.state != Impl::State::kRunning && in.state != Impl::State::kStopping) co_return;
    in.close_listeners();
    for (Connection* client : in.clients) client->cut();
    co_await in.scope.join();
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
    const bool tls = impl_->options.tls.mode() == TlsMode::kRequired;
    std::vector<std::string> all;
    for (const auto& listener : impl_->listeners) {
        if (impl_->exports.empty()) all.push_back(listener->socket.uri("", tls));
        for (const auto& [name, e] : impl_->exports) all.push_back(listener->socket.uri(name, tls));
    }
    return all;
}

size_t Server::connections() const { return impl_->clients.size(); }

json::object Server::details() const {
    const Impl& in = *impl_;
    const bool tls = in.options.tls.mode() == TlsMode::kRequired;
    json::array addresses, names, clients;
    for (const auto& listener : in.listeners) addresses.push_back(json::value(listener->socket.uri("", tls)));
    for (const auto& [name, e] : in.exports) names.push_back(json::value(name));
    for (const Connection* client : in.clients) clients.push_back(client->details());
    json::object info;
    if (!in.id.empty()) info["id"] = in.id;
    info["addresses"] = std::move(addresses);
    info["max-connections"] = in.options.max_connections;
    info["handshake-max-seconds"] = in.options.handshake_max.count();
    info["exports"] = std::move(names);
    info["clients"] = std::move(clients);
    return info;
}

}  // namespace gantry::nbd
