#include "runtime/task_scope.h"

#include <catch2/catch.hpp>

#include "runtime/sync.h"
#include "tests/support/death_test.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;

Task<void> child(std::vector<int>* out, int id, AsyncEvent* gate) {
    out->push_back(id);
    co_await gate->wait();
    out->push_back(id + 100);
}

Task<std::vector<int>> spawn_and_join() {
    std::vector<int> out;
    AsyncEvent gate;
    TaskScope scope;
    scope.spawn(child(&out, 1, &gate));
    out.push_back(2);
    scope.spawn(child(&out, 3, &gate));
    if (scope.live() != 2) out.push_back(-1);
    gate.set();
    out.push_back(4);
    co_await scope.join();
    if (scope.live() != 0) out.push_back(-2);
    co_return out;
}

TEST_CASE("scope: a child starts at once and join waits for all", "[runtime][scope]") {
    TestRuntime rt;
    CHECK(rt.run(spawn_and_join()) == std::vector<int>{1, 2, 3, 4, 101, 103});
}

Task<void> chain(TaskScope* scope, int left, int* count) {
    ++*count;
    co_await yield_turn();
    if (left > 0) scope->spawn(chain(scope, left - 1, count));
}
Task<int> join_growing_scope() {
    TaskScope scope;
    int count = 0;
    scope.spawn(chain(&scope, 50, &count));
    co_await scope.join();
    co_await scope.join();  // nothing left
    co_return count;
}

TEST_CASE("scope: join waits for children that were spawned meanwhile", "[runtime][scope]") {
    TestRuntime rt;
    CHECK(rt.run(join_growing_scope()) == 51);
}

struct Tracker {
    explicit Tracker(std::vector<std::string>* l) : log(l) {}
    Tracker(Tracker&& o) noexcept : log(std::exchange(o.log, nullptr)) {}
    ~Tracker() {
        if (log) log->push_back("parameter gone");
    }
    std::vector<std::string>* log;
};
Task<void> with_parameter(Tracker tracker) {
    co_await yield_turn();
    tracker.log->push_back("body done");
}
Task<void> watch(std::vector<std::string>* log) {
    TaskScope scope;
    scope.spawn(with_parameter(Tracker(log)));
    co_await scope.join();
    log->push_back("joined");
}

TEST_CASE("scope: a child's parameters are gone before join returns", "[runtime][scope]") {
    TestRuntime rt;
    std::vector<std::string> log;
    rt.run(watch(&log));
    CHECK(log == std::vector<std::string>{"body done", "parameter gone", "joined"});
}

Task<void> brief() { co_return; }
Task<size_t> spawn_many(size_t n) {
    TaskScope scope;
    for (size_t i = 0; i < n; ++i) scope.spawn(brief());
    co_await scope.join();
    co_return n;
}

TEST_CASE("scope: a hundred thousand children that end at once leave nothing behind", "[runtime][scope]") {
    TestRuntime rt;
    CHECK(rt.run(spawn_many(100'000)) == 100'000);
}

TEST_CASE("scope: destroying one with live children aborts", "[runtime][scope][death]") {
    const auto text = test::abort_message([] {
        auto* rt = new TestRuntime({.backend = IoBackendKind::kEpoll, .io_loops = 0});
        rt->run([]() -> Task<void> {
            AsyncEvent never;
            std::vector<int> out;
            TaskScope scope;
            scope.spawn(child(&out, 1, &never));
            co_return;
        }());
    });
    CHECK_THAT(text, Catch::Contains("a TaskScope is destroyed with live children"));
}

}  // namespace
}  // namespace gantry
