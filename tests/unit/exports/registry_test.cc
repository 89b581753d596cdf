// Registry and life cycle of exports, with an export type of the test's own.

#include <catch2/catch.hpp>

#include "exports/export.h"
#include "tests/support/export_disk.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::exports;

namespace {

/// What the test sees of and does to its exports.
struct Stage {
    bool clients = false;
    bool fail_start = false;
    bool hold_stop = false;
    bool end_early = false;  // what it serves is gone before it has started
    bool late_read = false;  // a request that begins when the removal already has
    int started = 0, stopped = 0, destroyed = 0;
    std::vector<Loop*> loops;
} stage;

class TestExport final : public Export {
  public:
    using Export::Export;
    ~TestExport() override { ++stage.destroyed; }
    static Result<std::unique_ptr<Export>> create(ExportContext context) {
        if (context.options.contains("nonsense")) return fail(ErrorKind::kInvalid, "nonsense");
        return std::make_unique<TestExport>(std::move(context));
    }
    std::string_view type() const override { return "test"; }
    Task<Result<>> start() override {
        stage.loops = context_.loops;
        if (stage.end_early) context_.ended();
        if (stage.fail_start) co_return fail(ErrorKind::kIo, "cannot start");
        ++stage.started;
        co_return Result<>();
    }
    bool has_clients() const override { return stage.clients; }
    Task<void> stop() override {
        while (stage.hold_stop) co_await sleep_for(std::chrono::microseconds(100));
        if (stage.late_read) {
            block::Channel* channel = co_await root().channel(Loop::current());
            uint8_t memory[512];
            const iovec iov{memory, sizeof memory};
            [[maybe_unused]] const Result<> done = co_await channel->read(0, IoVec(iov));
        }
        ++stage.stopped;
    }
};

constexpr ExportType kTypes[] = {{"test", &TestExport::create}};

struct Fixture {
    Fixture() {
        stage = {};
        for (const char* name : {"disk", "other"}) {
            const json::object options{{"driver", "memory"}, {"node-name", name}};
            REQUIRE(runtime.run(graph.add(options)));
        }
        REQUIRE(runtime.run(graph.add({{"driver", "memory"}, {"node-name", "ro"}, {"read-only", true}})));
    }
    ~Fixture() {
        runtime.run(registry.remove_all());
        runtime.run(graph.close_all());
    }
    std::string add(json::object options) {
        if (!options.contains("type")) options["type"] = "test";
        auto r = runtime.run(registry.add(std::move(options)));
        return r ? "" : r.error().message();
    }
    std::string remove(std::string_view id, RemoveMode mode = RemoveMode::kSafe) {
        // On the main loop, as commands are.
        auto r = runtime.run(registry.remove(std::string(id), mode));
        return r ? "" : r.error().message();
    }
    bool eventually(std::function<bool()> condition) { return runtime.run(test::wait_until(std::move(condition))); }

    test::TestRuntime runtime;
    std::array<block::Driver, 1> drivers{test::kExportDiskDriver};
    block::Graph graph{*runtime.runtime, drivers, nullptr};
    std::vector<std::string> deleted;
    Registry registry{*runtime.runtime, graph, kTypes, [this](std::string_view id) { deleted.emplace_back(id); }};
};

}  // namespace

TEST_CASE("exports: an export is added, listed, found and removed with its event", "[exports]") {
    Fixture f;
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    CHECK(f.add({{"id", "b"}, {"node-name", "other"}, {"writable", true}}) == "");
    const auto list = f.registry.list();
    REQUIRE(list.size() == 2);
    CHECK(list[0].id == "b");
    CHECK(list[1].id == "a");
    CHECK(list[1].node_name == "disk");
    CHECK(list[1].type == "test");
    CHECK_FALSE(list[1].shutting_down);
    REQUIRE(f.registry.find("b"));
    CHECK(f.registry.find("b")->writable());
    CHECK(f.remove("a") == "");
    CHECK(f.eventually([&] { return f.deleted.size() == 1; }));
    CHECK(f.deleted[0] == "a");
    CHECK(f.registry.size() == 1);
    CHECK(f.registry.find("a") == nullptr);
    CHECK(stage.destroyed == 1);
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
}

