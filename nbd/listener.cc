#include "nbd/listener.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "exports/unix_address.h"
#include "nbd/protocol.h"
#include "runtime/log.h"
#include "runtime/socket.h"
#include "schema/options.h"

namespace gantry::nbd {

namespace {

/// What stands for `host` in a URI, with the port that `fd` is bound to.
std::string authority(const std::string& host, int fd) {
    const auto port = local_port(fd);
    const bool any = host.empty() || host == "0.0.0.0" || host == "::";
    std::string text = any ? "localhost" : host.find(':') == std::string::npos ? host : "[" + host + "]";
    if (port && *port != kDefaultPort) text += fmt::format(":{}", *port);
    return text;
}

Result<ListenSocket> open_unix(const schema::Options& address) {
    const bool abstract = address.flag("abstract");
    TRY(UniqueFd fd, exports::listen_unix_address(address.raw()));
    return ListenSocket(std::move(fd), "", (abstract ? "%00" : "") + percent_encode(address.str("path"), "/"),
                        !abstract);
}

Result<ListenSocket> open_vsock(const schema::Options& address) {
    const std::string cid = address.str("cid"), port = address.str("port");
    TRY(UniqueFd fd, listen_vsock(cid, port, SOMAXCONN));
    // "vsock:CID:PORT": the port may have been chosen by the kernel.
    std::string where = local_name(fd.get()).substr(std::strlen("vsock:"));
    return ListenSocket(std::move(fd), std::move(where), "", false, "nbd+vsock");
}

/// What every connection inherits. A connection without it works, too.
void prepare_listener(int fd, bool keep_alive, Keepalive probes) {
    if (auto r = set_tcp_nodelay(fd); !r) log::debug("{}", r.error().message());
    if (auto r = set_keepalive(fd, keep_alive, probes); !r) log::debug("{}", r.error().message());
}

Result<ListenSocket> open_fd(const schema::Options& address,
                             const std::function<Result<UniqueFd>(std::string_view)>& resolve_fd) {
    const std::string name = address.str("str");
    if (!resolve_fd) return fail(ErrorKind::kUnsupported, "file descriptor '{}' cannot be looked up here", name);
    TRY(UniqueFd fd, resolve_fd(name));
    CHECK_OK(check_listening_socket(fd.get()));
    CHECK_OK(set_nonblocking(fd.get()));
    CHECK_OK(set_cloexec(fd.get()));
    const std::string local = local_name(fd.get());
    constexpr std::string_view kUnix = "unix:";
    if (!local.starts_with(kUnix)) {
        std::string host = local.substr(0, local.rfind(':'));
        if (host.starts_with('[')) host = host.substr(1, host.size() - 2);
        if (local.starts_with("vsock:")) {
            return ListenSocket(std::move(fd), local.substr(std::strlen("vsock:")), "", false, "nbd+vsock");
        }
        prepare_listener(fd.get(), true, {});
        std::string where = authority(host, fd.get());
        return ListenSocket(std::move(fd), std::move(where), "", false);
    }
    // Whoever made the socket removes its file.
    std::string path = local.substr(kUnix.size());
    const bool abstract = path.starts_with('@');
    if (abstract) path.erase(0, 1);
    return ListenSocket(std::move(fd), "", (abstract ? "%00" : "") + percent_encode(path, "/"), false);
}

Task<Result<std::vector<ListenSocket>>> open_inet(json::object object) {
    const schema::Options address(object);
    const std::string host = address.str("host");
    std::string port = address.str("port");
    InetFamilies families;
    if (address.has("ipv4")) families.ipv4 = address.flag("ipv4");
    if (address.has("ipv6")) families.ipv6 = address.flag("ipv6");
    families.numeric = address.flag("numeric");
    Keepalive probes;
    probes.idle = std::chrono::seconds(address.integer("keep-alive-idle"));
    probes.interval = std::chrono::seconds(address.integer("keep-alive-interval"));
    probes.count = static_cast<int>(std::min<int64_t>(address.integer("keep-alive-count"), 127));
    const bool keep_alive = address.flag("keep-alive", true);
    CO_TRY(const bool number, port_is_number(port));
    unsigned first = 0, last = 0;
    if (number) first = last = static_cast<unsigned>(std::stoul(port));
    if (address.has("to")) {
        const int64_t to = address.integer("to");
        if (!number || to < first || to > 65535) {
            co_return fail(ErrorKind::kInvalid, "'to' ({}) is not a port from '{}' on", to, port);
        }
        last = static_cast<unsigned>(to);
    }
    for (unsigned at = first;; ++at) {
        auto fds = co_await listen_inet(host, number ? std::to_string(at) : port, families, SOMAXCONN);
        if (!fds) {
            if (at < last && fds.error().errno_value() == EADDRINUSE) continue;
            co_return std::unexpected(std::move(fds).error());
        }
        std::vector<ListenSocket> sockets;
        for (UniqueFd& fd : *fds) {
            prepare_listener(fd.get(), keep_alive, probes);
            std::string where = authority(host, fd.get());
            sockets.emplace_back(std::move(fd), std::move(where), "", false);
        }
        co_return std::move(sockets);
    }
}

}  // namespace

ListenSocket::ListenSocket(UniqueFd fd, std::string uri_authority, std::string uri_query, bool owns_path_of_unix,
                           std::string_view scheme)
    : fd_(std::move(fd)), scheme_(scheme), authority_(std::move(uri_authority)), query_(std::move(uri_query)) {
    if (owns_path_of_unix) file_ = SocketFile(local_name(fd_.get()).substr(std::strlen("unix:")));
}

std::string ListenSocket::uri(std::string_view export_name, bool tls) const {
    const std::string name = percent_encode(export_name, "/");
    if (is_unix()) return fmt::format("nbd{}+unix:///{}?socket={}", tls ? "s" : "", name, query_);
    return fmt::format("nbd{}{}://{}/{}", tls ? "s" : "", scheme_.substr(3), authority_, name);
}

void ListenSocket::close() {
    file_.remove();
    fd_.reset();
}

Result<bool> port_is_number(std::string_view port) {
    if (port.empty())
        return fail(ErrorKind::kInvalid, "the port is empty; give a number from 0 to 65535 or a service name");
    const bool number = std::ranges::all_of(port, [](char c) { return c >= '0' && c <= '9'; });
    if (number && (port.size() > 5 || std::stoul(std::string(port)) > 65535)) {
        return fail(ErrorKind::kInvalid, "port '{}' is not a number from 0 to 65535", port);
    }
    if (!number && (port[0] == '-' || port[0] == '+')) {
        return fail(ErrorKind::kInvalid, "port '{}' is not a number from 0 to 65535", port);
    }
    return number;
}

Task<Result<std::vector<ListenSocket>>> open_listeners(json::object object,
                                                       std::function<Result<UniqueFd>(std::string_view)> resolve_fd) {
    const schema::Options address(object);
    const std::string type = address.str("type");
    if (type == "inet") {
        auto sockets = co_await open_inet(object);
        co_return sockets;
    }
    std::vector<ListenSocket> sockets;
    if (type == "unix") {
        CO_TRY(auto socket, open_unix(address));
        sockets.push_back(std::move(socket));
    } else if (type == "fd") {
        CO_TRY(auto socket, open_fd(address, resolve_fd));
        sockets.push_back(std::move(socket));
    } else {
        CHECK(type == "vsock", "the schema lists the types of addresses");
        CO_TRY(auto socket, open_vsock(address));
        sockets.push_back(std::move(socket));
    }
    co_return std::move(sockets);
}

std::string percent_encode(std::string_view text, std::string_view keep) {
    std::string out;
    for (const char c : text) {
        const bool plain = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                           std::string_view("-._~").find(c) != std::string_view::npos ||
                           keep.find(c) != std::string_view::npos;
        if (plain) {
            out += c;
        } else {
            out += fmt::format("%{:02X}", static_cast<unsigned char>(c));
        }
    }
    return out;
}

}  // namespace gantry::nbd
