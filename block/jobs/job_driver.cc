#include "block/jobs/job_driver.h"

namespace gantry::block {

Task<Result<>> JobDriver::work(Job* job) {
    // The command that starts a job is answered before the job works.
    co_await yield_turn();
    CO_CHECK(co_await job->pause_point());
    CO_CHECK(co_await job->run());
    co_return job->cancelled_result();
}

Task<Result<>> JobDriver::finalise(JobManager* manager, Job* job) {
    manager->set_status(*job, JobStatus::kWaiting);
    manager->set_status(*job, JobStatus::kPending);
    if (!job->options_.auto_finalize) {
        manager->send(*job, "BLOCK_JOB_PENDING");
        while (!job->finalize_requested_ && !job->cancelled_) co_await job->wake_.wait();
    }
    CO_CHECK(job->cancelled_result());
    CO_CHECK(co_await job->prepare());
    co_return job->cancelled_result();
}

Task<void> JobDriver::drive(JobManager* manager, Job* job) {
    Result<> result = co_await work(job);
    job->running_ = false;
    manager->changed_.notify_all();
    if (result) result = co_await finalise(manager, job);
    if (result) {
        job->commit();
    } else {
        // Whatever a cancelled job failed with, it was given up on request.
        Result<> cancelled = job->cancelled_result();
        job->error_ = std::make_unique<Error>(cancelled ? result.error() : cancelled.error());
        manager->set_status(*job, JobStatus::kAborting);
        job->abort();
    }
    co_await job->clean();
    manager->send(*job, job->error_ && job->cancelled_ ? "BLOCK_JOB_CANCELLED" : "BLOCK_JOB_COMPLETED");
    manager->set_status(*job, JobStatus::kConcluded);
    if (job->options_.auto_dismiss) manager->remove(*job);
}

}  // namespace gantry::block
