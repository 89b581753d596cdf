// The pid file: locked for the life of the process, removed at its end.

#pragma once

#include <string>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

class PidFile {
  public:
    PidFile() = default;
    PidFile(PidFile&&) noexcept = default;
    PidFile& operator=(PidFile&&) noexcept = default;
    ~PidFile() { remove(); }

    /// `cannot create PID file: ...`; a file locked by a living process is refused and left alone.
    static Result<PidFile> create(const std::string& path);
    void remove();

  private:
    std::string path_;
    UniqueFd fd_;
};

}  // namespace gantry::cli
