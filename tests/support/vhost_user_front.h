// VhostFront: the front end of a vhost-user device for unit tests, on one thread with the device. Header only.

#pragma once

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "exports/vhost_user/message.h"
#include "tests/support/test_runtime.h"
#include "tests/support/virtio_driver.h"

namespace gantry::test {

using Bytes = std::vector<std::byte>;

/// The values one after another, as they are in memory.
template <class... T>
Bytes wire(const T&... values) {
    Bytes out;
    const auto put = [&](const auto& value) {
        const auto bytes = vhost_user::bytes_of(value);
        out.insert(out.end(), bytes.begin(), bytes.end());
    };
    (put(values), ...);
    return out;
}

inline UniqueFd make_eventfd() { return UniqueFd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)); }
/// What was added to an eventfd since the last look.
inline uint64_t drain_eventfd(const UniqueFd& fd) {
    uint64_t count = 0;
    return ::read(fd.get(), &count, sizeof count) == sizeof count ? count : 0;
}
inline void kick_eventfd(const UniqueFd& fd) {
    const uint64_t one = 1;
    if (::write(fd.get(), &one, sizeof one) != sizeof one) throw std::runtime_error("cannot write to an eventfd");
}

inline std::pair<UniqueFd, UniqueFd> make_sockets() {
    int fds[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) != 0)
        throw std::runtime_error("no socketpair");
    return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

class VhostFront {
  public:
    using Request = vhost_user::Request;
    struct Reply {
        vhost_user::Header header;
        Bytes payload;
        UniqueFd fd;
        template <class T>
        T as(size_t offset = 0) const {
            T value{};
            if (payload.size() < offset + sizeof value) throw std::runtime_error("the reply is too short");
            std::memcpy(&value, payload.data() + offset, sizeof value);
            return value;
        }
    };

    VhostFront(TestRuntime& runtime, UniqueFd socket) : runtime_(runtime), socket_(std::move(socket)) {}

    /// Bytes as they are, with descriptors at the first.
    void send_raw(std::span<const std::byte> bytes, const std::vector<int>& fds = {}) {
        alignas(cmsghdr) char control[CMSG_SPACE(16 * sizeof(int))] = {};
        iovec part{const_cast<std::byte*>(bytes.data()), bytes.size()};
        msghdr header{};
        header.msg_iov = &part;
        header.msg_iovlen = 1;
        if (!fds.empty()) {
            header.msg_control = control;
            header.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
            cmsghdr* c = CMSG_FIRSTHDR(&header);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
            std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
        }
        const ssize_t sent = ::sendmsg(socket_.get(), &header, MSG_NOSIGNAL);
        if (sent >= 0 && static_cast<size_t>(sent) != bytes.size()) throw std::runtime_error("a message is too long");
    }
    static Bytes message(uint32_t request, const Bytes& payload, uint32_t flags = vhost_user::kVersion) {
        Bytes out = wire(vhost_user::Header{request, flags, static_cast<uint32_t>(payload.size())});
        out.insert(out.end(), payload.begin(), payload.end());
        return out;
    }
    void send(Request request, const Bytes& payload = {}, const std::vector<int>& fds = {},
              uint32_t flags = vhost_user::kVersion) {
        send_raw(message(static_cast<uint32_t>(request), payload, flags), fds);
    }

