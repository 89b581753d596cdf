#include "nbd/client/address.h"

#include <linux/vm_sockets.h>
#include <netdb.h>
#include <sys/un.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <utility>

#include "nbd/listener.h"
#include "nbd/protocol.h"
#include "runtime/blocking_pool.h"
#include "schema/options.h"

namespace gantry::nbd::client {

namespace {

template <class T>
SocketTarget target_of(const T& address, socklen_t length) {
    SocketTarget out;
    std::memcpy(&out.storage, &address, length);
    out.length = length;
    return out;
}

Result<SocketTarget> unix_target(const std::string& path, bool abstract, bool tight) {
    sockaddr_un un{};
    un.sun_family = AF_UNIX;
    // A path ends with a NUL byte, an abstract name begins with one.
    if (path.size() >= sizeof un.sun_path) {
        return fail(ErrorKind::kInvalid, "UNIX socket path '{}' is too long; path must be less than {} bytes", path,
                    sizeof un.sun_path);
    }
    std::memcpy(un.sun_path + (abstract ? 1 : 0), path.data(), path.size());
    size_t length = sizeof un;
    if (abstract && tight) length = offsetof(sockaddr_un, sun_path) + 1 + path.size();
    return target_of(un, static_cast<socklen_t>(length));
}

Result<uint32_t> number(const std::string& text, std::string_view what) {
    uint32_t value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
        return fail(ErrorKind::kInvalid, "the {} '{}' of a vsock address is not a number", what, text);
    }
    return value;
}

Result<std::vector<SocketTarget>> look_up(const std::string& host, const std::string& port, InetFamilies families) {
    const bool v4 = families.ipv4.value_or(!families.ipv6.value_or(false));
    const bool v6 = families.ipv6.value_or(!families.ipv4.value_or(false));
    if (!v4 && !v6) return fail(ErrorKind::kInvalid, "address '{}:{}': both ipv4 and ipv6 are off", host, port);
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = families.numeric ? AI_NUMERICHOST | AI_NUMERICSERV : 0;
    hints.ai_family = v4 && v6 ? AF_UNSPEC : v4 ? AF_INET : AF_INET6;
    addrinfo* list = nullptr;
    const int r = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &list);
    if (r != 0) {
        return fail(ErrorKind::kNotFound, "address resolution failed for {}:{}: {}", host, port,
                    r == EAI_SYSTEM ? errno_text(errno) : ::gai_strerror(r));
    }
    std::vector<SocketTarget> found;
    for (const addrinfo* info = list; info; info = info->ai_next) {
        SocketTarget target;
        if (info->ai_addrlen > sizeof target.storage) continue;
        std::memcpy(&target.storage, info->ai_addr, info->ai_addrlen);
        target.length = info->ai_addrlen;
        found.push_back(target);
    }
    ::freeaddrinfo(list);
    if (found.empty()) return fail(ErrorKind::kNotFound, "'{}' has no internet address", host);
    return found;
}

}  // namespace

