// Making sockets: listen_*, connect_*.

#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/stat.h>
#include <sys/un.h>

#include <linux/vm_sockets.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <optional>

#include "runtime/blocking_pool.h"
#include "runtime/io.h"
#include "runtime/socket.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry {

namespace {

struct Address {
    sockaddr_storage storage{};
    socklen_t length = 0;
    const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
    int family() const { return storage.ss_family; }
    bool operator==(const Address& o) const {
        return length == o.length && std::memcmp(&storage, &o.storage, length) == 0;
    }
};

/// Of vsock: a decimal number, or "-1" for any.
Result<unsigned> vsock_number(const std::string& text, std::string_view what) {
    if (text == "-1") return VMADDR_CID_ANY;
    unsigned value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size()) {
        return fail(ErrorKind::kInvalid, "vsock {} '{}' is not a number from 0 to 4294967295", what, text);
    }
    return value;
}

Result<Address> vsock_address(const std::string& cid, const std::string& port) {
    sockaddr_vm vm{};
    vm.svm_family = AF_VSOCK;
    TRY(vm.svm_cid, vsock_number(cid.empty() ? "-1" : cid, "cid"));
    TRY(vm.svm_port, vsock_number(port, "port"));
    Address a;
    std::memcpy(&a.storage, &vm, sizeof vm);
    a.length = sizeof vm;
    return a;
}

Result<UniqueFd> stream_socket(int family) {
    UniqueFd fd(::socket(family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) return fail_errno(errno, "cannot create a socket");
    return fd;
}

Result<Address> unix_address(const std::string& path) {
    sockaddr_un un{};
    if (path.empty()) return fail(ErrorKind::kInvalid, "the path of a unix socket is empty");
    if (path.find('\0') != std::string::npos)
        return fail(ErrorKind::kInvalid, "the path of a unix socket contains a NUL byte");
    if (path.size() >= sizeof un.sun_path) {
        return fail(ErrorKind::kInvalid, "UNIX socket path '{}' is too long; path must be less than {} bytes", path,
                    sizeof un.sun_path);
    }
    un.sun_family = AF_UNIX;
    std::memcpy(un.sun_path, path.data(), path.size());
    Address a;
    std::memcpy(&a.storage, &un, sizeof un);
    a.length = sizeof un;
    return a;
}

/// Whether somebody serves `address`. The kernel takes a ring of a killed process apart a moment after its end, and its
/// listeners with it: until then connections are taken and dropped at once, which a living server does not do.
Result<bool> is_served(const std::string& path, const Address& address) {
    constexpr std::chrono::milliseconds kPatience{500};
    const auto deadline = Clock::now() + kPatience;
    for (;;) {
        TRY(const UniqueFd probe, stream_socket(AF_UNIX));
        if (::connect(probe.get(), address.get(), address.length) != 0) {
            if (errno == ECONNREFUSED) return false;
            if (errno == EAGAIN || errno == EINPROGRESS) return true;
            return fail_errno(errno, "cannot find out whether socket '{}' is in use", path);
        }
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
        pollfd wait{probe.get(), POLLIN, 0};
        if (left <= 0 || ::poll(&wait, 1, static_cast<int>(left)) <= 0) return true;
        char byte;
        if (::recv(probe.get(), &byte, 1, MSG_PEEK) > 0) return true;
    }
}

/// Removes the socket file at `path` when nobody listens on it.
Result<> remove_stale(const std::string& path, const Address& address) {
    struct stat st;
    if (::lstat(path.c_str(), &st) != 0) {
        if (errno == ENOENT) return {};
        return fail_errno(errno, "cannot look at socket '{}'", path);
    }
    if (!S_ISSOCK(st.st_mode))
        return fail(ErrorKind::kExists, "'{}' exists and is not a socket; remove it first", path);
    TRY(const bool served, is_served(path, address));
    if (served) return fail(ErrorKind::kBusy, "another process listens on socket '{}'", path);
    if (::unlink(path.c_str()) != 0 && errno != ENOENT)
        return fail_errno(errno, "cannot remove the stale socket '{}'", path);
    return {};
}

Result<std::vector<Address>> look_up(std::string host, std::string port, InetFamilies families, bool passive) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = (passive ? AI_PASSIVE : 0) | (families.numeric ? AI_NUMERICHOST | AI_NUMERICSERV : 0);
    const bool v4 = families.ipv4.value_or(!families.ipv6.value_or(false));
    const bool v6 = families.ipv6.value_or(!families.ipv4.value_or(false));
    if (!v4 && !v6) return fail(ErrorKind::kInvalid, "address '{}:{}': both ipv4 and ipv6 are off", host, port);
    hints.ai_family = v4 && v6 ? AF_UNSPEC : v4 ? AF_INET : AF_INET6;
    addrinfo* list = nullptr;
    const int r = ::getaddrinfo(host.empty() ? nullptr : host.c_str(), port.c_str(), &hints, &list);
    if (r != 0) {
        return fail(r == EAI_MEMORY ? ErrorKind::kNoMemory : ErrorKind::kNotFound,
                    "address resolution failed for {}:{}: {}", host, port,
                    r == EAI_SYSTEM ? errno_text(errno) : ::gai_strerror(r));
    }
    std::vector<Address> found;
    for (const addrinfo* info = list; info; info = info->ai_next) {
        Address a;
        if ((info->ai_family != AF_INET && info->ai_family != AF_INET6) || info->ai_addrlen > sizeof a.storage)
            continue;
        std::memcpy(&a.storage, info->ai_addr, info->ai_addrlen);
        a.length = info->ai_addrlen;
        if (std::ranges::find(found, a) == found.end()) found.push_back(a);
    }
    ::freeaddrinfo(list);
    if (found.empty()) return fail(ErrorKind::kNotFound, "'{}' has no internet address", host);
    return found;
}

