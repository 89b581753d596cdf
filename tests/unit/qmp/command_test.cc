#include "qmp/command.h"

#include <atomic>
#include <catch2/catch.hpp>

#include "qmp_bench.h"
#include "schema/schema.h"
#include "tests/support/temp_dir.h"

using namespace gantry;
using gantry::test::kNegotiate;
using gantry::test::QmpBench;
using gantry::test::Wire;

namespace {

Result<json::value> run(QmpBench& bench, std::string name, json::object arguments = {}) {
    return bench.rt.run(qmp::execute(bench.services, std::move(name), std::move(arguments)));
}

std::string error_of(const Result<json::value>& result) { return result ? "no error" : result.error().message(); }

struct Start {
    static Task<Result<>> monitor(qmp::Monitors* monitors) { co_return monitors->add_monitor({{"chardev", "c"}}); }
    static Task<Result<block::Job*>> job(block::JobManager* jobs, std::unique_ptr<block::Job> job) {
        co_return jobs->start(std::move(job));
    }
};

/// Works until it is told to finish.
class PatientJob : public block::Job {
  public:
    PatientJob(std::string id, bool manual)
        : Job("create",
              {.id = std::move(id), .auto_finalize = !manual, .auto_dismiss = !manual, .is_block_job = false}) {}
    Task<Result<>> run() override {
        set_progress(1, 4);
        while (!done) {
            CO_CHECK(co_await doze(std::chrono::seconds(60)));
        }
        set_progress(4, 4);
        co_return Result<>();
    }
    static Task<void> finish(PatientJob* job) {
        job->done = true;
        job->wake();
        co_return;
    }
    bool done = false;
};

}  // namespace

TEST_CASE("commands: every command of the schema has a handler, and the reverse", "[qmp]") {
    qmp::check_handlers();  // aborts otherwise
    for (const schema::Command* command : schema::commands()) {
        if (command->name == "qmp_capabilities") continue;
        INFO(command->name);
        CHECK(qmp::find_handler(command->name) != nullptr);
    }
    CHECK(qmp::find_handler("no-such-command") == nullptr);
}

TEST_CASE("commands: unknown ones carry their class, known but absent ones the reason", "[qmp]") {
    QmpBench bench;
    auto unknown = run(bench, "no-such");
    REQUIRE_FALSE(unknown);
    CHECK(unknown.error().qmp_class() == QmpClass::kCommandNotFound);
    CHECK(unknown.error().message() == "The command no-such has not been found");
    auto absent = run(bench, "transaction");
    REQUIRE_FALSE(absent);
    CHECK(absent.error().qmp_class() == QmpClass::kCommandNotFound);
    CHECK(absent.error().message().starts_with("The command transaction has not been found; not in this build: "));
}

TEST_CASE("commands: arguments are checked before anything happens", "[qmp]") {
    QmpBench bench;
    CHECK(error_of(run(bench, "blockdev-add", {{"driver", "null-co"}, {"node-name", "n"}, {"bogus", 1}})) ==
          "Parameter 'bogus' is unexpected");
    CHECK(error_of(run(bench, "blockdev-del")) == "Parameter 'node-name' is missing");
    CHECK(bench.graph.nodes().empty());
}

TEST_CASE("commands: nodes come and go", "[qmp]") {
    QmpBench bench;
    REQUIRE(run(bench, "blockdev-add", {{"driver", "null-co"}, {"node-name", "n"}, {"size", 4096}}));
    REQUIRE(run(bench, "blockdev-add", {{"driver", "raw"}, {"node-name", "r"}, {"file", "n"}}));
    auto nodes = run(bench, "query-named-block-nodes");
    REQUIRE(nodes);
    REQUIRE(nodes->get_array().size() == 2);
    CHECK(nodes->at(0).at("node-name") == "r");
    CHECK(nodes->at(0).at("image").at("virtual-size") == 4096);
    CHECK(error_of(run(bench, "blockdev-del", {{"node-name", "n"}})) ==
          "Block device n is in use; node 'r' uses it as 'file'");
    REQUIRE(run(bench, "blockdev-del", {{"node-name", "r"}}));
    REQUIRE(run(bench, "blockdev-del", {{"node-name", "n"}}));
    CHECK(bench.graph.nodes().empty());
}

TEST_CASE("commands: iothreads are loops with a thread of their own", "[qmp]") {
    QmpBench bench;
    const size_t before = bench.rt.runtime->all_loops().size();
    REQUIRE(run(bench, "object-add", {{"qom-type", "iothread"}, {"id", "t0"}, {"poll-max-ns", 7}}));
    CHECK(bench.rt.runtime->all_loops().size() == before + 1);
    auto list = run(bench, "query-iothreads");
    REQUIRE(list);
    CHECK(list->at(0).at("id") == "t0");
    CHECK(list->at(0).at("poll-max-ns") == 7);
    CHECK(list->at(0).at("thread-id").to_number<int>() > 0);
    CHECK(error_of(run(bench, "object-add", {{"qom-type", "iothread"}, {"id", "t1"}, {"thread-pool-min", 65}}))
              .starts_with("bad thread-pool-min/thread-pool-max values"));
    REQUIRE(run(bench, "object-del", {{"id", "t0"}}));
    CHECK(bench.rt.runtime->all_loops().size() == before);
    CHECK(error_of(run(bench, "object-del", {{"id", "t0"}})) == "object 't0' not found");
}