    /// The next reply; nothing when the device has closed the connection.
    std::optional<Reply> reply() {
        Reply out;
        if (!receive(&out.header, sizeof out.header, &out.fd)) return std::nullopt;
        out.payload.resize(out.header.size);
        if (!out.payload.empty() && !receive(out.payload.data(), out.payload.size(), nullptr)) return std::nullopt;
        return out;
    }
    /// A request with an answer of its own.
    Reply ask(Request request, const Bytes& payload = {}) {
        send(request, payload);
        auto answer = reply();
        if (!answer) throw std::runtime_error("the device has closed the connection");
        if (answer->header.request != static_cast<uint32_t>(request) || answer->header.flags != 5)
            throw std::runtime_error("this is no reply to what was asked");
        return std::move(*answer);
    }
    /// Whether the device did what was asked of it (REPLY_ACK); nothing when it has closed the connection.
    std::optional<bool> tell(Request request, const Bytes& payload = {}, const std::vector<int>& fds = {}) {
        send(request, payload, fds, vhost_user::kVersion | vhost_user::kNeedReply);
        const auto answer = reply();
        if (!answer) return std::nullopt;
        return answer->as<uint64_t>() == 0;
    }
    bool closed() { return !reply(); }
    void close() { socket_.reset(); }
    int fd() const { return socket_.get(); }

  private:
    bool receive(void* to, size_t size, UniqueFd* fd) {
        auto* at = static_cast<char*>(to);
        for (size_t done = 0; done < size;) {
            alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
            iovec part{at + done, size - done};
            msghdr header{};
            header.msg_iov = &part;
            header.msg_iovlen = 1;
            header.msg_control = control;
            header.msg_controllen = sizeof control;
            const ssize_t got = ::recvmsg(socket_.get(), &header, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
            if (got < 0 && errno == EAGAIN) {
                const bool come = runtime_.run(wait_until([this] {
                    pollfd look{.fd = socket_.get(), .events = POLLIN, .revents = 0};
                    return ::poll(&look, 1, 0) > 0;
                }));
                if (!come) throw std::runtime_error("the device does not answer");
                continue;
            }
            if (got <= 0) return false;
            for (cmsghdr* c = CMSG_FIRSTHDR(&header); c; c = CMSG_NXTHDR(&header, c)) {
                if (c->cmsg_type != SCM_RIGHTS) continue;
                int passed;
                std::memcpy(&passed, CMSG_DATA(c), sizeof passed);
                UniqueFd owned(passed);
                if (fd) *fd = std::move(owned);
            }
            done += static_cast<size_t>(got);
        }
        return true;
    }

    TestRuntime& runtime_;
    UniqueFd socket_;
};

/// One ring of a guest, with the eventfds that belong to it.
struct VhostRing {
    VhostRing(Guest& guest, virtio::RingShape shape, uint32_t number)
        : index(number), driver(Driver::create(guest, shape)) {}

    vhost_user::VringAddress address(uint32_t flags = 0, uint64_t log = 0) const {
        return {.index = index,
                .flags = flags,
                .descriptors = driver->descriptors() + Guest::kUser,
                .used = driver->device_area() + Guest::kUser,
                .available = driver->driver_area() + Guest::kUser,
                .log = log};
    }

    uint32_t index;
    std::unique_ptr<Driver> driver;
    UniqueFd kick = make_eventfd(), call = make_eventfd(), error = make_eventfd();
};

/// One request of virtio-blk in guest memory.
struct VhostRequest {
    uint64_t header = 0, data = 0, status = 0;
    uint16_t id = 0;
};

/// Makes a request available: `length` bytes that the device reads (type 1) or writes.
inline VhostRequest submit_request(Guest& guest, VhostRing& ring, uint32_t type, uint64_t sector, uint32_t length,
                                   char fill = 0) {
    VhostRequest out;
    out.header = guest.alloc(16);
    out.status = guest.alloc(1);
    guest.write(out.header, wire(type, uint32_t{0}, sector));
    guest.write(out.status, std::string_view("\xff"));
    std::vector<Piece> chain{{out.header, 16, false}};
    if (length > 0) {
        out.data = guest.alloc(length);
        guest.write(out.data, std::string(length, fill));
        chain.push_back({out.data, length, type != 1});
    }
    chain.push_back({out.status, 1, true});
    const auto id = ring.driver->add(chain);
    if (!id) throw std::runtime_error("the ring is full");
    out.id = *id;
    ring.driver->kick();
    kick_eventfd(ring.kick);
    return out;
}

}  // namespace gantry::test
