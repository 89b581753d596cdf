#include "bench/loadgen/connect.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <memory>
#include <span>
#include <string>

#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "bench/loadgen/wire.h"

namespace gantry::bench {

namespace {

constexpr uint32_t kMaxOptionReplyBytes = 64 << 10;

std::string system_error(const std::string& what) { return what + ": " + std::strerror(errno); }

void set_timeout(int fd, int which, int milliseconds) {
    const timeval value{milliseconds / 1000, (milliseconds % 1000) * 1000};
    setsockopt(fd, SOL_SOCKET, which, &value, sizeof value);
}

void set_buffers(int fd, const Options& options) {
    if (options.socket_buffer_bytes == 0) return;
    const int bytes = static_cast<int>(options.socket_buffer_bytes);
    setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &bytes, sizeof bytes);
    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &bytes, sizeof bytes);
}

/// SO_SNDTIMEO bounds connect(2) too.
void prepare(int fd, const Options& options) {
    set_buffers(fd, options);
    set_timeout(fd, SO_SNDTIMEO, static_cast<int>(options.stall_ns / 1'000'000));
    set_timeout(fd, SO_RCVTIMEO, kReceiveTimeoutMs);
}

Outcome<Socket> connect_unix(const Options& options) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (options.unix_path.size() >= sizeof address.sun_path) return failure("--unix: the path is too long");
    std::memcpy(address.sun_path, options.unix_path.data(), options.unix_path.size());
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (socket.fd() < 0) return failure(system_error("creating a socket"));
    prepare(socket.fd(), options);
    if (::connect(socket.fd(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0) {
        return failure(system_error("connecting to " + options.unix_path));
    }
    return socket;
}

Outcome<Socket> connect_tcp(const Options& options) {
    addrinfo hints{};
    hints.ai_socktype = SOCK_STREAM;
    addrinfo* list = nullptr;
    const int code = getaddrinfo(options.tcp_host.c_str(), options.tcp_port.c_str(), &hints, &list);
    if (code != 0) return failure("resolving " + options.tcp_host + ": " + gai_strerror(code));
    const std::unique_ptr<addrinfo, decltype(&freeaddrinfo)> owner(list, freeaddrinfo);
    std::string error = "no address";
    for (const addrinfo* one = list; one; one = one->ai_next) {
        Socket socket(::socket(one->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
        if (socket.fd() < 0) continue;
        prepare(socket.fd(), options);
        const int on = 1;
        setsockopt(socket.fd(), IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
        if (::connect(socket.fd(), one->ai_addr, one->ai_addrlen) == 0) return socket;
        error = std::strerror(errno);
    }
    return failure("connecting to " + options.tcp_host + ":" + options.tcp_port + ": " + error);
}

/// The negotiation on one socket. The server never sends more than we asked for, so that buffered
/// reading cannot swallow bytes of the transmission phase.
class Handshake {
  public:
    Handshake(int fd, const Options& options) : fd_(fd), options_(options), deadline_(now_ns() + options.stall_ns) {}

    Outcome<Export> run() {
        BENCH_CHECK(greet());
        if (options_.structured) BENCH_CHECK(negotiate_structured());
        BENCH_CHECK(go());
        return info_;
    }

  private:
    Outcome<std::span<const uint8_t>> take(size_t count) {
        while (end_ - start_ < count) {
            if (start_ > 0) {
                std::memmove(buffer_, buffer_ + start_, end_ - start_);
                end_ -= start_;
                start_ = 0;
            }
            const ssize_t got = ::recv(fd_, buffer_ + end_, sizeof buffer_ - end_, 0);
            if (got == 0) return failure("negotiating: the server closed the connection");
            if (got > 0) {
                end_ += static_cast<size_t>(got);
            } else if (errno != EAGAIN && errno != EINTR) {
                return failure(system_error("negotiating"));
            }
            if (end_ - start_ < count && now_ns() > deadline_)
                return failure("negotiating: the server does not answer");
        }
        start_ += count;
        return std::span<const uint8_t>(buffer_ + start_ - count, count);
    }

    Outcome<> put(std::span<const uint8_t> bytes) {
        while (!bytes.empty()) {
            const ssize_t sent = ::send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
            if (sent < 0 && errno == EINTR) continue;
            if (sent < 0) return failure(system_error("negotiating"));
            bytes = bytes.subspan(static_cast<size_t>(sent));
        }
        return {};
    }

    Outcome<> greet() {
        auto greeting = take(18);
        if (!greeting) return failure(std::move(greeting.error()));
        const uint8_t* p = greeting->data();
        if (load_be<uint64_t>(p) != kGreetingMagic || load_be<uint64_t>(p + 8) != kOptionMagic) {
            return failure("negotiating: this is not a newstyle NBD server");
        }
        const auto flags = load_be<uint16_t>(p + 16);
        if (!(flags & kFlagFixedNewstyle)) return failure("negotiating: the server knows no fixed newstyle");
        uint8_t answer[4];
        store_be(answer, static_cast<uint32_t>(flags & (kFlagFixedNewstyle | kFlagNoZeroes)));
        return put(answer);
    }

    Outcome<> put_option(uint32_t option, std::span<const uint8_t> payload) {
        uint8_t message[16 + 4096 + 16];
        uint8_t* p = store_be(message, kOptionMagic);
        p = store_be(p, option);
        p = store_be(p, static_cast<uint32_t>(payload.size()));
        if (!payload.empty()) std::memcpy(p, payload.data(), payload.size());
        return put({message, 16 + payload.size()});
    }

    struct Reply {
        uint32_t type;
        std::span<const uint8_t> data;
    };

    Outcome<Reply> take_reply(uint32_t option) {
        auto header = take(20);
        if (!header) return failure(std::move(header.error()));
        const uint8_t* p = header->data();
        const auto type = load_be<uint32_t>(p + 12);
        const auto length = load_be<uint32_t>(p + 16);
        if (load_be<uint64_t>(p) != kOptionReplyMagic || load_be<uint32_t>(p + 8) != option) {
            return failure("negotiating: the server sent a reply that belongs to no option of ours");
        }
        if (length > kMaxOptionReplyBytes) return failure("negotiating: the server sent an absurdly long reply");
        auto data = take(length);
        if (!data) return failure(std::move(data.error()));
        return Reply{type, *data};
    }

    static std::string refusal(const char* what, const Reply& reply) {
        char code[16];
        std::snprintf(code, sizeof code, "%#x", reply.type);
        return std::string("negotiating: the server refused ") + what + " (" + code +
               "): " + std::string(reinterpret_cast<const char*>(reply.data.data()), reply.data.size());
    }

    Outcome<> negotiate_structured() {
        BENCH_CHECK(put_option(kOptionStructuredReply, {}));
        auto reply = take_reply(kOptionStructuredReply);
        if (!reply) return failure(std::move(reply.error()));
        if (reply->type != kReplyAck) return failure(refusal("structured replies", *reply));
        info_.structured = true;
        return {};
    }

    Outcome<> go() {
        uint8_t payload[4 + 4096 + 4];
        const std::string& name = options_.export_name;
        uint8_t* p = store_be(payload, static_cast<uint32_t>(name.size()));
        std::memcpy(p, name.data(), name.size());
        p = store_be(p + name.size(), uint16_t{1});
        p = store_be(p, kInfoBlockSize);
        BENCH_CHECK(put_option(kOptionGo, {payload, static_cast<size_t>(p - payload)}));
        bool described = false;
        while (true) {
            auto reply = take_reply(kOptionGo);
            if (!reply) return failure(std::move(reply.error()));
            if (reply->type == kReplyAck) break;
            if (reply->type & kReplyErrorBit) return failure(refusal(("export '" + name + "'").c_str(), *reply));
            if (reply->type == kReplyInfo) described |= read_info(reply->data);
        }
        if (!described) return failure("negotiating: the server did not say how large the export is");
        return {};
    }

    /// True when `data` was NBD_INFO_EXPORT.
    bool read_info(std::span<const uint8_t> data) {
        if (data.size() < 2) return false;
        const auto type = load_be<uint16_t>(data.data());
        if (type == kInfoExport && data.size() >= 12) {
            info_.size_bytes = load_be<uint64_t>(data.data() + 2);
            info_.flags = load_be<uint16_t>(data.data() + 10);
            return true;
        }
        if (type == kInfoBlockSize && data.size() >= 14) {
            info_.minimum_bytes = load_be<uint32_t>(data.data() + 2);
            info_.maximum_bytes = load_be<uint32_t>(data.data() + 10);
        }
        return false;
    }

    int fd_;
    const Options& options_;
    int64_t deadline_;
    Export info_;
    size_t start_ = 0;
    size_t end_ = 0;
    uint8_t buffer_[kMaxOptionReplyBytes + 64];
};

}  // namespace

Socket::~Socket() {
    if (fd_ >= 0) ::close(fd_);
}

int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1'000'000'000 + now.tv_nsec;
}

Outcome<Connection> open_connection(const Options& options) {
    auto socket = options.unix_path.empty() ? connect_tcp(options) : connect_unix(options);
    if (!socket) return failure(std::move(socket.error()));
    auto info = Handshake(socket->fd(), options).run();
    if (!info) return failure(std::move(info.error()));
    return Connection{std::move(*socket), *info};
}

void send_disconnect(const Socket& socket) {
    uint8_t request[kRequestBytes];
    encode_request(request, kCommandDisconnect, 0, 0, 0);
    [[maybe_unused]] const ssize_t sent = ::send(socket.fd(), request, sizeof request, MSG_NOSIGNAL | MSG_DONTWAIT);
}

}  // namespace gantry::bench
