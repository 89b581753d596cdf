#include "runtime/timer.h"

#include <catch2/catch.hpp>
#include <random>

#include "runtime/task_scope.h"
#include "tests/support/death_test.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;
using namespace std::chrono_literals;

Task<void> note_at(Clock::time_point when, int id, std::vector<int>* out) {
    Timer timer;
    co_await timer.until(when);
    out->push_back(id);
}

Task<std::vector<int>> expire_in_order(std::vector<int> delays_ms) {
    std::vector<int> out;
    TaskScope scope;
    const auto start = Clock::now() + 5ms;
    for (size_t i = 0; i < delays_ms.size(); ++i) {
        scope.spawn(note_at(start + delays_ms[i] * 100us, static_cast<int>(i), &out));
    }
    co_await scope.join();
    co_return out;
}

TEST_CASE("timer: expiry follows deadlines, equal ones the order of arming", "[runtime][timer]") {
    TestRuntime rt;
    std::vector<int> delays(300);
    std::mt19937 random(5);
    for (int& d : delays) d = static_cast<int>(random() % 20);
    std::vector<int> expected(delays.size());
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = static_cast<int>(i);
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int a, int b) { return delays[static_cast<size_t>(a)] < delays[static_cast<size_t>(b)]; });
    CHECK(rt.run(expire_in_order(delays)) == expected);
}

Task<void> sleep_on(Timer* timer, std::chrono::nanoseconds delay, int* outcome) {
    const bool expired = co_await timer->after(delay);
    *outcome = expired ? 1 : 2;
}

Task<std::vector<int>> cancel_some(size_t count) {
    std::vector<Timer> timers(count);
    std::vector<int> outcome(count, 0);
    TaskScope scope;
    std::mt19937 random(9);
    for (size_t i = 0; i < count; ++i)
        scope.spawn(sleep_on(&timers[i], (i % 2 ? 1ms : 1h) + std::chrono::microseconds(random() % 999), &outcome[i]));
    for (size_t i = 0; i < count; i += 2) {
        timers[i].cancel();
        timers[i].cancel();                    // once is enough, twice does no harm
        if (outcome[i] != 0) outcome[i] = 99;  // the sleeper must not run inline
    }
    co_await scope.join();
    co_return outcome;
}

TEST_CASE("timer: cancelled sleepers get false, the others true", "[runtime][timer]") {
    TestRuntime rt;
    const auto outcome = rt.run(cancel_some(200));
    for (size_t i = 0; i < outcome.size(); ++i) {
        CAPTURE(i);
        REQUIRE(outcome[i] == (i % 2 ? 1 : 2));
    }
}

Task<bool> reuse() {
    Timer timer;
    for (int i = 0; i < 3; ++i) {
        const bool expired = co_await timer.after(100us);
        if (!expired || timer.armed()) co_return false;
    }
    const bool past = co_await timer.until(Clock::now() - 1h);
    co_return past;
}

TEST_CASE("timer: may be used again, and a past deadline expires at once", "[runtime][timer]") {
    TestRuntime rt;
    CHECK(rt.run(reuse()));
}

Task<std::chrono::nanoseconds> measured_sleep(std::chrono::nanoseconds delay) {
    const auto before = Clock::now();
    co_await sleep_for(delay);
    co_return Clock::now() - before;
}

TEST_CASE("timer: never early", "[runtime][timer]") {
    TestRuntime rt;
    for (const auto delay : {1us, 300us, 1500us}) CHECK(rt.run(measured_sleep(delay)) >= delay);
    CHECK(rt.run_on_io(measured_sleep(2ms)) >= 2ms);
}

Task<int> sleep_forever() {
    Timer timer;
    int outcome = 0;
    TaskScope scope;
    scope.spawn(sleep_on(&timer, std::chrono::nanoseconds::max(), &outcome));
    co_await sleep_for(200us);
    if (outcome != 0) co_return -1;
    timer.cancel();
    co_await scope.join();
    co_return outcome;
}

TEST_CASE("timer: a delay beyond the clock never expires", "[runtime][timer]") {
    TestRuntime rt;
    CHECK(rt.run(sleep_forever()) == 2);
}

TEST_CASE("timer: destroying one with a sleeper aborts", "[runtime][timer][death]") {
    const auto text = test::abort_message([] {
        auto* rt = new TestRuntime({.backend = IoBackendKind::kEpoll, .io_loops = 0});
        rt->run([]() -> Task<void> {
            TaskScope scope;
            auto timer = std::make_unique<Timer>();
            int outcome = 0;
            scope.spawn(sleep_on(timer.get(), 1h, &outcome));
            timer.reset();
            co_await scope.join();
        }());
    });
    CHECK_THAT(text, Catch::Contains("a timer is destroyed while somebody sleeps on it"));
}

}  // namespace
}  // namespace gantry
