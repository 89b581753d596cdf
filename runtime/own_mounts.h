// The files that this process serves into the file system by itself (FUSE): whoever opened one of them here would wait
// for himself.

#pragma once

#include <sys/types.h>

#include <atomic>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry {

/// Any thread. Nothing here asks a file system anything that its server would have to answer.
class OwnMounts {
  public:
    /// Those of this process.
    static OwnMounts& process();

    struct Mounted {
        std::string user;     // "FUSE export 'disk'"
        std::string path;     // that is covered
        uint64_t device = 0;  // st_dev below the mount; 0: not mounted yet
        uint64_t covered_device = 0, covered_inode = 0;
    };
    /// Takes the covered file for `entry.user`; kExists with the other's name when it has one already.
    Result<> reserve(Mounted entry);
    /// It is mounted: `device` is what lies there now.
    void mounted(uint64_t covered_device, uint64_t covered_inode, uint64_t device);
    void remove(uint64_t covered_device, uint64_t covered_inode);
    /// A mount that a process before this one has left, and nobody serves until an export of this one takes it over:
    /// remove() comes first then. `covered` is the file below it (O_PATH); an invalid one: unknown.
    void left_behind(Mounted entry, UniqueFd covered);
    /// What `path` would be without such a mount, to be opened again through /proc; invalid: nothing of that kind is
    /// there. Asks nobody.
    UniqueFd below_left_behind(const std::string& path) const;

    /// Who serves the files of `device`.
    std::optional<std::string> server_of(uint64_t device) const;
    /// EDEADLK with a sentence when `path` (links followed) leads into one of the mounts; whatever else is wrong with
    /// it is for its user to find out. One system call, none while nothing is mounted.
    Result<> check_path(const std::string& path) const;
    /// The same for a descriptor.
    Result<> check_fd(int fd, const std::string& path) const;

  private:
    Result<> check_device(std::optional<uint64_t> device, const std::string& path) const;
    std::atomic<size_t> count_{0};
    mutable std::mutex m_;
    std::vector<Mounted> all_;
    struct Left {
        uint64_t covered_device = 0, covered_inode = 0;
        uint64_t device = 0;
        UniqueFd covered;
    };
    std::vector<Left> left_;  // besides being in all_
};

/// What lies at a path or a descriptor, without the file's server being asked (statx of nothing).
struct Place {
    uint64_t device = 0;    // as st_dev
    uint64_t mount_id = 0;  // as in /proc/self/mountinfo; 0: the kernel does not tell
};
/// `follow`: a symbolic link at the end. The error is an errno without text.
Result<Place> place_of(const std::string& path, bool follow);
Result<Place> place_of(int fd);
/// The path without links, also asked of nobody; empty when there is nothing.
std::string real_path_of_place(const std::string& path);

}  // namespace gantry
