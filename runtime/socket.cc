#include "runtime/socket.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <linux/vm_sockets.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>

#include "runtime/log.h"

namespace gantry {

namespace {

Result<> set_int(int fd, int level, int name, int value, std::string_view what) {
    if (::setsockopt(fd, level, name, &value, sizeof value) != 0) return fail_errno(errno, "cannot set {}", what);
    return {};
}

int get_int(int fd, int level, int name) {
    int value = -1;
    socklen_t len = sizeof value;
    return ::getsockopt(fd, level, name, &value, &len) == 0 ? value : -1;
}

bool is_tcp(int fd) {
    const int domain = get_int(fd, SOL_SOCKET, SO_DOMAIN);
    return (domain == AF_INET || domain == AF_INET6) && get_int(fd, SOL_SOCKET, SO_PROTOCOL) == IPPROTO_TCP;
}

Result<> set_flag(int fd, int get, int set, int flag, bool on) {
    const int flags = ::fcntl(fd, get);
    if (flags < 0 || ::fcntl(fd, set, on ? flags | flag : flags & ~flag) != 0) {
        return fail_errno(errno, "cannot change the flags of descriptor {}", fd);
    }
    return {};
}

std::string address_text(const sockaddr_storage& address) {
    char text[INET6_ADDRSTRLEN] = "?";
    if (address.ss_family == AF_INET) {
        sockaddr_in in;
        std::memcpy(&in, &address, sizeof in);
        ::inet_ntop(AF_INET, &in.sin_addr, text, sizeof text);
        return fmt::format("{}:{}", text, ntohs(in.sin_port));
    }
    if (address.ss_family == AF_INET6) {
        sockaddr_in6 in;
        std::memcpy(&in, &address, sizeof in);
        ::inet_ntop(AF_INET6, &in.sin6_addr, text, sizeof text);
        return fmt::format("[{}]:{}", text, ntohs(in.sin6_port));
    }
    if (address.ss_family == AF_VSOCK) {
        sockaddr_vm vm;
        std::memcpy(&vm, &address, sizeof vm);
        return fmt::format("vsock:{}:{}", vm.svm_cid, vm.svm_port);
    }
    return "unknown";
}

Result<> check_stream_socket(int fd) {
    struct stat st;
    if (::fstat(fd, &st) != 0) return fail_errno(errno, "file descriptor {}", fd);
    if (!S_ISSOCK(st.st_mode)) return fail(ErrorKind::kInvalid, "file descriptor {} is not a socket", fd);
    if (get_int(fd, SOL_SOCKET, SO_TYPE) != SOCK_STREAM) {
        return fail(ErrorKind::kInvalid, "file descriptor {} is not a stream socket", fd);
    }
    const int domain = get_int(fd, SOL_SOCKET, SO_DOMAIN);
    if (domain != AF_UNIX && domain != AF_INET && domain != AF_INET6 && domain != AF_VSOCK) {
        return fail(ErrorKind::kInvalid, "file descriptor {} is neither a unix nor an internet nor a vsock socket", fd);
    }
    return {};
}

}  // namespace

Result<> set_nonblocking(int fd, bool on) { return set_flag(fd, F_GETFL, F_SETFL, O_NONBLOCK, on); }

Result<> set_cloexec(int fd, bool on) { return set_flag(fd, F_GETFD, F_SETFD, FD_CLOEXEC, on); }

Result<> set_tcp_nodelay(int fd, bool on) {
    if (!is_tcp(fd)) return {};
    return set_int(fd, IPPROTO_TCP, TCP_NODELAY, on, "TCP_NODELAY");
}

Result<> set_keepalive(int fd, bool on, Keepalive probes) {
    CHECK_OK(set_int(fd, SOL_SOCKET, SO_KEEPALIVE, on, "SO_KEEPALIVE"));
    if (!on || !is_tcp(fd)) return {};
    const auto seconds = [](std::chrono::seconds s) { return static_cast<int>(std::min<int64_t>(s.count(), 32767)); };
    if (probes.idle.count() > 0) CHECK_OK(set_int(fd, IPPROTO_TCP, TCP_KEEPIDLE, seconds(probes.idle), "TCP_KEEPIDLE"));
    if (probes.interval.count() > 0) {
        CHECK_OK(set_int(fd, IPPROTO_TCP, TCP_KEEPINTVL, seconds(probes.interval), "TCP_KEEPINTVL"));
    }
    if (probes.count > 0) CHECK_OK(set_int(fd, IPPROTO_TCP, TCP_KEEPCNT, std::min(probes.count, 127), "TCP_KEEPCNT"));
    return {};
}

void set_buffer_sizes(int fd, int bytes) {
    ::setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    ::setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
}

std::string peer_name(int fd) {
    sockaddr_storage address{};
    socklen_t len = sizeof address;
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &len) != 0) return "unknown";
    if (address.ss_family != AF_UNIX) return address_text(address);
    ucred peer{};
    len = sizeof peer;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) != 0) return "unix";
    return fmt::format("unix:pid={},uid={}", peer.pid, peer.uid);
}

