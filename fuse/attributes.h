// Attributes: what stat(2) says about the file of an export, but for its length.

#pragma once

#include <atomic>
#include <cstdint>
#include <optional>

#include "fuse/wire.h"
#include "runtime/error.h"
#include "schema/value.h"

namespace gantry::fuse {

/// Any loop. Requests of several loops read it; what every request would write is written only when it differs.
/// spec/fuse.md section 1 "Attributes".
class Attributes {
  public:
    Attributes(bool writable, uint32_t uid, uint32_t gid);

    /// The answer to GETATTR for a file of `size` bytes.
    AttrOut answer(uint64_t size) const;

    uint32_t mode() const { return mode_.load(std::memory_order_relaxed); }  // without the file type
    void set_mode(uint32_t mode) { mode_.store(mode & 07777, std::memory_order_relaxed); }
    void set_uid(uint32_t uid) { uid_.store(uid, std::memory_order_relaxed); }
    void set_gid(uint32_t gid) { gid_.store(gid, std::memory_order_relaxed); }
    /// Mode or owner have changed.
    void status_changed();

    /// Data has been written: mtime is now, as exact as the kernel's tick.
    void data_changed() {
        const int64_t now = coarse_now_ns();
        if (mtime_ns_.load(std::memory_order_relaxed) < now) raise(mtime_ns_, now);
        if (!allocation_dirty_.load(std::memory_order_relaxed)) allocation_dirty_.store(true);
    }
    /// Data or size have changed, and mtime is another one for sure.
    void data_changed_visibly();
    /// What was written before this file was there, was written then.
    void set_mtime(int64_t ns) { mtime_ns_.store(ns > 0 ? ns : 0, std::memory_order_relaxed); }
    int64_t mtime_ns() const { return mtime_ns_.load(std::memory_order_relaxed); }

    /// Whether st_blocks should be asked for anew: unknown, a second old, or older than the last write (but not more
    /// often than every few milliseconds).
    bool allocation_stale() const;
    /// Before asking; what is written from now on counts as not asked for yet.
    void allocation_asked() { allocation_dirty_.store(false); }
    /// Bytes the image takes up; nullopt: nobody knows.
    void set_allocation(std::optional<uint64_t> bytes);

    /// For a process that takes the mount over: mode, owner, times.
    json::object save() const;
    /// kInvalid (and nothing is changed) for what save() cannot have written.
    Result<> load(const json::object& saved);

  private:
    static int64_t coarse_now_ns();
    static void raise(std::atomic<int64_t>& to, int64_t least);

    std::atomic<uint32_t> mode_, uid_, gid_;
    std::atomic<int64_t> ctime_ns_;              // of mode and owner; the file's is the later one of this and mtime
    std::atomic<int64_t> allocation_bytes_{-1};  // -1: unknown
    std::atomic<int64_t> allocation_time_ns_{INT64_MIN / 2};
    /// Written by writing loops, now and then: beside nothing else.
    alignas(64) std::atomic<int64_t> mtime_ns_;
    std::atomic<bool> allocation_dirty_{true};
};

}  // namespace gantry::fuse
