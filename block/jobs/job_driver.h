// JobDriver: the life of one job, from running to concluded.

#pragma once

#include "block/jobs/job.h"

namespace gantry::block {

struct JobDriver {
    /// Runs the job to its end; with auto-dismiss it is gone then. Main loop.
    static Task<void> drive(JobManager* manager, Job* job);

  private:
    static Task<Result<>> work(Job* job);
    /// waiting and pending, up to the point of no return.
    static Task<Result<>> finalise(JobManager* manager, Job* job);
};

}  // namespace gantry::block
