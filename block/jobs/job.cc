#include "block/jobs/job.h"

#include <algorithm>

namespace gantry::block {
namespace {

/// Work may run ahead of the speed limit by what it allows in this time, so that small steps do not sleep each.
constexpr std::chrono::milliseconds kSlice{100};
/// Sleeps for the speed limit are cut here; it is looked at again then.
constexpr double kLongestPause = 3600.0;

}  // namespace

Job::Job(std::string_view type, JobOptions options) : type_(type), options_(std::move(options)) {}

Job::~Job() { CHECK(!running_, "a job is destroyed while it runs"); }

Result<> Job::complete() {
    return fail(ErrorKind::kUnsupported, "The active block job '{}' cannot be completed", options_.id);
}

bool Job::should_pause() const { return user_paused_ || manager_->internal_pauses_ > 0; }

Result<> Job::cancelled_result() const {
    if (cancelled_) return fail(ErrorKind::kCancelled, "Operation canceled");
    return {};
}

Job::Quiet::Quiet(Job& job) : job_(job), before_(std::exchange(job.quiet_, true)) {
    job_.manager_->changed_.notify_all();
}

Job::Quiet::~Quiet() { job_.quiet_ = before_; }

Task<Result<>> Job::pause_point() {
    const bool at_work = status_ == JobStatus::kRunning || status_ == JobStatus::kReady;
    const JobStatus before = status_;
    while (!cancelled_ && should_pause()) {
        const JobStatus asleep = before == JobStatus::kReady ? JobStatus::kStandby : JobStatus::kPaused;
        if (at_work) manager_->set_status(*this, user_paused_ ? asleep : before);
        Quiet quiet(*this);
        co_await wake_.wait();
    }
    if (at_work) manager_->set_status(*this, before);
    co_return cancelled_result();
}

Task<Result<>> Job::pace(uint64_t bytes) {
    if (options_.speed == 0) co_return co_await pause_point();
    const double seconds = std::min(static_cast<double>(bytes) / static_cast<double>(options_.speed), kLongestPause);
    paid_until_ = std::max(paid_until_, Clock::now()) +
                  std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    if (paid_until_ > Clock::now() + kSlice) {
        while (!cancelled_ && !should_pause() && paid_until_ > Clock::now()) {
            Quiet quiet(*this);
            co_await timer_.until(paid_until_);
        }
    }
    co_return co_await pause_point();
}

Task<Result<>> Job::doze(std::chrono::nanoseconds limit) {
    if (!cancelled_ && !should_pause()) {
        Quiet quiet(*this);
        co_await timer_.after(limit);
    }
    co_return co_await pause_point();
}

void Job::wake() {
    wake_.notify_all();
    timer_.cancel();
}

void Job::set_ready() {
    manager_->set_status(*this, JobStatus::kReady);
    manager_->send(*this, "BLOCK_JOB_READY");
}

void Job::set_progress(uint64_t current, uint64_t total) {
    current_ = current;
    total_ = total;
}

}  // namespace gantry::block
