#include "systemd/notify.h"

#include <fmt/format.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <optional>

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
    sockaddr_un addr{};
    addr.sun_family = AF_UNIX;
    std::memcpy(addr.sun_path, socket_path_.data(), socket_path_.size());
    if (addr.sun_path[0] == '@') addr.sun_path[0] = '\0';
    auto length = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + socket_path_.size());
    ssize_t n = ::sendto(fd.get(), message.data(), message.size(), MSG_NOSIGNAL | MSG_DONTWAIT,
                         reinterpret_cast<sockaddr*>(&addr), length);
    if (n != static_cast<ssize_t>(message.size())) {
        log::debug("service manager: notification not delivered: {}", std::strerror(errno));
        return false;
    }
    return true;
}

void Notifier::ready(std::string_view status) { send(fmt::format("READY=1\nSTATUS={}\n", status)); }
void Notifier::stopping() { send("STOPPING=1\nSTATUS=Stopping\n"); }
void Notifier::status(std::string_view text) { send(fmt::format("STATUS={}\n", text)); }
void Notifier::watchdog() { send("WATCHDOG=1\n"); }
void Notifier::error(int errno_value) { send(fmt::format("ERRNO={}\n", errno_value)); }

}  // namespace gantry::systemd
