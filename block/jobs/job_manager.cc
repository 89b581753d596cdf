#include <algorithm>

#include "block/graph.h"
#include "block/jobs/job.h"
#include "block/jobs/job_driver.h"

namespace gantry::block {
namespace {

bool well_formed(std::string_view id) {
    const auto letter = [](char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); };
    if (id.empty() || !letter(id.front())) return false;
    return std::ranges::all_of(
        id, [&](char c) { return letter(c) || (c >= '0' && c <= '9') || c == '-' || c == '.' || c == '_'; });
}

}  // namespace

JobManager::JobManager(Graph& graph) : graph_(graph) {}

JobManager::~JobManager() = default;

Result<Job*> JobManager::start(std::unique_ptr<Job> job) {
    const std::string& id = job->id();
    if (!well_formed(id)) return fail(ErrorKind::kInvalid, "Invalid job ID '{}'", id);
    if (find(id)) return fail(ErrorKind::kExists, "Job ID '{}' already in use", id);
    job->manager_ = this;
    set_status(*job, JobStatus::kCreated);
    if (job->options_.speed > INT64_MAX) {
        set_status(*job, JobStatus::kNull);
        return fail(ErrorKind::kInvalid, "Parameter 'speed' expects a non-negative value");
    }
    Job* started = job.get();
    jobs_.push_back(std::move(job));
    started->running_ = true;
    set_status(*started, JobStatus::kRunning);
    scope_.spawn(JobDriver::drive(this, started));
    return started;
}

Job* JobManager::find(std::string_view id) const {
    for (const auto& job : jobs_) {
        if (job->id() == id) return job.get();
    }
    return nullptr;
}

std::vector<Job*> JobManager::jobs() const {
    std::vector<Job*> list;
    for (auto it = jobs_.rbegin(); it != jobs_.rend(); ++it) list.push_back(it->get());
    return list;
}

Result<Job*> JobManager::accept(std::string_view id, JobVerb verb) const {
    Job* job = find(id);
    if (!job) return fail(ErrorKind::kNotFound, "Job not found");
    if (!job_verb_allowed(verb, job->status_)) {
        return fail(ErrorKind::kInvalid, "Job '{}' in state '{}' cannot accept command verb '{}'", id,
                    job_status_name(job->status_), job_verb_name(verb));
    }
    return job;
}

Result<> JobManager::pause(std::string_view id) {
    TRY(Job* const job, accept(id, JobVerb::kPause));
    if (job->user_paused_) return fail(ErrorKind::kInvalid, "Job is already paused");
    job->user_paused_ = true;
    job->wake();
    return {};
}

Result<> JobManager::resume(std::string_view id) {
    TRY(Job* const job, accept(id, JobVerb::kResume));
    if (!job->user_paused_) return fail(ErrorKind::kInvalid, "Can't resume a job that was not paused");
    job->user_paused_ = false;
    job->wake();
    return {};
}

Result<> JobManager::cancel(std::string_view id) {
    TRY(Job* const job, accept(id, JobVerb::kCancel));
    job->cancelled_ = true;
    job->wake();
    return {};
}

Result<> JobManager::complete(std::string_view id) {
    TRY(Job* const job, accept(id, JobVerb::kComplete));
    CHECK_OK(job->complete());
    job->wake();
    return {};
}

Result<> JobManager::finalize(std::string_view id) {
    TRY(Job* const job, accept(id, JobVerb::kFinalize));
    job->finalize_requested_ = true;
    job->wake();
    return {};
}

Result<> JobManager::dismiss(std::string_view id) {
    TRY(Job* const job, accept(id, JobVerb::kDismiss));
    remove(*job);
    return {};
}

Result<> JobManager::set_speed(std::string_view id, int64_t speed) {
    TRY(Job* const job, accept(id, JobVerb::kSetSpeed));
    if (speed < 0) return fail(ErrorKind::kInvalid, "Parameter 'speed' expects a non-negative value");
    job->options_.speed = static_cast<uint64_t>(speed);
    job->paid_until_ = {};
    job->wake();
    return {};
}

bool JobManager::all_quiet() const {
    return std::ranges::none_of(jobs_, [](const auto& job) { return job->busy(); });
}

Task<void> JobManager::pause_all() {
    internal_pauses_++;
    while (!all_quiet()) co_await changed_.wait();
}

void JobManager::resume_all() {
    CHECK(internal_pauses_ > 0, "resume_all() without pause_all()");
    if (--internal_pauses_ > 0) return;
    for (const auto& job : jobs_) job->wake_.notify_all();
}

Task<void> JobManager::cancel_all() {
    while (!jobs_.empty()) {
        std::vector<Job*> concluded;
        for (const auto& job : jobs_) {
            if (job->status_ == JobStatus::kConcluded) concluded.push_back(job.get());
            job->options_.auto_dismiss = true;
            job->cancelled_ = true;
            job->wake();
        }
        for (Job* job : concluded) remove(*job);
        if (!jobs_.empty()) co_await changed_.wait();
    }
    co_await scope_.join();
}

void JobManager::set_status(Job& job, JobStatus status) {
    if (job.status_ == status) return;
    job.status_ = status;
    if (graph_.observer()) graph_.observer()->job_status_changed(job, job_status_name(status));
}

void JobManager::send(Job& job, std::string_view event) {
    if (!job.options_.is_block_job || !graph_.observer()) return;
    graph_.observer()->job_event(job, event, job.error_ ? job.error_->message() : "");
}

void JobManager::remove(Job& job) {
    set_status(job, JobStatus::kNull);
    std::erase_if(jobs_, [&](const auto& held) { return held.get() == &job; });
    changed_.notify_all();
}

}  // namespace gantry::block