TEST_CASE("exports: one that has ended while it was being started is removed", "[exports]") {
    Fixture f;
    stage.end_early = true;
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    CHECK(f.eventually([&] { return f.deleted.size() == 1; }));
    CHECK(f.registry.size() == 0);
    stage.fail_start = true;
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}}) == "cannot start");
    CHECK(f.registry.size() == 0);
    CHECK(stage.destroyed == 2);
}

TEST_CASE("exports: what cannot be added says why and leaves nothing", "[exports]") {
    Fixture f;
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}}) == "Block export id 'a' is already in use");
    CHECK(f.add({{"id", "1a"}, {"node-name", "disk"}}) == "Invalid block export id");
    CHECK(f.add({{"id", ""}, {"node-name", "disk"}}) == "Invalid block export id");
    CHECK(f.add({{"id", "a/b"}, {"node-name", "disk"}}) == "Invalid block export id");
    CHECK(f.add({{"id", std::string(100, 'x')}, {"node-name", "nope"}}) ==
          "Cannot find device='' nor node-name='nope'");
    CHECK(f.add({{"id", "b"}, {"node-name", "ro"}, {"writable", true}}) == "Cannot export read-only node as writable");
    CHECK(f.add({{"id", "b"}, {"node-name", "disk"}, {"iothread", "io9"}}) == "iothread \"io9\" not found");
    CHECK(f.add({{"id", "b"}, {"node-name", "disk"}, {"nonsense", 1}}) == "nonsense");
    CHECK(f.add({{"id", "b"}, {"node-name", "disk"}, {"type", "fuse"}}) != "");
    stage.fail_start = true;
    CHECK(f.add({{"id", "b"}, {"node-name", "disk"}}) == "cannot start");
    stage.fail_start = false;
    CHECK(f.registry.size() == 1);
    CHECK(f.deleted.empty());
    CHECK(f.add({{"id", "b"}, {"node-name", "disk"}}) == "");
}

TEST_CASE("exports: safe removal refuses while clients are connected, hard does not", "[exports]") {
    Fixture f;
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    stage.clients = true;
    CHECK(f.remove("a").starts_with("export 'a' still in use"));
    CHECK(f.registry.list().size() == 1);
    CHECK(f.remove("zz") == "Export 'zz' is not found");
    CHECK(f.remove("a", RemoveMode::kHard) == "");
    CHECK(f.eventually([&] { return f.registry.size() == 0; }));
}

TEST_CASE("exports: a hard removal ends requests that come after it began", "[exports][once]") {
    Fixture f;
    auto& disk = static_cast<test::ExportDisk&>(*f.graph.find("disk"));
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    disk.hold = disk.cancel_releases = true;
    stage.clients = stage.late_read = true;
    CHECK(f.remove("a", RemoveMode::kHard) == "");
    CHECK(f.eventually([&] { return disk.held == 1; }));
    CHECK(f.eventually([&] { return f.deleted.size() == 1; }));
    disk.hold = false;
}

TEST_CASE("exports: a removal that takes time is seen as shutting down and keeps the id", "[exports]") {
    Fixture f;
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    stage.hold_stop = true;
    CHECK(f.remove("a") == "");
    REQUIRE(f.registry.list().size() == 1);
    CHECK(f.registry.list()[0].shutting_down);
    CHECK(f.registry.list()[0].node_name == "disk");
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}}) == "Block export id 'a' is already in use");
    CHECK(f.remove("a") == "Export 'a' is already shutting down");
    CHECK(f.remove("a", RemoveMode::kHard) == "");
    CHECK(f.deleted.empty());
    stage.hold_stop = false;
    CHECK(f.eventually([&] { return f.deleted.size() == 1; }));
    CHECK(stage.stopped == 1);
}

