#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

#include "bench/loadgen/connect.h"
#include "bench/loadgen/outcome.h"
#include "bench/vhost/options.h"
#include "bench/vhost/wire.h"

namespace gantry::bench::vhost {

/// Memory that is shared with the server: one region, at kGuestBase for descriptors and at data() for ring addresses.
class SharedMemory {
  public:
    static constexpr uint64_t kGuestBase = 1 << 20;

    static Outcome<SharedMemory> create(size_t bytes);
    SharedMemory(SharedMemory&& other) noexcept
        : fd_(std::move(other.fd_)), data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
    SharedMemory& operator=(SharedMemory&&) = delete;
    ~SharedMemory();

    int fd() const { return fd_.fd(); }
    std::byte* data() const { return data_; }
    size_t bytes() const { return bytes_; }
    uint64_t guest_address(const std::byte* at) const { return kGuestBase + static_cast<uint64_t>(at - data_); }

  private:
    SharedMemory(Socket fd, std::byte* data, size_t bytes) : fd_(std::move(fd)), data_(data), bytes_(bytes) {}

    Socket fd_;  // owns any descriptor
    std::byte* data_;
    size_t bytes_;
};

/// What the server said about its disk.
struct Disk {
    uint64_t bytes = 0;
    uint32_t block_bytes = 512;
    uint64_t features = 0;  // negotiated
};

/// Where a ring is and how it is told about.
struct QueueWiring {
    uint32_t size;
    uint32_t base;
    const std::byte* descriptors;
    const std::byte* available;
    const std::byte* used;
    int kick_fd;
    int call_fd;
};

/// The front end's side of a vhost-user connection, blocking, with options.stall_ns as the time limit of each message.
class FrontEnd {
  public:
    /// Connects and negotiates what `options` asks for; a feature that the server lacks is a failure.
    static Outcome<FrontEnd> connect(const Options& options);

    const Disk& disk() const { return disk_; }
    Outcome<> share(const SharedMemory& memory);
    Outcome<> start_queue(uint32_t index, const QueueWiring& wiring);
    /// Returns once the server has let go of the ring.
    Outcome<> stop_queue(uint32_t index);

  private:
    explicit FrontEnd(Socket socket) : socket_(std::move(socket)) {}

    Outcome<> negotiate(const Options& options);
    Outcome<> read_config();
    Outcome<> send(Request request, std::span<const std::byte> payload, int fd = -1);
    Outcome<> receive(Request request, std::span<std::byte> payload);
    Outcome<> receive_bytes(std::span<std::byte> to);
    Outcome<uint64_t> ask(Request request);

    template <typename T>
    Outcome<> tell(Request request, const T& payload, int fd = -1) {
        return send(request, std::as_bytes(std::span(&payload, 1)), fd);
    }

    Socket socket_;
    Disk disk_;
};

}  // namespace gantry::bench::vhost
