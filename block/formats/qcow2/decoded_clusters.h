// DecodedClusters: the compressed clusters decoded last, so that small reads of one cluster decode it once.

#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <optional>
#include <vector>

#include "runtime/buffer.h"
#include "runtime/error.h"
#include "runtime/sync.h"

namespace gantry::block::qcow2 {

/// Any loop; the lock is held for a search of at most `capacity` pointers.
class DecodedClusters {
  public:
    /// One cluster. Who got it with `mine` set decodes and calls finish(); the others wait for `done`, then look at
    /// `error` and read `data`, which does not change any more.
    struct Entry {
        explicit Entry(uint64_t h) : host_offset(h) {}
        const uint64_t host_offset;
        AsyncEvent done;
        Buffer data;
        std::optional<Error> error;
    };

    explicit DecodedClusters(size_t capacity) : capacity_(capacity) {}

    /// The entry of the blob at `host_offset`, made when it is not there (`mine` is set then). The oldest makes room.
    std::shared_ptr<Entry> find_or_begin(uint64_t host_offset, bool& mine);
    /// Wakes the waiters; a failed entry is forgotten, so that the next read tries again.
    void finish(const std::shared_ptr<Entry>& entry);
    /// Another blob takes that place.
    void forget(uint64_t host_offset);
    void forget_all();
    /// Drops what nobody used since the call before.
    void clean();
    size_t size() const;

  private:
    struct Slot {
        std::shared_ptr<Entry> entry;
        uint64_t last_use = 0;
    };
    const size_t capacity_;
    mutable std::mutex mutex_;
    std::vector<Slot> slots_;
    uint64_t uses_ = 0;
    uint64_t uses_at_cleaning_ = 0;
};

}  // namespace gantry::block::qcow2
