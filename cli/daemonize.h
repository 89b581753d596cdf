// --daemonize: the parent waits for the child's start-up and reports it by its exit status.

#pragma once

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

/// Before any thread exists. The parent never returns from start(): it exits 0 when ready() is called in the child, 1
/// when the child ends first.
class Daemonizer {
  public:
    /// Forks; returns in the child, in a new session.
    static Result<Daemonizer> start();
    /// Start-up is complete: stdio goes to /dev/null, the working directory stays, the parent exits 0.
    void ready();

  private:
    UniqueFd pipe_;
};

}  // namespace gantry::cli
