#include <catch2/catch.hpp>

#include "block/jobs/job.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/node_io.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;

namespace {

/// Writes down every event.
struct Events : Observer {
    void job_status_changed(const Job& job, std::string_view status) override {
        note(job.id() == "j" ? std::string(status) : job.id() + ":" + std::string(status));
    }
    void job_event(const Job&, std::string_view event, std::string_view error) override {
        note(std::string(event) + (error.empty() ? "" : "(" + std::string(error) + ")"));
    }
    void note(std::string text) { all += (all.empty() ? "" : " ") + std::move(text); }
    std::string take() { return std::exchange(all, {}); }
    std::string all;
};

/// Counts steps until told what to do.
struct StepJob : Job {
    explicit StepJob(JobOptions options) : Job("step", std::move(options)) {}
    enum class Command : uint8_t { kStep, kReady, kFinish, kFail };

    Task<Result<>> run() override {
        while (true) {
            CO_CHECK(co_await pause_point());
            if (command == Command::kFinish || completed) co_return Result<>();
            if (command == Command::kFail) co_return fail(ErrorKind::kIo, "the source broke");
            if (command == Command::kReady && status() == JobStatus::kRunning) set_ready();
            steps++;
            set_progress(steps, 100);
            if (bytes_per_step) CO_CHECK(co_await pace(bytes_per_step));
            co_await yield_turn();
        }
    }
    Task<Result<>> prepare() override {
        calls += "prepare ";
        if (!prepare_error.empty()) co_return fail(ErrorKind::kIo, "{}", prepare_error);
        co_return Result<>();
    }
    void commit() override { calls += "commit "; }
    void abort() override { calls += "abort "; }
    Task<void> clean() override {
        *cleaned += calls + "clean";
        co_return;
    }
    Result<> complete() override {
        completed = true;
        return {};
    }

    Command command = Command::kStep;
    bool completed = false;
    uint64_t steps = 0;
    uint64_t bytes_per_step = 0;
    std::string prepare_error, calls;
    std::string* cleaned = nullptr;
};

struct JobFixture : Events, GraphFixture {
    JobFixture() : GraphFixture(static_cast<Events*>(this)) {}
    ~JobFixture() { run(manager().cancel_all()); }
    JobManager& manager() { return graph->jobs(); }
    Result<> pause(std::string id) { return command(&JobManager::pause, id); }
    Result<> resume(std::string id) { return command(&JobManager::resume, id); }
    Result<> cancel(std::string id) { return command(&JobManager::cancel, id); }
    Result<> complete(std::string id) { return command(&JobManager::complete, id); }
    Result<> finalize(std::string id) { return command(&JobManager::finalize, id); }
    Result<> dismiss(std::string id) { return command(&JobManager::dismiss, id); }
    Result<> set_speed(std::string id, int64_t speed) {
        return on_loop<Result<>>([&] { return manager().set_speed(id, speed); });
    }
    void resume_all() {
        on_loop<bool>([&] {
            manager().resume_all();
            return true;
        });
    }
    Result<Job*> start_job(std::unique_ptr<Job> job) {
        return on_loop<Result<Job*>>([&] {
            Result<Job*> started = manager().start(std::move(job));
            if (started) CHECK(static_cast<StepJob*>(*started)->steps == 0);  // the command is answered first
            return started;
        });
    }
    StepJob* start(JobOptions options = {.id = "j"}, uint64_t bytes_per_step = 0) {
        auto job = std::make_unique<StepJob>(std::move(options));
        job->cleaned = &cleaned;
        job->bytes_per_step = bytes_per_step;
        Result<Job*> started = start_job(std::move(job));
        REQUIRE(started.has_value());
        return static_cast<StepJob*>(*started);
    }
    void until(std::function<bool()> condition) { REQUIRE(run(wait_until(std::move(condition)))); }
    void until_gone() {
        until([&] { return manager().find("j") == nullptr; });
    }
    void until_status(JobStatus s) {
        until([&, s] { return manager().find("j") && manager().find("j")->status() == s; });
    }
    std::string cleaned;