std::optional<PeerCredentials> peer_credentials(int fd) {
    if (get_int(fd, SOL_SOCKET, SO_DOMAIN) != AF_UNIX) return std::nullopt;
    ucred peer{};
    socklen_t len = sizeof peer;
    if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &len) != 0) return std::nullopt;
    return PeerCredentials{peer.pid, peer.uid, peer.gid};
}

std::string local_name(int fd) {
    sockaddr_storage address{};
    socklen_t len = sizeof address;
    if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &len) != 0) return "unknown";
    if (address.ss_family != AF_UNIX) return address_text(address);
    sockaddr_un un{};
    std::memcpy(&un, &address, sizeof un);
    const size_t header = offsetof(sockaddr_un, sun_path);
    if (len <= header) return "unix:";
    if (un.sun_path[0] == '\0') return fmt::format("unix:@{}", std::string_view(un.sun_path + 1, len - header - 1));
    return fmt::format("unix:{}", std::string_view(un.sun_path, ::strnlen(un.sun_path, sizeof un.sun_path)));
}

Result<uint16_t> local_port(int fd) {
    sockaddr_storage address{};
    socklen_t len = sizeof address;
    if (::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &len) != 0) {
        return fail_errno(errno, "file descriptor {}", fd);
    }
    // The port stands at the same place of both families.
    static_assert(offsetof(sockaddr_in, sin_port) == offsetof(sockaddr_in6, sin6_port));
    if (address.ss_family != AF_INET && address.ss_family != AF_INET6) {
        return fail(ErrorKind::kInvalid, "file descriptor {} is not an internet socket", fd);
    }
    sockaddr_in in;
    std::memcpy(&in, &address, sizeof in);
    return ntohs(in.sin_port);
}

Result<> check_listening_socket(int fd) {
    CHECK_OK(check_stream_socket(fd));
    if (get_int(fd, SOL_SOCKET, SO_ACCEPTCONN) != 1) {
        return fail(ErrorKind::kInvalid, "file descriptor {} is not a listening socket", fd);
    }
    return {};
}

Result<> check_connected_socket(int fd) {
    CHECK_OK(check_stream_socket(fd));
    sockaddr_storage address{};
    socklen_t len = sizeof address;
    if (::getpeername(fd, reinterpret_cast<sockaddr*>(&address), &len) != 0) {
        return fail(ErrorKind::kInvalid, "file descriptor {} is not a connected socket", fd);
    }
    return {};
}

SocketFile::SocketFile(std::string path) {
    struct stat st;
    if (path.empty() || ::lstat(path.c_str(), &st) != 0) return;
    path_ = std::move(path);
    device_ = st.st_dev;
    inode_ = st.st_ino;
}

SocketFile::SocketFile(SocketFile&& other) noexcept
    : path_(std::exchange(other.path_, {})), device_(other.device_), inode_(other.inode_) {}

SocketFile& SocketFile::operator=(SocketFile&& other) noexcept {
    if (this == &other) return *this;
    remove();
    path_ = std::exchange(other.path_, {});
    device_ = other.device_;
    inode_ = other.inode_;
    return *this;
}

void SocketFile::remove() {
    const std::string path = std::exchange(path_, {});
    struct stat st;
    if (path.empty() || ::lstat(path.c_str(), &st) != 0) return;
    // Somebody may have put another socket in its place meanwhile.
    if (st.st_dev != device_ || st.st_ino != inode_) return;
    if (::unlink(path.c_str()) != 0) log::warn("cannot remove socket '{}': {}", path, errno_text(errno));
}

}  // namespace gantry
