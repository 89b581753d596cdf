#include "nbd/reply_queue.h"

#include <algorithm>

#include "runtime/check.h"

namespace gantry::nbd {

uint8_t* ReplyQueue::reserve(size_t length) {
    CHECK(length <= kArenaSize, "a reply in the arena is bounded");
    if (!arena_) {
        arena_ = Buffer::alloc(kArenaSize);
        arena_used_ = 0;
    }
    if (length > kArenaSize - arena_used_) {
        // The full arena lives on with the newest entry that points into it.
        if (arena_last_ != kNone) {
            entries_[arena_last_].owner = std::move(arena_);
            arena_ = Buffer::alloc(kArenaSize);
            arena_last_ = kNone;
        }
        arena_used_ = 0;
    }
    return arena_.data() + arena_used_;
}

void ReplyQueue::commit(size_t length) {
    if (length == 0) return;
    const uint8_t* data = arena_.data() + arena_used_;
    arena_used_ += length;
    bytes_ += length;
    if (arena_last_ != kNone && arena_last_ + 1 == entries_.size()) {
        Entry& last = entries_.back();
        if (last.data + last.length == data) {
            last.length += length;
            return;
        }
    }
    entries_.push_back({data, length, Buffer()});
    arena_last_ = entries_.size() - 1;
}

void ReplyQueue::append_ref(const uint8_t* data, size_t length) {
    entries_.push_back({data, length, Buffer()});
    bytes_ += length;
}

void ReplyQueue::append_owned(Buffer owner, const uint8_t* data, size_t length) {
    entries_.push_back({data, length, std::move(owner)});
    bytes_ += length;
}

size_t ReplyQueue::gather(iovec* iov, size_t max) const {
    const size_t count = std::min(max, entries_.size() - head_);
    for (size_t i = 0; i < count; ++i) {
        const Entry& e = entries_[head_ + i];
        iov[i] = {const_cast<uint8_t*>(e.data), e.length};
    }
    return count;
}

void ReplyQueue::consume(size_t length) {
    CHECK(length <= bytes_, "more bytes sent than queued");
    bytes_ -= length;
    while (head_ < entries_.size() && entries_[head_].length <= length) {
        length -= entries_[head_].length;
        entries_[head_].owner.reset();
        ++head_;
    }
    if (head_ == entries_.size()) {
        drained();
        return;
    }
    entries_[head_].data += length;
    entries_[head_].length -= length;
    // A client that never lets the queue run dry must not make it grow for ever.
    if (head_ >= 256) {
        entries_.erase(entries_.begin(), entries_.begin() + static_cast<ptrdiff_t>(head_));
        if (arena_last_ != kNone) arena_last_ = arena_last_ < head_ ? kNone : arena_last_ - head_;
        head_ = 0;
    }
}

void ReplyQueue::clear() {
    bytes_ = 0;
    drained();
}

void ReplyQueue::drained() {
    entries_.clear();
    head_ = 0;
    arena_last_ = kNone;
    arena_used_ = 0;
}

}  // namespace gantry::nbd