  private:
    template <class T>
    static Task<T> call(std::function<T()> fn) {
        co_return fn();
    }
    /// Commands come from coroutines of the main loop.
    template <class T>
    T on_loop(std::function<T()> fn) {
        return run(call<T>(std::move(fn)));
    }
    Result<> command(Result<> (JobManager::*verb)(std::string_view), const std::string& id) {
        return on_loop<Result<>>([&] { return (manager().*verb)(id); });
    }
};

}  // namespace

TEST_CASE("job: a plain life announces every state", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start();
    CHECK(f.take() == "created running");
    f.until([&] { return job->steps > 3; });
    CHECK(job->busy());
    CHECK(job->progress_total() == 100);
    job->command = StepJob::Command::kFinish;
    f.until_gone();
    CHECK(f.take() == "waiting pending BLOCK_JOB_COMPLETED concluded null");
    CHECK(f.cleaned == "prepare commit clean");
}

TEST_CASE("job: one that is no block job sends no BLOCK_JOB events", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start({.id = "j", .auto_finalize = false, .is_block_job = false});
    job->command = StepJob::Command::kFinish;
    f.until_status(JobStatus::kPending);
    CHECK(f.finalize("j").has_value());
    f.until_gone();
    CHECK(f.take() == "created running waiting pending concluded null");
}

TEST_CASE("job: a failure aborts and carries its text", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start({.id = "j", .auto_dismiss = false});
    SECTION("in the work") {
        job->command = StepJob::Command::kFail;
        f.until_status(JobStatus::kConcluded);
        CHECK(f.take() == "created running aborting BLOCK_JOB_COMPLETED(the source broke) concluded");
        CHECK(f.cleaned == "abort clean");
        CHECK(job->error()->message() == "the source broke");
    }
    SECTION("in the preparation of its end") {
        job->command = StepJob::Command::kFinish;
        job->prepare_error = "no room";
        f.until_status(JobStatus::kConcluded);
        CHECK(f.take() == "created running waiting pending aborting BLOCK_JOB_COMPLETED(no room) concluded");
        CHECK(f.cleaned == "prepare abort clean");
    }
    CHECK(f.dismiss("j").has_value());
    CHECK(f.take() == "null");
    CHECK(error_of(f.dismiss("j")) == "Job not found");
}

TEST_CASE("job: auto-finalize and auto-dismiss off wait for their commands", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start({.id = "j", .auto_finalize = false, .auto_dismiss = false});
    job->command = StepJob::Command::kFinish;
    f.until_status(JobStatus::kPending);
    CHECK(f.take() == "created running waiting pending BLOCK_JOB_PENDING");
    CHECK(error_of(f.dismiss("j")) == "Job 'j' in state 'pending' cannot accept command verb 'dismiss'");
    CHECK(f.finalize("j").has_value());
    f.until_status(JobStatus::kConcluded);
    CHECK(f.take() == "BLOCK_JOB_COMPLETED concluded");
    CHECK(error_of(f.cancel("j")) == "Job 'j' in state 'concluded' cannot accept command verb 'cancel'");
    CHECK(f.dismiss("j").has_value());
    CHECK(f.take() == "null");
}

