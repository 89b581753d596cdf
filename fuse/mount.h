// Mount: the file that an export covers, and the descriptor that the kernel's requests come from.

#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "runtime/error.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::fuse {

enum class AllowOther : uint8_t { kOff, kOn, kAuto };

struct MountRequest {
    std::string export_id;   // for refusals
    std::string mountpoint;  // an existing regular file
    bool read_only = true;
    AllowOther allow_other = AllowOther::kAuto;
    uint32_t max_read = 0;  // bytes
};

/// Main loop only; what may block (a path of a hung file system, fusermount3) is done on the blocking pool.
/// spec/fuse.md section 1, "Mount point rules", "Mounting", "Removal".
class Mount {
  public:
    /// Checks the mount point and mounts: by mount(2) where this process may, else by fusermount3. The kernel's INIT
    /// waits in fd() then. The first call of a process also has clean_stale_mounts() done, beside it. Errors:
    /// kNotFound, kInvalid (no regular file), kExists (it is an export of this process), kPermission with what is
    /// missing.
    static Task<Result<std::unique_ptr<Mount>>> create(MountRequest request);
    /// The mount of a process before this one: what save() told, and its descriptor. kInvalid when it is not mounted
    /// any more.
    static Task<Result<std::unique_ptr<Mount>>> adopt(const json::object& saved, UniqueFd fd, UniqueFd covered = {});
    /// Unmounts what is still mounted, as hard as it takes.
    ~Mount();

    int fd() const { return fd_.get(); }
    /// Closes it; requests that were read from it and not answered die with it.
    void close_fd() { fd_.reset(); }
    /// Somebody else than the mounting user can get here.
    bool allow_other() const { return allow_other_; }
    /// The file that is covered, links resolved.
    const std::string& path() const { return path_; }
    /// That file, O_PATH; -1: unknown.
    int covered_fd() const { return covered_.get(); }
    uint64_t device() const { return device_; }  // st_dev of the mounted file
    /// Nothing but export_id, path and numbers.
    json::object save() const;
    /// `hard`: clients that have it open do not matter. kBusy otherwise. What somebody else has unmounted already, or
    /// covered by a mount of his own, is no error. The thread that serves the file must be able to answer meanwhile.
    Task<Result<>> unmount(bool hard);
    /// Whether abort() can work: by the kernel's control file system, or because this process may unmount.
    bool can_abort() const;
    /// Ends the connection to the kernel, mounted or not: every client's request fails, and so does every entry of a
    /// ring. A failure is logged.
    Task<void> abort();
    /// From now on the destructor leaves the mount to whoever keeps the descriptor.
    void leave() { left_ = true; }

  private:
    Mount() = default;
    static Result<std::unique_ptr<Mount>> create_blocking(MountRequest request);
    Result<> unmount_blocking(bool hard);
    /// The kernel still sends requests to the descriptor: until it does not, device() is the number of this mount.
    bool connected() const;
    /// O_PATH; invalid: it is not there any more, or covered by a mount of somebody else.
    UniqueFd open_own_root() const;
    /// Nobody is kept from opening what was covered any more.
    void forget();
    UniqueFd fd_;
    UniqueFd covered_;
    std::string path_;
    std::string export_id_;
    uint64_t device_ = 0;
    uint64_t covered_device_ = 0;  // of the file below
    uint64_t covered_inode_ = 0;
    bool allow_other_ = false;
    bool mounted_ = false;
    bool known_ = false;  // in OwnMounts
    bool left_ = false;
};

/// Unmounts what daemons that are gone have left behind: mounts of ours that answer "not connected". Those of living
/// daemons are left alone, also when they do not answer within a third of a second. Blocks for that long; how many
/// there were.
size_t clean_stale_mounts();

}  // namespace gantry::fuse
