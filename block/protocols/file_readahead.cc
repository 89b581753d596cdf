#include "block/protocols/file_readahead.h"

#include <algorithm>

namespace gantry::block {

std::optional<FileReadahead::Window> FileReadahead::take(uint64_t offset, uint64_t length, uint64_t file_size) {
    const std::unique_lock lock(mutex_, std::try_to_lock);
    if (!lock) return std::nullopt;  // somebody else is at it
    const uint64_t end = offset + length;
    const uint64_t trigger = trigger_.load(std::memory_order_relaxed);
    uint64_t begin, size;
    if (trigger != kIdle && end > trigger && offset < end_) {
        begin = std::max(end_, end);
        size = std::min(window_ * 2, kMaxWindow);
    } else {
        // Several requests in flight arrive nearly in order: a little late or early still counts as the next one.
        const bool sequential = offset <= expected_ + length && offset + kFirstWindow >= expected_;
        expected_ = end;
        if (!sequential || expected_ == kIdle) return std::nullopt;
        begin = end;
        size = std::max(kFirstWindow, std::min(length * 2, kMaxWindow));
    }
    if (begin >= file_size) {
        trigger_.store(kIdle, std::memory_order_relaxed);
        return std::nullopt;
    }
    size = std::min(size, file_size - begin);
    window_ = size;
    end_ = begin + size;
    expected_ = end_;
    trigger_.store(begin, std::memory_order_relaxed);
    return Window{begin, size};
}

void FileReadahead::reset() {
    const std::lock_guard lock(mutex_);
    trigger_.store(kIdle, std::memory_order_relaxed);
    expected_ = kIdle;
}

}  // namespace gantry::block
