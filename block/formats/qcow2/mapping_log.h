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
};

/// Two halves in one memory file: records go to the active one; switch_half() at T0 of a write-back, clear_other() when
/// what T0 copied is in the file. Each record has a checksum, so a torn one ends the half. Without a file attached
/// every call is a no-op that succeeds.
///
/// The file belongs to one session of one image: it carries a session number that the image's session extension carries
/// too, and the image's autoclear bit kAutoclearSession is gone when another program has written since; else nothing is
/// replayed. append() on any thread; the rest under Metadata::mutex() or at open.
class MappingLog {
  public:
    MappingLog() = default;
    ~MappingLog();
    MappingLog(const MappingLog&) = delete;

    static constexpr uint64_t kBytes = uint64_t{1} << 20;

    bool attached() const { return base_ != nullptr; }
    /// Takes over `fd` (a memory file; sized here when it is empty) and maps it. kInvalid when it is something else.
    Result<> attach(UniqueFd fd);
    /// The session it was used for; 0: fresh.
    uint64_t session() const;
    /// What must be replayed, oldest first; empties nothing.
    std::vector<MappingRecord> records() const;
    /// Empties both halves and starts `session`.
    void start(uint64_t session);

    /// False: the active half is full; write back, then try again.
    bool append(std::span<const MappingRecord> records);
    void switch_half();
    void clear_other();

  private:
    struct Head;
    struct Slot;
    UniqueFd fd_;
    uint8_t* base_ = nullptr;
    std::mutex mutex_;
    uint64_t next_ = 0;  // slot in the active half
};

}  // namespace gantry::block::qcow2