TEST_CASE("job: cancel aborts from every state that accepts it", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start({.id = "j", .auto_finalize = false, .auto_dismiss = false});
    std::string path;
    SECTION("at once") { path = "created running"; }
    SECTION("running") {
        f.until([&] { return job->steps > 0; });
        path = "created running";
    }
    SECTION("paused") {
        REQUIRE(f.pause("j").has_value());
        f.until_status(JobStatus::kPaused);
        path = "created running paused running";
    }
    SECTION("ready") {
        job->command = StepJob::Command::kReady;
        f.until_status(JobStatus::kReady);
        path = "created running ready BLOCK_JOB_READY";
    }
    SECTION("standby") {
        job->command = StepJob::Command::kReady;
        f.until_status(JobStatus::kReady);
        REQUIRE(f.pause("j").has_value());
        f.until_status(JobStatus::kStandby);
        path = "created running ready BLOCK_JOB_READY standby ready";
    }
    SECTION("pending") {
        job->command = StepJob::Command::kFinish;
        f.until_status(JobStatus::kPending);
        path = "created running waiting pending BLOCK_JOB_PENDING";
    }
    SECTION("asleep for the speed limit") {
        job->bytes_per_step = 1000000;
        REQUIRE(f.set_speed("j", 1).has_value());
        f.until([&] { return job->steps > 0 && !job->busy(); });
        path = "created running";
    }
    CHECK(f.cancel("j").has_value());
    f.until_status(JobStatus::kConcluded);
    CHECK(f.take() == path + " aborting BLOCK_JOB_CANCELLED(Operation canceled) concluded");
    CHECK(job->error()->message() == "Operation canceled");
    CHECK(f.cleaned.ends_with("abort clean"));
}

TEST_CASE("job: the user's pause is one flag, on top of internal ones", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start();
    CHECK(error_of(f.resume("j")) == "Can't resume a job that was not paused");
    CHECK(f.pause("j").has_value());
    CHECK(error_of(f.pause("j")) == "Job is already paused");
    f.until_status(JobStatus::kPaused);
    const uint64_t steps = job->steps;
    f.run(f.manager().pause_all());
    f.run(f.manager().pause_all());
    CHECK(f.resume("j").has_value());
    f.resume_all();
    f.run(sleep_for(std::chrono::milliseconds(1)));
    CHECK(job->steps == steps);  // one internal pause is left
    f.resume_all();
    f.until([&] { return job->steps > steps; });
    job->command = StepJob::Command::kFinish;
    f.until_gone();
    CHECK(f.take() == "created running paused running waiting pending BLOCK_JOB_COMPLETED concluded null");
}

TEST_CASE("job: an internal pause waits for the pause point and shows nowhere", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start();
    f.until([&] { return job->steps > 0; });
    f.run(f.manager().pause_all());
    CHECK_FALSE(job->busy());
    CHECK(job->status() == JobStatus::kRunning);
    StepJob* late = f.start({.id = "late"});  // begins paused
    const uint64_t steps = job->steps;
    f.run(sleep_for(std::chrono::milliseconds(1)));
    CHECK(job->steps == steps);
    CHECK(late->steps == 0);
    f.resume_all();
    f.until([&] { return job->steps > steps && late->steps > 0; });
    CHECK(f.take() == "created running late:created late:running");
    CHECK(f.manager().jobs() == std::vector<Job*>{late, job});
}

TEST_CASE("job: a drained graph finds every job at its pause point", "[block][job]") {
    JobFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    StepJob* job = f.start();
    auto change = [](JobFixture* x, StepJob* running) -> Task<void> {
        for (int i = 0; i < 50; i++) {
            const uint64_t before = running->steps;
            const Result<> resized = co_await x->graph->resize(x->node("m"), 65536 + i * 512);
            CHECK(resized.has_value());
            const bool stepped = co_await wait_until([&] { return running->steps > before; });
            CHECK(stepped);
        }
    };
    f.run(change(&f, job));
    CHECK(f.take() == "created running");
}

TEST_CASE("job: job-complete works in ready, and in standby after resume", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start();
    CHECK(error_of(f.complete("j")) == "Job 'j' in state 'running' cannot accept command verb 'complete'");
    job->command = StepJob::Command::kReady;
    f.until_status(JobStatus::kReady);
    f.take();
    if (GENERATE(false, true)) {
        REQUIRE(f.pause("j").has_value());
        f.until_status(JobStatus::kStandby);
        CHECK(f.complete("j").has_value());
        f.run(sleep_for(std::chrono::milliseconds(1)));
        CHECK(job->status() == JobStatus::kStandby);
        CHECK(f.resume("j").has_value());
        f.until_gone();
        CHECK(f.take() == "standby ready waiting pending BLOCK_JOB_COMPLETED concluded null");
    } else {
        CHECK(f.complete("j").has_value());
        f.until_gone();
        CHECK(f.take() == "waiting pending BLOCK_JOB_COMPLETED concluded null");
    }
}

