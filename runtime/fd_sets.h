// Descriptors that a manager has passed to us, in numbered sets: "/dev/fdset/N" names set N as a file.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry {

/// Any thread.
class FdSets {
  public:
    /// The sets of this process, shared by all monitors.
    static FdSets& process();

    struct Member {
        int fd = -1;
        std::optional<std::string> opaque;  // the manager's note
    };
    struct Set {
        int64_t id = 0;
        std::vector<Member> members;
    };
    /// A duplicate of a member. While `use` lives the set stays listed, though its members be removed.
    struct Opened {
        UniqueFd fd;
        std::shared_ptr<const void> use;
    };

    /// Adds to set `id`, which is made if need be; without an id to a new one with the smallest number that is free.
    /// The set and the number of the descriptor in it. kInvalid for negative ids.
    Result<std::pair<int64_t, int>> add(UniqueFd fd, std::optional<int64_t> id, std::optional<std::string> opaque);
    /// One member, or all. Duplicates stay open. "File descriptor named 'fdset-id:1, fd:2' not found".
    Result<> remove(int64_t id, std::optional<int64_t> fd);
    /// By number.
    std::vector<Set> list() const;

    /// A duplicate of the first member with the access mode of `flags` (O_RDONLY, O_RDWR), which shares its file offset
    /// and its locks. "Could not dup FD for /dev/fdset/1 flags 2: ..." with ENOENT (no such set) or EACCES (no such
    /// member).
    Result<Opened> open(std::string_view path, int flags) const;

    /// Whether `path` names a set: "/dev/fdset/" and anything.
    static bool is_set(std::string_view path) { return path.starts_with("/dev/fdset/"); }

  private:
    struct Passed {
        UniqueFd fd;
        std::optional<std::string> opaque;
    };
    struct Entry {
        std::vector<Passed> members;
        std::shared_ptr<const int> use = std::make_shared<int>(0);
    };
    /// Sets without members that nobody uses any more are gone.
    void forget_unused() const;

    mutable std::mutex m_;
    mutable std::map<int64_t, Entry> sets_;
};

}  // namespace gantry