void set_port(Address& a, uint16_t port) {
    // The port stands at the same place of both families.
    const in_port_t value = htons(port);
    std::memcpy(reinterpret_cast<char*>(&a.storage) + offsetof(sockaddr_in, sin_port), &value, sizeof value);
}

bool port_is_zero(const Address& a) {
    in_port_t value;
    std::memcpy(&value, reinterpret_cast<const char*>(&a.storage) + offsetof(sockaddr_in, sin_port), sizeof value);
    return value == 0;
}

Result<UniqueFd> listen_at(const Address& a, int backlog, std::string_view text) {
    TRY(UniqueFd fd, stream_socket(a.family()));
    const int on = 1;
    ::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &on, sizeof on);
    // IPv4 clients have a socket of their own; one that takes both would collide with it.
    if (a.family() == AF_INET6) ::setsockopt(fd.get(), IPPROTO_IPV6, IPV6_V6ONLY, &on, sizeof on);
    if (::bind(fd.get(), a.get(), a.length) != 0 || ::listen(fd.get(), backlog) != 0) {
        return fail_errno(errno, "cannot listen on {}", text);
    }
    return fd;
}

/// One socket per address. With port 0 the first one's port serves for the others; `taken` tells that another program
/// has it for one of them, so that a new choice may succeed.
Result<std::vector<UniqueFd>> listen_at_all(std::vector<Address> addresses, int backlog, std::string_view text,
                                            bool* taken) {
    std::vector<UniqueFd> sockets;
    std::optional<Error> last;
    const bool choose = port_is_zero(addresses.front());
    for (Address& a : addresses) {
        if (choose && !sockets.empty()) {
            TRY(const uint16_t port, local_port(sockets.front().get()));
            set_port(a, port);
        }
        auto fd = listen_at(a, backlog, text);
        if (fd) {
            sockets.push_back(std::move(*fd));
            continue;
        }
        // A family that this machine does not have is no reason to refuse the others.
        const int e = fd.error().errno_value();
        if (e != EAFNOSUPPORT && e != EADDRNOTAVAIL) {
            *taken = choose && e == EADDRINUSE;
            return std::unexpected(std::move(fd).error());
        }
        last = std::move(fd).error();
    }
    if (sockets.empty()) return std::unexpected(std::move(*last));
    return sockets;
}

Task<void> cancel_at(Timer* timer, Clock::time_point deadline, CancellableIo* io, bool* expired) {
    if (co_await timer->until(deadline)) {
        *expired = true;
        io->cancel();
    }
}

/// connect(2) that gives up with -ETIMEDOUT at `deadline`.
Task<int> connect_until(int fd, const Address* address, Clock::time_point deadline) {
    CancellableIo io(io_connect(fd, address->get(), address->length));
    if (deadline == Clock::time_point::max()) {
        const int result = co_await io;
        co_return result;
    }
    Timer timer;
    TaskScope scope;
    bool expired = false;
    scope.spawn(cancel_at(&timer, deadline, &io, &expired));
    int result = co_await io;
    timer.cancel();
    co_await scope.join();
    if (expired && result < 0) result = -ETIMEDOUT;
    co_return result;
}

Clock::time_point deadline_after(std::chrono::nanoseconds timeout) {
    return timeout.count() > 0 ? deadline_in(timeout) : Clock::time_point::max();
}

}  // namespace

