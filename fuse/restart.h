// Restart: what an export leaves with the keeper for the process after this one, and how that one finds it.
// spec/fuse.md section 6. Main loop only, unless said otherwise.

#pragma once

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "exports/keeper.h"
#include "fuse/init.h"
#include "fuse/state_file.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

/// What a process before this one has left of an export. The kernel's requests wait in `devices`.
struct Legacy {
    json::object state;  // what the export wrote last
    Negotiated agreed;
    std::vector<UniqueFd> devices;  // every descriptor of the mount, at least one; all are of equal rank
    UniqueFd covered;               // the file below the mount, O_PATH
    std::unique_ptr<StateFile> file;
};

/// Before any image is opened: paths that lead into a mount that was left mean the file below it from now on, until an
/// export takes the mount over. What is damaged or not mounted any more is dropped.
void announce_legacies(exports::Keeper& keeper);
/// What is there for the export of this id; once.
std::optional<Legacy> take_legacy(exports::Keeper& keeper, const std::string& export_id);
/// Unmounts it, whoever has it open, and drops it.
Task<void> give_up_legacy(exports::Keeper& keeper, std::string export_id, Legacy legacy);
/// All that nobody has taken.
Task<void> give_up_legacies(exports::Keeper& keeper);

/// A living export's part with the keeper.
class KeptExport {
  public:
    /// Puts everything there; nothing that was read may be unanswered yet. Errors: the keeper's, StateFile's.
    static Result<std::unique_ptr<KeptExport>> begin(exports::Keeper& keeper, const std::string& export_id,
                                                     std::span<const int> devices, int covered,
                                                     const json::object& state);
    /// Goes on with what is there.
    static std::unique_ptr<KeptExport> inherit(exports::Keeper& keeper, const std::string& export_id,
                                               std::unique_ptr<StateFile> file);
    /// Further descriptors of the mount, before anything is read from them.
    Result<> add(std::span<const int> devices);
    /// Any thread. A failure is logged.
    void update(const json::object& state);
    /// The mount is gone: nothing is kept any more.
    void end();
    bool inherited() const { return inherited_; }

  private:
    KeptExport(exports::Keeper& keeper, const std::string& export_id);
    exports::Keeper& keeper_;
    std::string name_;
    std::unique_ptr<StateFile> file_;
    bool inherited_ = false;
};

}  // namespace gantry::fuse
