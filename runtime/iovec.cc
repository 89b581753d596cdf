#include "runtime/iovec.h"

#include <algorithm>

#include "runtime/check.h"

namespace gantry {

namespace {

/// Calls fn(pointer, length) for each piece of [offset, offset + length) of `list`.
template <class Fn>
void for_each_piece(const IoVec& list, size_t offset, size_t length, Fn fn) {
    CHECK(offset <= list.bytes && length <= list.bytes - offset, "a range lies inside its iovec list");
    for (uint32_t i = 0; length > 0; ++i) {
        const iovec& v = list.data[i];
        if (offset >= v.iov_len) {
            offset -= v.iov_len;
            continue;
        }
        const size_t n = std::min(length, v.iov_len - offset);
        fn(static_cast<uint8_t*>(v.iov_base) + offset, n);
        offset = 0;
        length -= n;
    }
}

}  // namespace

IoVecSlice::IoVecSlice(const IoVec& whole, size_t offset, size_t length) : bytes_(length) {
    for_each_piece(whole, offset, length, [this](uint8_t* p, size_t n) {
        if (count_ < kInline) {
            inline_[count_] = {p, n};
        } else {
            if (heap_.empty()) heap_.assign(inline_, inline_ + kInline);
            heap_.push_back({p, n});
        }
        ++count_;
    });
}

void copy_from_iovec(const IoVec& from, size_t offset, void* to, size_t length) {
    auto* out = static_cast<uint8_t*>(to);
    for_each_piece(from, offset, length, [&out](const uint8_t* p, size_t n) {
        std::memcpy(out, p, n);
        out += n;
    });
}

void copy_to_iovec(const IoVec& to, size_t offset, const void* from, size_t length) {
    auto* in = static_cast<const uint8_t*>(from);
    for_each_piece(to, offset, length, [&in](uint8_t* p, size_t n) {
        std::memcpy(p, in, n);
        in += n;
    });
}

void fill_iovec(const IoVec& to, size_t offset, size_t length, int byte) {
    for_each_piece(to, offset, length, [byte](uint8_t* p, size_t n) { std::memset(p, byte, n); });
}

bool iovec_is_zero(const IoVec& list) {
    for (uint32_t i = 0; i < list.count; ++i) {
        if (!memory_is_zero(list.data[i].iov_base, list.data[i].iov_len)) return false;
    }
    return true;
}

bool memory_is_zero(const void* data, size_t length) {
    auto* p = static_cast<const uint8_t*>(data);
    constexpr size_t kHead = 32;
    if (length < kHead) return std::all_of(p, p + length, [](uint8_t b) { return b == 0; });
    const auto word = [p](size_t at) {
        uint64_t w;
        std::memcpy(&w, p + at, sizeof w);
        return w;
    };
    // Most data that is not zero shows it at one of these places.
    if ((word(0) | word(8) | word(16) | word(24) | word(length - 8) | word((length - 8) / 2)) != 0) return false;
    // The head is zero; each byte equal to the one kHead before it makes the rest zero too, at the speed of memcmp.
    return std::memcmp(p, p + kHead, length - kHead) == 0;
}

}  // namespace gantry
