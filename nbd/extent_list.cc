#include "nbd/extent_list.h"

#include <algorithm>
#include <cstring>

#include "nbd/protocol.h"

namespace gantry::nbd {

bool ExtentList::add(uint64_t length, uint32_t flags) {
    if (count_ && last_flags_ == flags && last_length_ < kMaxExtentLength) {
        const uint64_t more = std::min<uint64_t>(length, kMaxExtentLength - last_length_);
        put(count_ - 1, last_length_ + static_cast<uint32_t>(more), flags);
        length -= more;
    }
    while (length != 0) {
        if (count_ == max_) return false;
        const uint64_t part = std::min<uint64_t>(length, kMaxExtentLength);
        put(count_++, static_cast<uint32_t>(part), flags);
        length -= part;
    }
    return true;
}

void ExtentList::put(uint32_t index, uint32_t length, uint32_t flags) {
    constexpr size_t kFirstSize = 4096;
    const size_t need = (size_t{index} + 1) * 8;
    if (memory_.size() < need) {
        Buffer bigger = Buffer::alloc(std::max(kFirstSize, memory_.size() * 2));
        if (index) std::memcpy(bigger.data(), memory_.data(), size_t{index} * 8);
        memory_ = std::move(bigger);
    }
    uint8_t* p = memory_.data() + size_t{index} * 8;
    store_big(store_big(p, length), flags);
    last_length_ = length;
    last_flags_ = flags;
}

}  // namespace gantry::nbd
