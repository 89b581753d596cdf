// IoVec: a non-owning scatter/gather list.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace gantry {

/// A view of memory ranges: `count` iovecs that together hold `bytes` bytes. Neither the array nor the memory is owned;
/// both stay valid until the operation that got it completes. Copy freely.
struct IoVec {
    const iovec* data = nullptr;
    uint32_t count = 0;
    size_t bytes = 0;

    IoVec() = default;
    IoVec(const iovec* d, uint32_t n, size_t total) : data(d), count(n), bytes(total) {}
    /// One range; `one` must outlive the view.
    explicit IoVec(const iovec& one) : data(&one), count(1), bytes(one.iov_len) {}
};

/// Owns the iovec array (not the memory) of a part of another list.
class IoVecSlice {
  public:
    /// The bytes [offset, offset + length) of `whole`; the range must lie inside it.
    IoVecSlice(const IoVec& whole, size_t offset, size_t length);
    IoVec view() const { return IoVec(heap_.empty() ? inline_ : heap_.data(), count_, bytes_); }

  private:
    static constexpr uint32_t kInline = 4;
    iovec inline_[kInline];
    std::vector<iovec> heap_;
    uint32_t count_ = 0;
    size_t bytes_ = 0;
};

/// Copies between a list, from byte `offset` on, and flat memory. The range must lie inside the list.
void copy_from_iovec(const IoVec& from, size_t offset, void* to, size_t length);
void copy_to_iovec(const IoVec& to, size_t offset, const void* from, size_t length);
/// memset over a part of the list.
void fill_iovec(const IoVec& to, size_t offset, size_t length, int byte = 0);
/// True when every byte of the list is zero.
bool iovec_is_zero(const IoVec& list);
bool memory_is_zero(const void* data, size_t length);

}  // namespace gantry
