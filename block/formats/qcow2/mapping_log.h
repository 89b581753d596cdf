// MappingLog: mappings that are acknowledged but not yet in the file, kept in shared memory that outlives the process.

#pragma once

#include <cstdint>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::block::qcow2 {

/// One changed word (or pair, extended L2) of the tables.
struct MappingRecord {
    enum class Kind : uint32_t { kL1 = 1, kL2 = 2 };
    Kind kind = Kind::kL2;
    uint64_t index = 0;  // kL1: entry of the table; kL2: guest cluster number
    uint64_t word = 0, bitmap = 0;
    bool operator==(const MappingRecord&) const = default;
};

/// The last record of each entry, those of L1 first. An older one may name a place that another entry took since, so a
/// replay that is cut off must not have written it.
std::vector<MappingRecord> newest(std::span<const MappingRecord> records);

/// A ring of records in one memory file. Records are numbered; those from the first that counts on are what must be
/// replayed. A write-back takes mark() at T0, before it copies what it will write, and clear_before(mark) once that is
/// in the file. So who changes an entry stores it first and appends its record after that: a record before the mark
/// belongs to a change that was copied. Each record has a checksum over its number, too: one that was not finished, or
/// is left from an earlier round, ends the list. Without a file attached every call is a no-op that succeeds.
///
/// The file belongs to one session of one image: it carries a session number that the image's session extension carries
/// too, and the image's autoclear bit kAutoclearSession is gone when another program has written since; else nothing is
/// replayed. append(), mark() and clear_before() on any thread; the rest at open or under Metadata::mutex().
class MappingLog {
  public:
    MappingLog() = default;
    ~MappingLog();
    MappingLog(const MappingLog&) = delete;
    MappingLog& operator=(const MappingLog&) = delete;

    static constexpr uint64_t kBytes = uint64_t{1} << 20;
    /// Records that fit.
    static uint64_t capacity();

    bool attached() const { return base_ != nullptr; }
    /// Takes over `fd` (a memory file; sized here when it is empty) and maps it. kInvalid when it is something else.
    Result<> attach(UniqueFd fd);
    /// The session it was used for; 0: fresh.
    uint64_t session() const;
    /// What was logged and not cleared, oldest first; empties nothing.
    std::vector<MappingRecord> records() const;
    /// Empties it and starts `session`.
    void start(uint64_t session);

    /// All of them or none. False: no room; write back, then try again.
    bool append(std::span<const MappingRecord> records);
    uint64_t mark() const;
    void clear_before(uint64_t mark);
    bool half_full() const;

  private:
    struct Head;
    struct Slot;
    Head& head() const;
    Slot& slot(uint64_t number) const;

    UniqueFd fd_;
    uint8_t* base_ = nullptr;
    mutable std::mutex mutex_;
    uint64_t first_ = 0, next_ = 0;  // numbers; first_ is also in the file
};

}  // namespace gantry::block::qcow2
