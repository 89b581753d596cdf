// A mount point that was made for one mount, and goes with it.

#pragma once

#include <cstdint>
#include <string>

#include "runtime/error.h"

namespace gantry::cli {

class MadeFile {
  public:
    /// Makes `path` when it does not exist. Nothing that may be one of our mounts is asked anything.
    static Result<MadeFile> create(const std::string& path);
    MadeFile() = default;
    MadeFile(MadeFile&& other) noexcept;
    MadeFile& operator=(MadeFile&& other) noexcept;
    /// Removes it, if it was made, is still the same and empty, and nothing is mounted there.
    ~MadeFile();

  private:
    std::string path_;  // empty: not ours
    uint64_t device_ = 0, inode_ = 0;
};

}  // namespace gantry::cli
