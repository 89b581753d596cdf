#include "nbd/extent_list.h"

#include <algorithm>
#include <cstring>

#include "nbd/protocol.h"

namespace gantry::nbd {

bool ExtentList::add(uint64_t length, uint32_t flags) {
    const uint64_t longest = wide_ ? UINT64_MAX : kMaxExtentLength;
    if (count_ && last_flags_ == flags && last_length_ < longest) {
        const uint64_t more = std::min(length, longest - last_length_);
        put(count_ - 1, last_length_ + more, flags);
        length -= more;
    }
    while (length != 0) {
        if (count_ == max_) return false;
        const uint64_t part = std::min(length, longest);
        put(count_++, part, flags);
        length -= part;
    }
    return true;
}

void ExtentList::put(uint32_t index, uint64_t length, uint32_t flags) {
    constexpr size_t kFirstSize = 4096;
    const size_t at = index * descriptor();
    if (memory_.size() < at + descriptor()) {
        Buffer bigger = Buffer::alloc(std::max(kFirstSize, memory_.size() * 2));
        if (at) std::memcpy(bigger.data(), memory_.data(), at);
        memory_ = std::move(bigger);
    }
    uint8_t* p = memory_.data() + at;
    if (wide_) {
        store_big(store_big(p, length), uint64_t{flags});
    } else {
        store_big(store_big(p, static_cast<uint32_t>(length)), flags);
    }
    last_length_ = length;
    last_flags_ = flags;
}

}  // namespace gantry::nbd
