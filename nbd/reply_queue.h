// ReplyQueue: the bytes a connection owes its client, in order, gathered for sendmsg.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <vector>

#include "runtime/buffer.h"

namespace gantry::nbd {

/// Small replies are laid end to end in an arena (one iovec for a whole batch); larger data stays in its own Buffer and
/// is sent from there. In the steady state nothing is allocated. Own loop of its connection only.
class ReplyQueue {
  public:
    /// What reserve() can give at most.
    static constexpr size_t kArenaSize = 256u << 10;

    /// `length` contiguous bytes to write a reply into; it counts once commit() is called. Valid until the next call of
    /// any member.
    uint8_t* reserve(size_t length);
    /// The first `length` reserved bytes follow what is queued. 0 is fine.
    void commit(size_t length);
    /// Memory that a later append_owned() of the same turn keeps alive.
    void append_ref(const uint8_t* data, size_t length);
    /// `length` bytes at `data`, which lie in `owner` (or length is 0); `owner` is released when they are sent.
    void append_owned(Buffer owner, const uint8_t* data, size_t length);

    bool empty() const { return bytes_ == 0 && head_ == entries_.size(); }
    /// Not sent yet.
    size_t bytes() const { return bytes_; }
    /// Fills at most `max` iovecs from the front; how many.
    size_t gather(iovec* iov, size_t max) const;
    /// The first `length` bytes are sent.
    void consume(size_t length);
    /// Forgets everything.
    void clear();
    /// Gives the arena back while nothing is queued (idle connections hold none).
    void release_arena() {
        if (empty()) arena_.reset();
    }

  private:
    struct Entry {
        const uint8_t* data;
        size_t length;
        Buffer owner;
    };
    static constexpr size_t kNone = ~size_t{0};

    void drained();

    std::vector<Entry> entries_;
    size_t head_ = 0;
    size_t bytes_ = 0;
    Buffer arena_;
    size_t arena_used_ = 0;
    size_t arena_last_ = kNone;  // index of the newest entry inside the arena
};

}  // namespace gantry::nbd
