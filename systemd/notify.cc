#include "systemd/notify.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <vector>

#include "runtime/log.h"
#include "runtime/unique_fd.h"

namespace gantry::systemd {

namespace {

std::optional<uint64_t> number_from_environment(const char* name) {
    const char* text = ::getenv(name);
    if (!text) return std::nullopt;
    uint64_t value = 0;
    auto [end, error] = std::from_chars(text, text + std::strlen(text), value);
    if (error != std::errc() || *end != '\0') return std::nullopt;
    return value;
}

struct Address {
    sockaddr_un name{};
    socklen_t size = 0;
    explicit Address(const std::string& path) {
        name.sun_family = AF_UNIX;
        std::memcpy(name.sun_path, path.data(), path.size());
        if (name.sun_path[0] == '@') name.sun_path[0] = '\0';
        size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + path.size());
    }
};

constexpr timeval kPatience{.tv_sec = 5, .tv_usec = 0};

}  // namespace

Notifier Notifier::from_environment() {
    Notifier n;
    const char* path = ::getenv("NOTIFY_SOCKET");
    // A path or "@name" in the abstract name space; anything else (vsock) belongs to managers we do not run under.
    if (path && (path[0] == '/' || path[0] == '@') && std::strlen(path) < sizeof(sockaddr_un{}.sun_path))
        n.socket_path_ = path;
    auto interval = number_from_environment("WATCHDOG_USEC");
    auto pid = number_from_environment("WATCHDOG_PID");
    if (interval && *interval > 0 && (!pid || *pid == static_cast<uint64_t>(::getpid()))) {
        n.watchdog_ = std::chrono::microseconds(*interval);
    }
    ::unsetenv("NOTIFY_SOCKET");
    ::unsetenv("WATCHDOG_USEC");
    ::unsetenv("WATCHDOG_PID");
    return n;
}

bool Notifier::send(std::string_view message) {
    if (!active()) return false;
    UniqueFd fd(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (!fd) return false;
    Address to(socket_path_);
    ssize_t n = ::sendto(fd.get(), message.data(), message.size(), MSG_NOSIGNAL | MSG_DONTWAIT,
                         reinterpret_cast<sockaddr*>(&to.name), to.size);
    if (n != static_cast<ssize_t>(message.size())) {
        log::debug("service manager: notification not delivered: {}", std::strerror(errno));
        return false;
    }
    return true;
}

Result<> Notifier::send_descriptors(std::string_view message, std::span<const int> fds) {
    if (!active()) return fail(ErrorKind::kUnsupported, "no service manager has started this process");
    if (fds.size() > kMaxFds) {
        return fail(ErrorKind::kTooLarge, "{} descriptors are more than the {} of one message", fds.size(), kMaxFds);
    }
    UniqueFd socket(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    if (!socket) return fail_errno(errno, "Telling the service manager");
    ::setsockopt(socket.get(), SOL_SOCKET, SO_SNDTIMEO, &kPatience, sizeof kPatience);
    Address to(socket_path_);
    iovec text{const_cast<char*>(message.data()), message.size()};
    std::vector<char> control(CMSG_SPACE(fds.size_bytes()));
    msghdr header{};
    header.msg_name = &to.name;
    header.msg_namelen = to.size;
    header.msg_iov = &text;
    header.msg_iovlen = 1;
    if (!fds.empty()) {
        header.msg_control = control.data();
        header.msg_controllen = control.size();
        cmsghdr* rights = CMSG_FIRSTHDR(&header);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(fds.size_bytes());
        std::memcpy(CMSG_DATA(rights), fds.data(), fds.size_bytes());
    }
    ssize_t n;
    do {
        n = ::sendmsg(socket.get(), &header, MSG_NOSIGNAL);
    } while (n < 0 && errno == EINTR);
    if (n != static_cast<ssize_t>(message.size())) {
        return fail_errno(n < 0 ? errno : EIO, "Telling the service manager at '{}'", socket_path_);
    }
    return {};
}

void Notifier::ready(std::string_view status) { send(fmt::format("READY=1\nSTATUS={}\n", status)); }
void Notifier::stopping() { send("STOPPING=1\nSTATUS=Stopping\n"); }
void Notifier::status(std::string_view text) { send(fmt::format("STATUS={}\n", text)); }
void Notifier::watchdog() { send("WATCHDOG=1\n"); }
void Notifier::error(int errno_value) { send(fmt::format("ERRNO={}\n", errno_value)); }

}  // namespace gantry::systemd