TEST_CASE("job: a speed limit holds work back, and changing it takes effect at once", "[block][job]") {
    JobFixture f;
    StepJob* job = f.start({.id = "j", .speed = 1000}, 1000);
    f.until([&] { return job->steps > 0 && !job->busy(); });
    f.run(sleep_for(std::chrono::milliseconds(20)));
    CHECK(job->steps == 1);
    CHECK(error_of(f.set_speed("j", -1)) == "Parameter 'speed' expects a non-negative value");
    CHECK(f.set_speed("j", 0).has_value());
    f.until([&] { return job->steps > 100; });
    // 50 KB at 500 KB/s: a tenth of a second, within what the slice allows.
    CHECK(f.set_speed("j", 500000).has_value());
    const uint64_t from = job->steps;
    const auto begin = Clock::now();
    f.until([&] { return job->steps > from + 150; });
    CHECK(Clock::now() - begin >= std::chrono::milliseconds(150));
}

TEST_CASE("job: bad ids and taken ids are refused, a refused start is announced", "[block][job]") {
    JobFixture f;
    const auto refused = [&](JobOptions options) {
        Result<Job*> started = f.start_job(std::make_unique<StepJob>(std::move(options)));
        REQUIRE_FALSE(started.has_value());
        return started.error().message();
    };
    CHECK(refused({.id = ""}) == "Invalid job ID ''");
    CHECK(refused({.id = "1a"}) == "Invalid job ID '1a'");
    CHECK(refused({.id = "a b"}) == "Invalid job ID 'a b'");
    f.start();
    CHECK(refused({.id = "j"}) == "Job ID 'j' already in use");
    f.take();
    CHECK(refused({.id = "k", .speed = UINT64_MAX}) == "Parameter 'speed' expects a non-negative value");
    CHECK(f.take() == "k:created k:null");
    CHECK(error_of(f.cancel("nobody")) == "Job not found");
}

TEST_CASE("job: the verb table is the reference's", "[block][job]") {
    using S = JobStatus;
    const std::vector<std::pair<JobVerb, std::vector<S>>> table = {
        {JobVerb::kCancel, {S::kCreated, S::kRunning, S::kPaused, S::kReady, S::kStandby, S::kWaiting, S::kPending}},
        {JobVerb::kPause, {S::kCreated, S::kRunning, S::kPaused, S::kReady, S::kStandby}},
        {JobVerb::kResume, {S::kCreated, S::kRunning, S::kPaused, S::kReady, S::kStandby}},
        {JobVerb::kSetSpeed, {S::kCreated, S::kRunning, S::kPaused, S::kReady, S::kStandby}},
        {JobVerb::kComplete, {S::kReady, S::kStandby}},
        {JobVerb::kFinalize, {S::kPending}},
        {JobVerb::kDismiss, {S::kConcluded}},
    };
    for (const auto& [verb, accepted] : table) {
        for (int s = 0; s <= static_cast<int>(S::kNull); s++) {
            CAPTURE(job_verb_name(verb), job_status_name(static_cast<S>(s)));
            const bool expected = std::ranges::find(accepted, static_cast<S>(s)) != accepted.end();
            CHECK(job_verb_allowed(verb, static_cast<S>(s)) == expected);
        }
    }
}

TEST_CASE("job: cancel_all ends every job whatever it waits for", "[block][job]") {
    JobFixture f;
    f.start({.id = "a"});
    f.start({.id = "b", .auto_dismiss = false})->command = StepJob::Command::kFinish;
    f.start({.id = "c", .auto_finalize = false})->command = StepJob::Command::kFinish;
    REQUIRE(f.pause("a").has_value());
    f.until([&] {
        return f.manager().find("b")->status() == JobStatus::kConcluded &&
               f.manager().find("c")->status() == JobStatus::kPending;
    });
    f.run(f.manager().cancel_all());
    CHECK(f.manager().jobs().empty());
}
