// PowerCut: a disk that remembers everything written to it and can show what a power cut at any moment leaves.

#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <vector>

#include "block/driver.h"
#include "runtime/buffer.h"

namespace gantry::test {

/// A clock shared by the disks and by the guest of one workload: every start and end of a request has a number of its
/// own.
using Stamp = uint64_t;
class StampClock {
  public:
    Stamp next() { return now_.fetch_add(1) + 1; }
    Stamp now() const { return now_.load(); }

  private:
    std::atomic<Stamp> now_{0};
};

/// The journal of one disk. Any thread.
///
/// After a power cut at stamp t: what ended before a flush began that had ended by t is there. Everything else that had
/// begun by t is there or not, sector by sector (512 bytes), in any combination; of two that touch the same sector and
/// did not overlap in time, the later wins if it is there. Sizes follow the writes that are there and the truncations.
class JournalDisk {
  public:
    static constexpr uint64_t kSector = 512;

    JournalDisk(StampClock& clock, std::vector<uint8_t> contents);

    StampClock& clock() { return clock_; }
    std::vector<uint8_t> contents() const;
    uint64_t size() const;
    void read(uint64_t offset, void* to, size_t length) const;

    /// Apply now, journal as begun at `begun` and ended now.
    void write(Stamp begun, uint64_t offset, std::vector<uint8_t> bytes);
    void zero(Stamp begun, uint64_t offset, uint64_t length, bool grow);
    void truncate(Stamp begun, uint64_t size);
    void flushed(Stamp begun);

    enum class Loss : uint8_t {
        kNothing,  // a crash of the program: the page cache survives
        kAll,      // nothing that was not flushed
        kRandom,   // each request whole or not at all
        kTorn,     // each sector for itself
    };
    /// The bytes of the disk after a cut at `t`.
    std::vector<uint8_t> after_cut(Stamp t, Loss loss, std::mt19937_64& random) const;
    /// Stamps at which something ended: the interesting moments.
    std::vector<Stamp> moments() const;
    size_t flushes() const;
    size_t operations() const;

    /// Looked up by the driver "journal" (option disk).
    static void publish(std::string name, std::shared_ptr<JournalDisk> disk);
    static void forget(std::string_view name);
    static std::shared_ptr<JournalDisk> named(std::string_view name);

  private:
    struct Op {
        enum class Kind : uint8_t { kWrite, kZero, kTruncate, kFlush } kind;
        Stamp begun, ended;
        uint64_t offset, length;
        std::vector<uint8_t> bytes;
    };
    static void apply(std::vector<uint8_t>& disk, const Op& op, const std::vector<bool>* sectors);

    StampClock& clock_;
    const std::vector<uint8_t> initial_;
    mutable std::mutex mutex_;
    std::vector<uint8_t> now_;
    std::vector<Op> ops_;  // in order of their ends
};

/// The driver "journal": a growable protocol node over a published JournalDisk; requests yield once, so that concurrent
/// ones overlap.
extern const block::Driver kJournalDriver;

}  // namespace gantry::test
