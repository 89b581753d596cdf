// FakeManager: the service manager's end of NOTIFY_SOCKET.

#pragma once

#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime/unique_fd.h"
#include "tests/support/temp_dir.h"

namespace gantry::test {

class FakeManager {
  public:
    explicit FakeManager(bool abstract = false) {
        fd_.reset(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
        sockaddr_un addr{};
        addr.sun_family = AF_UNIX;
        address_ = abstract ? "@gantry-test-" + std::to_string(::getpid()) + dir_.path() : dir_.file("notify");
        std::memcpy(addr.sun_path, address_.data(), address_.size());
        if (abstract) addr.sun_path[0] = '\0';
        const auto size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + address_.size());
        if (::bind(fd_.get(), reinterpret_cast<sockaddr*>(&addr), size) != 0) throw std::runtime_error("bind");
    }
    const std::string& address() const { return address_; }

    /// The next datagram; empty when none comes in time.
    std::string receive(int timeout_ms = 10000) {
        pollfd wait{fd_.get(), POLLIN, 0};
        if (::poll(&wait, 1, timeout_ms) != 1) return {};
        char buffer[4096];
        const ssize_t n = ::recv(fd_.get(), buffer, sizeof buffer, 0);
        return std::string(buffer, n > 0 ? static_cast<size_t>(n) : 0);
    }

    /// The same, with the descriptors that came along.
    std::string receive(std::vector<UniqueFd>& fds, int timeout_ms = 10000) {
        pollfd wait{fd_.get(), POLLIN, 0};
        if (::poll(&wait, 1, timeout_ms) != 1) return {};
        char buffer[4096];
        iovec part{buffer, sizeof buffer};
        alignas(cmsghdr) char control[CMSG_SPACE(253 * sizeof(int))];
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        const ssize_t n = ::recvmsg(fd_.get(), &message, MSG_CMSG_CLOEXEC);
        for (cmsghdr* c = CMSG_FIRSTHDR(&message); n >= 0 && c; c = CMSG_NXTHDR(&message, c)) {
            const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
            for (size_t i = 0; i < count; i++) {
                int fd;
                std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
                fds.emplace_back(fd);
            }
        }
        return std::string(buffer, n > 0 ? static_cast<size_t>(n) : 0);
    }

  private:
    TempDir dir_;
    UniqueFd fd_;
    std::string address_;
};

/// A variable for the length of a scope, whatever the tested code does to it.
class Environment {
  public:
    Environment(const char* name, const std::string& value) : name_(name) { ::setenv(name, value.c_str(), 1); }
    ~Environment() { ::unsetenv(name_); }
    Environment(const Environment&) = delete;

  private:
    const char* name_;
};

}  // namespace gantry::test
