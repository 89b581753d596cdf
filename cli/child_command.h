// The command that `gantry mount ... -- COMMAND` runs.

#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/io.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

/// Main loop only. It has our terminal, our working directory, and signals as a program expects them.
class ChildCommand {
  public:
    /// kNotFound: there is no such program; kPermission: it cannot be run.
    Result<> start(std::vector<std::string> words);
    bool started() const { return pid_ > 0; }
    /// Returns when it has ended, or after stop_watching().
    Task<void> ended();
    void stop_watching();
    void send(int signal) const;
    /// Its exit status, 128 + N when signal N has ended it. Blocks until it has ended, passing on SIGTERM and SIGHUP.
    int wait() const;

  private:
    pid_t pid_ = -1;
    UniqueFd pidfd_;
    CancellableIo* waiting_ = nullptr;
    bool stopped_ = false;
};

}  // namespace gantry::cli
