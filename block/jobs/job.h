// Job: the state machine of spec/qmp.md section 12.4 around one coroutine. Main loop only.

#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "block/observer.h"
#include "runtime/error.h"
#include "runtime/sync.h"
#include "runtime/task.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::block {

class Graph;
class JobManager;

enum class JobStatus : uint8_t {
    kUndefined,
    kCreated,
    kRunning,
    kPaused,
    kReady,
    kStandby,
    kWaiting,
    kPending,
    kAborting,
    kConcluded,
    kNull
};
enum class JobVerb : uint8_t { kCancel, kPause, kResume, kSetSpeed, kComplete, kDismiss, kFinalize, kChange };
std::string_view job_status_name(JobStatus s);
std::string_view job_verb_name(JobVerb v);
/// Whether `verb` is accepted in `status` (the verb table).
bool job_verb_allowed(JobVerb verb, JobStatus status);

struct JobOptions {
    std::string id;
    bool auto_finalize = true;
    bool auto_dismiss = true;
    bool is_block_job = true;  // sends BLOCK_JOB_* events
    uint64_t speed = 0;        // bytes/s, 0 = unlimited
};

/// Derived classes implement run() and the finalisation hooks. At pause_point() a job holds neither a range lock nor a
/// request.
class Job {
  public:
    Job(std::string_view type, JobOptions options);
    virtual ~Job();

    const std::string& id() const { return options_.id; }
    std::string_view type() const { return type_; }
    JobStatus status() const { return status_; }
    const JobOptions& options() const { return options_; }
    uint64_t progress_current() const { return current_; }
    uint64_t progress_total() const { return total_; }
    uint64_t speed() const { return options_.speed; }
    /// Working, not asleep at a pause point.
    bool busy() const { return running_ && !quiet_; }
    bool user_paused() const { return user_paused_; }
    bool cancelled() const { return cancelled_; }
    /// Null while it runs well.
    const Error* error() const { return error_ ? error_.get() : nullptr; }

  protected:
    /// The work. Returns when done or failed; calls pause_point() often.
    virtual Task<Result<>> run() = 0;
    /// After run() succeeded: may still fail; then commit() cannot. abort() after failure or cancel. clean() always,
    /// last.
    virtual Task<Result<>> prepare() { co_return Result<>(); }
    virtual void commit() {}
    virtual void abort() {}
    virtual Task<void> clean() { co_return; }
    /// job-complete in ready or standby: run() is to finish at its next look. Default: refused.
    virtual Result<> complete();

    /// Sleeps while paused (by the user or a drain); kCancelled when the job was cancelled. Only the user's pause shows
    /// in status().
    Task<Result<>> pause_point();
    /// Waits as the speed limit demands for `bytes` done; includes a pause point.
    Task<Result<>> pace(uint64_t bytes);
    /// Sleeps at a pause point until woken (job-complete, job-cancel, pauses, wake()) or `limit` passed.
    Task<Result<>> doze(std::chrono::nanoseconds limit);
    /// Ends doze() and the sleep of pace().
    void wake();

    /// While it lives the job counts as sitting at a pause point: around waits for the graph (whose holder may be
    /// draining jobs). The job holds neither a range lock nor a request, and calls pause_point() next.
    class Quiet {
      public:
        explicit Quiet(Job& job);
        ~Quiet();
        Quiet(const Quiet&) = delete;

      private:
        Job& job_;
        bool before_;
    };
    /// running -> ready, with BLOCK_JOB_READY.
    void set_ready();
    void set_progress(uint64_t current, uint64_t total);

  private:
    friend class JobManager;
    friend struct JobDriver;
    std::string type_;
    JobOptions options_;
    JobStatus status_ = JobStatus::kUndefined;
    JobManager* manager_ = nullptr;
    uint64_t current_ = 0;
    uint64_t total_ = 0;
    bool user_paused_ = false;
    bool running_ = false;  // run() is being executed
    bool quiet_ = false;    // asleep at a pause point
    bool cancelled_ = false;
    bool finalize_requested_ = false;
    std::unique_ptr<Error> error_;
    WaitQueue wake_;                  // pause points and pending sleep here
    Timer timer_;                     // pace() and doze()
    Clock::time_point paid_until_{};  // what was done so far is within the speed limit from here on

    bool should_pause() const;
    Result<> cancelled_result() const;
};

class JobManager {
  public:
    explicit JobManager(Graph& graph);
    ~JobManager();

    /// Takes the job through created and running. Errors: `Invalid job ID 'X'`, `Job ID 'X' already in use`.
    Result<Job*> start(std::unique_ptr<Job> job);
    Job* find(std::string_view id) const;
    /// Newest first.
    std::vector<Job*> jobs() const;

    /// The job-* commands: `Job not found`, `Job 'X' in state 'S' cannot accept command verb 'V'`, ...
    Result<> pause(std::string_view id);
    Result<> resume(std::string_view id);
    Result<> cancel(std::string_view id);
    Result<> complete(std::string_view id);
    Result<> finalize(std::string_view id);
    Result<> dismiss(std::string_view id);
    Result<> set_speed(std::string_view id, int64_t speed);

    /// Internal pause of every job around a drain: returns when all sit at a pause point. Nestable.
    Task<void> pause_all();
    void resume_all();
    /// quit: cancels all and waits until every job is null.
    Task<void> cancel_all();

  private:
    friend class Job;
    friend struct JobDriver;
    Result<Job*> accept(std::string_view id, JobVerb verb) const;
    void set_status(Job& job, JobStatus status);
    void send(Job& job, std::string_view event);
    void remove(Job& job);
    bool all_quiet() const;

    Graph& graph_;
    std::vector<std::unique_ptr<Job>> jobs_;  // oldest first
    uint32_t internal_pauses_ = 0;
    WaitQueue changed_;  // a job went quiet, ended or vanished
    TaskScope scope_;
};

}  // namespace gantry::block
