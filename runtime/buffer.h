// Buffer: owned, page-aligned data memory, recycled per thread.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <span>
#include <utility>

#include "runtime/error.h"

namespace gantry {

/// Owned memory, aligned to 4096, fit for O_DIRECT. From a per-thread cache of power-of-two size classes (4 KiB to 32
/// MiB; the cache is bounded in bytes; memory freed by another thread is simply returned there). Contents are
/// undefined.
class Buffer {
  public:
    Buffer() = default;
    /// Never fails for sizes our own limits bound (aborts on exhaustion). `size` may be 0.
    static Buffer alloc(size_t size);
    /// For sizes that come from outside after their limit check: kNoMemory instead of an abort.
    static Result<Buffer> try_alloc(size_t size);

    Buffer(Buffer&& o) noexcept
        : data_(std::exchange(o.data_, nullptr)),
          size_(std::exchange(o.size_, 0)),
          class_(std::exchange(o.class_, 0)) {}
    Buffer& operator=(Buffer&& o) noexcept {
        if (this != &o) {
            reset();
            data_ = std::exchange(o.data_, nullptr);
            size_ = std::exchange(o.size_, 0);
            class_ = std::exchange(o.class_, 0);
        }
        return *this;
    }
    ~Buffer() { reset(); }

    uint8_t* data() { return data_; }
    const uint8_t* data() const { return data_; }
    size_t size() const { return size_; }
    std::span<uint8_t> span() { return {data_, size_}; }
    explicit operator bool() const { return data_ != nullptr; }
    iovec iov(size_t offset, size_t length) { return {data_ + offset, length}; }
    iovec iov() { return {data_, size_}; }
    void reset();

  private:
    uint8_t* data_ = nullptr;
    size_t size_ = 0;
    uint32_t class_ = 0;
};

/// Gives the calling thread's cached memory back to the system (idle loops call it).
void buffer_cache_trim();

}  // namespace gantry