Result<UniqueFd> listen_unix(const std::string& path, mode_t mode, int backlog, std::optional<gid_t> group) {
    TRY(const Address address, unix_address(path));
    CHECK_OK(remove_stale(path, address));
    TRY(UniqueFd fd, stream_socket(AF_UNIX));
    // The file never has more permissions than asked for: bind() takes the socket's mode less the umask. Whose group it
    // is, is not said yet.
    const mode_t first = mode != 0 && group ? mode & 0700 : mode;
    if (mode != 0 && ::fchmod(fd.get(), first) != 0)
        return fail_errno(errno, "cannot set the mode of socket '{}'", path);
    if (::bind(fd.get(), address.get(), address.length) != 0) {
        return fail_errno(errno, "Failed to bind socket to {}", path);
    }
    const auto give_up = [&](std::string_view what) {
        const int e = errno;
        ::unlink(path.c_str());
        return fail_errno(e, "cannot {} socket '{}'", what, path);
    };
    if (group && ::lchown(path.c_str(), static_cast<uid_t>(-1), *group) != 0) return give_up("set the group of");
    if (mode != 0 && ::chmod(path.c_str(), mode) != 0) return give_up("set the mode of");
    if (::listen(fd.get(), backlog) != 0) return give_up("listen on");
    return fd;
}

Task<Result<std::vector<UniqueFd>>> listen_inet(std::string host, std::string port, InetFamilies families,
                                                int backlog) {
    CO_TRY(const auto addresses, co_await run_blocking([&] { return look_up(host, port, families, true); }));
    const std::string text = fmt::format("{}:{}", host, port);
    for (int attempt = 0;; ++attempt) {
        bool taken = false;
        auto sockets = listen_at_all(addresses, backlog, text, &taken);
        if (sockets || !taken || attempt == 16) co_return sockets;
    }
}

Result<UniqueFd> listen_vsock(const std::string& cid, const std::string& port, int backlog) {
    TRY(const Address address, vsock_address(cid, port));
    auto fd = stream_socket(AF_VSOCK);
    if (!fd) return fail(ErrorKind::kUnsupported, "vsock:{}:{}: this kernel has no vsock sockets", cid, port);
    if (::bind(fd->get(), address.get(), address.length) != 0 || ::listen(fd->get(), backlog) != 0) {
        return fail_errno(errno, "cannot listen on vsock:{}:{}", cid, port);
    }
    return fd;
}

Task<Result<UniqueFd>> connect_vsock(std::string cid, std::string port, std::chrono::nanoseconds timeout) {
    CO_TRY(const Address address, vsock_address(cid, port));
    auto fd = stream_socket(AF_VSOCK);
    if (!fd) co_return fail(ErrorKind::kUnsupported, "vsock:{}:{}: this kernel has no vsock sockets", cid, port);
    const int result = co_await connect_until(fd->get(), &address, deadline_after(timeout));
    if (result < 0) co_return fail_errno(-result, "Failed to connect to vsock:{}:{}", cid, port);
    co_return fd;
}

Task<Result<UniqueFd>> connect_unix(std::string path, std::chrono::nanoseconds timeout) {
    const auto deadline = deadline_after(timeout);
    CO_TRY(const Address address, unix_address(path));
    std::chrono::milliseconds pause(1);
    for (;;) {
        CO_TRY(UniqueFd fd, stream_socket(AF_UNIX));
        int result = co_await connect_until(fd.get(), &address, deadline);
        if (result >= 0) co_return fd;
        if (result != -EAGAIN) co_return fail_errno(-result, "Failed to connect to '{}'", path);
        // The listener's backlog is full, and nothing tells when it has room.
        const auto now = Clock::now();
        if (now >= deadline) co_return fail_errno(ETIMEDOUT, "Failed to connect to '{}'", path);
        co_await sleep_for(std::min<Clock::duration>(pause, deadline - now));
        pause = std::min(pause * 2, std::chrono::milliseconds(50));
    }
}

Task<Result<UniqueFd>> connect_inet(std::string host, std::string port, InetFamilies families,
                                    std::chrono::nanoseconds timeout) {
    CO_TRY(const auto addresses, co_await run_blocking([&] { return look_up(host, port, families, false); }));
    const auto deadline = deadline_after(timeout);
    int error = EHOSTUNREACH;
    for (const Address& a : addresses) {
        CO_TRY(UniqueFd fd, stream_socket(a.family()));
        const int result = co_await connect_until(fd.get(), &a, deadline);
        if (result >= 0) {
            CO_CHECK(set_tcp_nodelay(fd.get()));
            co_return fd;
        }
        error = -result;
        if (error == ETIMEDOUT && Clock::now() >= deadline) break;
    }
    co_return fail_errno(error, "Failed to connect to '{}:{}'", host, port);
}

}  // namespace gantry