TEST_CASE("commands: a job is steered, and every change of its state is an event", "[qmp]") {
    QmpBench bench;
    test::TempDir dir;
    REQUIRE(bench.rt.run(bench.monitors.add_chardev(
        {{"backend", "socket"}, {"id", "c"}, {"path", dir.file("qmp")}, {"server", true}, {"wait", false}})));
    REQUIRE(bench.rt.run(Start::monitor(&bench.monitors)));
    std::vector<std::string> lines;
    std::atomic<bool> negotiated = false;
    std::thread client([&] {
        UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM, 0));
        sockaddr_un addr{};
        addr.sun_family = AF_UNIX;
        dir.file("qmp").copy(addr.sun_path, sizeof addr.sun_path - 1);
        if (::connect(fd.get(), reinterpret_cast<sockaddr*>(&addr), sizeof addr) != 0) return;
        Wire wire(std::move(fd));
        wire.send(kNegotiate);
        lines = {wire.line(), wire.line()};
        negotiated = true;
        for (std::string line = wire.line(); !line.starts_with('<'); line = wire.line()) lines.push_back(line);
    });
    struct Wait {
        static Task<bool> client(std::atomic<bool>* negotiated) {
            co_return co_await test::wait_until([negotiated] { return negotiated->load(); });
        }
        static Task<bool> status(block::JobManager* jobs, std::string_view id, block::JobStatus wanted) {
            co_return co_await test::wait_until([=] {
                block::Job* job = jobs->find(id);
                return job && job->status() == wanted;
            });
        }
    };
    REQUIRE(bench.rt.run(Wait::client(&negotiated)));
    block::JobManager& jobs = bench.graph.jobs();
    auto made = std::make_unique<PatientJob>("j", true);
    PatientJob* patient = made.get();
    REQUIRE(bench.rt.run(Start::job(&jobs, std::move(made))));
    auto listed = run(bench, "query-jobs");
    REQUIRE(listed);
    CHECK(
        listed->at(0) ==
        json::value(
            {{"id", "j"}, {"type", "create"}, {"status", "running"}, {"current-progress", 1}, {"total-progress", 4}}));
    REQUIRE(run(bench, "job-pause", {{"id", "j"}}));
    CHECK(error_of(run(bench, "job-pause", {{"id", "j"}})) == "Job is already paused");
    REQUIRE(bench.rt.run(Wait::status(&jobs, "j", block::JobStatus::kPaused)));
    CHECK(error_of(run(bench, "job-dismiss", {{"id", "j"}})) ==
          "Job 'j' in state 'paused' cannot accept command verb 'dismiss'");
    REQUIRE(run(bench, "job-resume", {{"id", "j"}}));
    CHECK(error_of(run(bench, "job-resume", {{"id", "j"}})) == "Can't resume a job that was not paused");
    bench.rt.run(PatientJob::finish(patient));
    REQUIRE(bench.rt.run(Wait::status(&jobs, "j", block::JobStatus::kPending)));
    REQUIRE(run(bench, "job-finalize", {{"id", "j"}}));
    REQUIRE(bench.rt.run(Wait::status(&jobs, "j", block::JobStatus::kConcluded)));
    REQUIRE(run(bench, "job-dismiss", {{"id", "j"}}));
    CHECK(error_of(run(bench, "job-dismiss", {{"id", "j"}})) == "Job not found");

    made = std::make_unique<PatientJob>("k", false);
    REQUIRE(bench.rt.run(Start::job(&jobs, std::move(made))));
    REQUIRE(run(bench, "job-cancel", {{"id", "k"}}));
    bench.rt.run(QmpBench::end(&bench));
    client.join();

    std::string states;
    for (const std::string& line : lines) {
        if (line.find("\"JOB_STATUS_CHANGE\"") == std::string::npos) continue;
        const std::string key = "\"status\": \"";
        const size_t at = line.find(key) + key.size();
        const size_t id = line.find("\"id\": \"") + 7;
        states += fmt::format("{}:{} ", line[id], line.substr(at, line.find('"', at) - at));
        CHECK(line.starts_with("{\"timestamp\": {\"seconds\": "));
    }
    CHECK(states ==
          "j:created j:running j:paused j:running j:waiting j:pending j:concluded j:null "
          "k:created k:running k:aborting k:concluded k:null ");
}
