// GuestModel: what each sector of a guest's disk may hold after a power cut.

#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "tests/support/power_cut.h"

namespace gantry::test {

/// Sectors of 512 bytes carry versions: 0 is zeroes, others a pattern made of sector number and version, so that what
/// is found names itself. Requests on a sector follow each other in time. One thread.
class GuestModel {
  public:
    static constexpr uint64_t kSector = 512;

    /// All sectors at version 0, or 1 where `initial` says so.
    GuestModel(uint64_t sectors, const std::vector<bool>& initial);

    static void fill(uint8_t* to, uint64_t sector, uint32_t version);
    /// nullopt: neither zeroes nor the pattern of this sector.
    static std::optional<uint32_t> decode(const uint8_t* from, uint64_t sector);

    uint32_t new_version() { return ++last_version_; }
    /// A change of one sector has begun; ended() once it is acknowledged.
    void begin(uint64_t sector, uint32_t version, Stamp begun);
    void end(uint64_t sector, Stamp ended);
    /// After a discard: the sector was read as `version`; the change that began is that or nothing.
    void settle(uint64_t sector, uint32_t version, Stamp ended);
    uint32_t current(uint64_t sector) const { return sectors_[sector].back().version; }
    uint32_t initial(uint64_t sector) const { return sectors_[sector].front().version; }
    /// A flush that began at `begun` was acknowledged at `ended`.
    void flushed(Stamp begun, Stamp ended) { flushes_.push_back({begun, ended}); }
    void resize_begins(uint64_t sectors, Stamp begun);
    void resize_ended(Stamp ended);
    uint64_t sectors() const { return sizes_.back().sectors; }

    struct Snapshot {
        std::string name;
        std::vector<uint32_t> versions;
        Stamp create_begun = 0, create_ended = ~Stamp{0};
        Stamp delete_begun = ~Stamp{0}, delete_ended = ~Stamp{0};
    };
    std::vector<Snapshot> snapshots;
    std::vector<uint32_t> versions() const;

    /// What is wrong with `version` found in `sector` after a cut at `t`; empty: nothing. `kept`: how much survives an
    /// acknowledged write: kFlushed (a power cut) or kAcknowledged (a crash with a mapping log).
    enum class Kept : uint8_t { kFlushed, kAcknowledged };
    std::string judge(uint64_t sector, std::optional<uint32_t> version, Stamp t, Kept kept = Kept::kFlushed) const;
    /// The sizes the disk may have after a cut at `t`.
    bool size_allowed(uint64_t sectors, Stamp t) const;
    /// Some request has changed the sector before `t` and the change is what a later reader must see as dirty.
    bool changed_before(uint64_t sector, Stamp t) const;

  private:
    static constexpr Stamp kRunning = ~Stamp{0};
    struct Change {
        uint32_t version;
        Stamp begun, ended;
    };
    struct Flush {
        Stamp begun, ended;
    };
    struct Size {
        uint64_t sectors;
        Stamp begun, ended;
    };
    Stamp flushed_until(Stamp t) const;
    std::vector<std::vector<Change>> sectors_;
    std::vector<Flush> flushes_;
    std::vector<Size> sizes_;
    uint32_t last_version_ = 1;
};

}  // namespace gantry::test