Result<ServerAddress> ServerAddress::parse(const json::object& object,
                                           const std::function<Result<UniqueFd>(std::string_view)>& find_fd) {
    const schema::Options address(object);
    const std::string type = address.str("type");
    ServerAddress out;
    if (type == "unix") {
        out.kind_ = Kind::kUnix;
        out.path_ = address.str("path");
        out.abstract_ = address.flag("abstract");
        out.tight_ = address.flag("tight", true);
        if (address.has("mode") || address.has("group")) {
            return fail(ErrorKind::kInvalid, "'mode' and 'group' are for listening, not for connecting");
        }
        out.text_ = out.abstract_ ? "@" + out.path_ : out.path_;
        if (out.path_.empty()) return fail(ErrorKind::kInvalid, "the path of a unix socket is empty");
        CHECK_OK(unix_target(out.path_, out.abstract_, out.tight_));
    } else if (type == "inet") {
        out.kind_ = Kind::kInet;
        out.host_ = address.str("host");
        out.port_ = address.str("port");
        if (address.has("ipv4")) out.families_.ipv4 = address.flag("ipv4");
        if (address.has("ipv6")) out.families_.ipv6 = address.flag("ipv6");
        out.families_.numeric = address.flag("numeric");
        out.keep_alive_ = address.flag("keep-alive", true);
        const auto seconds = [&](std::string_view key, std::chrono::seconds fallback) {
            return address.has(key) ? std::chrono::seconds(address.integer(key)) : fallback;
        };
        out.probes_.idle = seconds("keep-alive-idle", out.probes_.idle);
        out.probes_.interval = seconds("keep-alive-interval", out.probes_.interval);
        out.probes_.count =
            static_cast<int>(std::min<int64_t>(address.integer("keep-alive-count", out.probes_.count), 127));
        if (address.has("to")) return fail(ErrorKind::kInvalid, "'to' is for listening, not for connecting");
        if (out.port_.empty()) return fail(ErrorKind::kInvalid, "the port of server '{}' is empty", out.host_);
        out.text_ = fmt::format("{}:{}", out.host_, out.port_);
    } else if (type == "vsock") {
        out.kind_ = Kind::kVsock;
        TRY(out.cid_, number(address.str("cid"), "cid"));
        TRY(out.vsock_port_, number(address.str("port"), "port"));
        out.text_ = fmt::format("vsock:{}:{}", out.cid_, out.vsock_port_);
    } else if (type == "fd") {
        out.kind_ = Kind::kFd;
        const std::string name = address.str("str");
        out.text_ = "fd:" + name;
        if (!find_fd) return fail(ErrorKind::kUnsupported, "file descriptor '{}' cannot be looked up here", name);
        TRY(UniqueFd fd, find_fd(name));
        CHECK_OK(check_connected_socket(fd.get()));
        CHECK_OK(set_nonblocking(fd.get()));
        CHECK_OK(set_cloexec(fd.get()));
        out.fd_ = std::make_shared<UniqueFd>(std::move(fd));
    } else {
        return fail(ErrorKind::kUnsupported, "socket address type '{}' is not served; use inet, unix, vsock or fd",
                    type);
    }
    return out;
}

std::string ServerAddress::uri(std::string_view export_name) const {
    const std::string name = percent_encode(export_name, "/");
    if (kind_ == Kind::kUnix && tight_) {
        return fmt::format("nbd+unix:///{}?socket={}{}", name, abstract_ ? "%00" : "", percent_encode(path_, "/"));
    }
    if (kind_ != Kind::kInet || families_.ipv4 || families_.ipv6) return {};
    const bool v6 = host_.contains(':');
    return fmt::format("nbd://{}{}{}{}/{}", v6 ? "[" : "", host_, v6 ? "]" : "",
                       port_ == std::to_string(kDefaultPort) ? "" : ":" + port_, name);
}

Task<Result<std::vector<SocketTarget>>> ServerAddress::resolve() const {
    std::vector<SocketTarget> targets;
    if (kind_ == Kind::kUnix) {
        CO_TRY(const SocketTarget target, unix_target(path_, abstract_, tight_));
        targets.push_back(target);
    } else if (kind_ == Kind::kVsock) {
        sockaddr_vm vm{};
        vm.svm_family = AF_VSOCK;
        vm.svm_cid = cid_;
        vm.svm_port = vsock_port_;
        targets.push_back(target_of(vm, sizeof vm));
    } else if (kind_ == Kind::kInet) {
        // Copies: the look-up cannot be interrupted, and outlives whoever gave up on it.
        auto found = co_await run_blocking(
            [host = host_, port = port_, families = families_] { return look_up(host, port, families); });
        co_return found;
    }
    co_return std::move(targets);
}

UniqueFd ServerAddress::take_socket() const { return fd_ ? std::move(*fd_) : UniqueFd(); }

}  // namespace gantry::nbd::client
