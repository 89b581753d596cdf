#pragma once

#include <cstdint>
#include <utility>

#include "bench/loadgen/options.h"
#include "bench/loadgen/outcome.h"

namespace gantry::bench {

/// Owns one socket.
class Socket {
  public:
    explicit Socket(int fd = -1) : fd_(fd) {}
    Socket(Socket&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    Socket& operator=(Socket&& other) noexcept {
        std::swap(fd_, other.fd_);
        return *this;
    }
    ~Socket();

    int fd() const { return fd_; }

  private:
    int fd_;
};

/// What the server said about the export.
struct Export {
    uint64_t size_bytes = 0;
    uint16_t flags = 0;
    uint32_t minimum_bytes = 1;
    uint32_t maximum_bytes = 32u << 20;
    bool structured = false;
};

struct Connection {
    Socket socket;
    Export info;
};

/// Connects and negotiates until transmission (fixed newstyle, NBD_OPT_GO). Takes at most options.stall_ns.
/// The socket is a blocking one whose receive timeout is kReceiveTimeoutMs.
Outcome<Connection> open_connection(const Options& options);

/// Says good-bye (NBD_CMD_DISC), as far as that goes without waiting.
void send_disconnect(const Socket& socket);

/// How long a blocking recv sleeps before the caller may look at the clock.
inline constexpr int kReceiveTimeoutMs = 100;

/// CLOCK_MONOTONIC in nanoseconds.
int64_t now_ns();

}  // namespace gantry::bench
