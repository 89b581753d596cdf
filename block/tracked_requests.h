// TrackedRequests: which writing requests of a node run, so that overlapping ones exclude each other where they must.

#pragma once

#include <coroutine>
#include <cstdint>
#include <mutex>

#include "runtime/sync.h"

namespace gantry::block {

/// Requests in order of arrival. A serialising request (a read-modify-write, or one flagged so) runs alone on its
/// range: it waits for every earlier overlapping request, and every later overlapping request waits for it. Waits only
/// ever point to earlier requests, so that no cycle can form, and the order is first come, first served. Any loop. Lock
/// order: `mutex_` is a leaf lock, held for the list only.
class TrackedRequests {
  public:
    /// One request; lives in its coroutine's frame from construction to destruction.
    class Entry {
      public:
        Entry(TrackedRequests& owner, uint64_t begin, uint64_t end, bool serialising);
        ~Entry();
        Entry(const Entry&) = delete;
        Entry& operator=(const Entry&) = delete;

        /// True while an earlier request excludes this one: `while (entry.blocked()) co_await entry.turn();`
        bool blocked() const;

        /// Gives up what lies at `end` and above, or everything; those who wait look again.
        void shrink(uint64_t end);
        void release() { shrink(0); }

        struct Awaiter {
            Entry& entry;
            detail::Waiter waiter;
            bool await_ready() const noexcept { return false; }
            bool await_suspend(std::coroutine_handle<> h);
            void await_resume() const noexcept {}
        };
        /// Returns after (at least) one request that blocks this one has ended.
        Awaiter turn() { return Awaiter{*this, {}}; }

      private:
        friend class TrackedRequests;
        TrackedRequests& owner_;
        uint64_t begin_;
        uint64_t end_;
        bool serialising_;
        Entry* prev_ = nullptr;
        Entry* next_ = nullptr;
        detail::WaiterQueue waiters_;
    };

    TrackedRequests() = default;
    TrackedRequests(const TrackedRequests&) = delete;
    ~TrackedRequests();

  private:
    Entry* blocker_of(const Entry& entry) const;  // under mutex_

    mutable std::mutex mutex_;
    Entry* first_ = nullptr;
    Entry* last_ = nullptr;
    uint64_t serialising_ = 0;  // how many entries are
};

}  // namespace gantry::block
