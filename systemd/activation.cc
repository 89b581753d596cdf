#include "systemd/activation.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/socket.h>
#include <unistd.h>

#include <charconv>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "runtime/log.h"

namespace gantry::systemd {

namespace {

constexpr int kFirstFd = 3;
constexpr int kMaxFds = 1024;
constexpr size_t kMaxName = 255;

bool parse_int(const char* text, int& out) {
    if (!text) return false;
    auto [end, error] = std::from_chars(text, text + std::strlen(text), out);
    return error == std::errc() && *end == '\0';
}

bool valid_name(std::string_view name) {
    if (name.empty() || name.size() > kMaxName) return false;
    for (char c : name) {
        if (c < 0x20 || c >= 0x7f || c == ':') return false;
    }
    return true;
}

/// Empty: fine; otherwise what is wrong with it.
std::string_view why_not_listening(int fd) {
    int type = 0, listening = 0;
    socklen_t size = sizeof type;
    if (::getsockopt(fd, SOL_SOCKET, SO_TYPE, &type, &size) != 0) return "not a socket";
    if (type != SOCK_STREAM) return "not a stream socket";
    size = sizeof listening;
    if (::getsockopt(fd, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0 || !listening) return "not listening";
    return {};
}

}  // namespace

ActivationSockets ActivationSockets::from_environment() {
    ActivationSockets result;
    int pid = 0, count = 0;
    bool ours = parse_int(::getenv("LISTEN_PID"), pid) && pid == ::getpid() && parse_int(::getenv("LISTEN_FDS"), count);
    const char* raw_names = ::getenv("LISTEN_FDNAMES");
    std::string names = raw_names ? raw_names : "";
    ::unsetenv("LISTEN_PID");
    ::unsetenv("LISTEN_FDS");
    ::unsetenv("LISTEN_FDNAMES");
    if (!ours || count <= 0 || count > kMaxFds) return result;

    size_t at = 0;
    for (int i = 0; i < count; i++) {
        std::string name;
        if (at <= names.size()) {
            size_t end = std::min(names.find(':', at), names.size());
            name = names.substr(at, end - at);
            at = end + 1;
        }
        if (!valid_name(name)) name = "unknown";
        UniqueFd fd(kFirstFd + i);
        if (::fcntl(fd.get(), F_SETFD, FD_CLOEXEC) != 0) {
            log::warn("socket activation: descriptor {} ('{}') is not open", kFirstFd + i, name);
            (void)fd.release();
            continue;
        }
        if (!why_not_listening(fd.get()).empty()) {
            result.others_.push_back({std::move(name), std::move(fd)});
            continue;
        }
        ::fcntl(fd.get(), F_SETFL, ::fcntl(fd.get(), F_GETFL) | O_NONBLOCK);
        result.sockets_.push_back({std::move(name), std::move(fd)});
    }
    return result;
}

std::vector<ActivationSockets::Passed> ActivationSockets::take_others(bool (*ours)(std::string_view name)) {
    std::vector<Passed> taken;
    for (Passed& other : std::exchange(others_, {})) {
        if (ours(other.name)) {
            taken.push_back(std::move(other));
        } else {
            log::warn("socket activation: descriptor {} ('{}') is {}, closing it", other.fd.get(), other.name,
                      why_not_listening(other.fd.get()));
        }
    }
    return taken;
}

Result<UniqueFd> ActivationSockets::duplicate(std::string_view name) const {
    for (const Passed& s : sockets_) {
        if (s.name != name) continue;
        UniqueFd copy(::fcntl(s.fd.get(), F_DUPFD_CLOEXEC, kFirstFd));
        if (!copy) return fail_errno(errno, "Duplicating the passed socket '{}'", name);
        return copy;
    }
    if (sockets_.empty()) {
        return fail(ErrorKind::kNotFound,
                    "File descriptor named '{}' has not been found; the service manager passed no sockets", name);
    }
    return fail(ErrorKind::kNotFound, "File descriptor named '{}' has not been found; passed sockets are: {}", name,
                fmt::join(names(), ", "));
}

std::vector<std::string> ActivationSockets::names() const {
    std::vector<std::string> out;
    for (const Passed& s : sockets_) out.push_back(s.name);
    return out;
}

bool ActivationSockets::has(std::string_view name) const {
    for (const Passed& s : sockets_) {
        if (s.name == name) return true;
    }
    return false;
}

}  // namespace gantry::systemd