TEST_CASE("exports: a node cannot be removed or resized under an export", "[exports]") {
    Fixture f;
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    CHECK_FALSE(f.runtime.run(f.graph.remove("disk")));
    CHECK_FALSE(f.runtime.run(f.graph.resize(*f.graph.find("disk"), 1 << 21)));
    CHECK(f.remove("a") == "");
    CHECK(f.eventually([&] { return f.registry.size() == 0; }));
    CHECK(f.runtime.run(f.graph.remove("disk")));
}

TEST_CASE("exports: iothreads are taken by name, one or several, and stay while they are used", "[exports]") {
    Fixture f;
    Loop* one = f.runtime.runtime->add_loop("io1", std::chrono::nanoseconds(0)).value();
    Loop* two = f.runtime.runtime->add_loop("io2", std::chrono::nanoseconds(0)).value();
    REQUIRE(f.registry.add_iothread("io1", one));
    REQUIRE(f.registry.add_iothread("io2", two));
    CHECK_FALSE(f.registry.add_iothread("io2", two));
    CHECK(f.registry.iothread("io2") == two);
    CHECK(f.add({{"id", "a"}, {"node-name", "disk"}, {"iothread", "io1"}}) == "");
    CHECK(stage.loops == std::vector<Loop*>{one});
    CHECK(f.add({{"id", "b"}, {"node-name", "disk"}, {"iothread", json::array{"io2", "io1"}}}) == "");
    CHECK(stage.loops == std::vector<Loop*>{two, one});
    auto busy = f.registry.remove_iothread("io2");
    REQUIRE_FALSE(busy);
    CHECK(busy.error().kind() == ErrorKind::kBusy);
    CHECK(f.remove("a") == "");
    CHECK(f.remove("b") == "");
    CHECK(f.eventually([&] { return f.registry.size() == 0; }));
    CHECK(f.registry.remove_iothread("io1"));
    CHECK(f.registry.remove_iothread("io2"));
    CHECK_FALSE(f.registry.remove_iothread("io2"));
    f.runtime.runtime->remove_loop(one);
    f.runtime.runtime->remove_loop(two);
}

TEST_CASE("exports: without an iothread they are dealt over the shared loops", "[exports]") {
    Fixture f;
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    const auto first = stage.loops;
    REQUIRE(f.add({{"id", "b"}, {"node-name", "disk"}}) == "");
    CHECK(first.size() == f.runtime.io_loop_count());
    CHECK(stage.loops.size() == first.size());
    if (first.size() > 1) CHECK(stage.loops[0] != first[0]);
}

TEST_CASE("exports: fixed-iothread goes with one iothread", "[exports]") {
    Fixture f;
    CHECK(f.add({{"id", "e"}, {"node-name", "disk"}, {"fixed-iothread", true}, {"iothread", json::array{"a", "b"}}}) ==
          "fixed-iothread=on goes with one iothread, not with a list of them");
    CHECK(f.add({{"id", "e"}, {"node-name", "disk"}, {"fixed-iothread", true}}) == "");
}

TEST_CASE("exports: remove_if removes what it is told to, with clients or without", "[exports]") {
    const bool clients = GENERATE(false, true);
    Fixture f;
    for (const char* id : {"a", "b", "c"}) REQUIRE(f.add({{"id", id}, {"node-name", "disk"}}) == "");
    stage.clients = clients;
    f.runtime.run(f.registry.remove_if([](const exports::Export& e) { return e.id() != "b"; }));
    REQUIRE(f.registry.size() == 1);
    CHECK(f.registry.find("b"));
    CHECK(f.deleted.size() == 2);
}

TEST_CASE("exports: remove_all waits for all of a type", "[exports]") {
    Fixture f;
    REQUIRE(f.add({{"id", "a"}, {"node-name", "disk"}}) == "");
    REQUIRE(f.add({{"id", "b"}, {"node-name", "other"}}) == "");
    stage.clients = true;
    f.runtime.run(f.registry.remove_all("other-type"));
    CHECK(f.registry.size() == 2);
    f.runtime.run(f.registry.remove_all("test"));
    CHECK(f.registry.size() == 0);
    CHECK(f.deleted.size() == 2);
}
