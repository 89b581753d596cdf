#include "runtime/loop.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "tests/support/death_test.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;
using namespace std::chrono_literals;

Task<void> record(std::vector<int>* out, int value) {
    co_await yield_turn();
    out->push_back(value);
}

Task<void> spawn_three(std::vector<int>* out) {
    TaskScope scope;
    for (int i = 0; i < 3; ++i) scope.spawn(record(out, i));
    out->push_back(100);
    co_await scope.join();
    out->push_back(200);
}

TEST_CASE("loop: ready coroutines run in order, never inline", "[runtime][loop]") {
    TestRuntime rt;
    std::vector<int> order;
    rt.run(spawn_three(&order));
    CHECK(order == std::vector<int>{100, 0, 1, 2, 200});
}

struct Counted : PostItem {
    std::vector<int>* out = nullptr;
    int value = 0;
};

TEST_CASE("loop: what one thread posts runs in its order", "[runtime][loop]") {
    TestRuntime rt;
    std::vector<int> order;
    std::vector<Counted> items(1000);
    AsyncEvent all;
    std::thread poster([&] {
        for (int i = 0; i < 1000; ++i) {
            items[static_cast<size_t>(i)].out = &order;
            items[static_cast<size_t>(i)].value = i;
            items[static_cast<size_t>(i)].run = [](PostItem* p) {
                auto* self = static_cast<Counted*>(p);
                self->out->push_back(self->value);
            };
            rt.main_loop().post(items[static_cast<size_t>(i)]);
        }
        rt.main_loop().post([&all] { all.set(); });
    });
    rt.run([](AsyncEvent* e) -> Task<void> { co_await e->wait(); }(&all));
    poster.join();
    REQUIRE(order.size() == 1000);
    CHECK(std::is_sorted(order.begin(), order.end()));
}

TEST_CASE("loop: posting from many threads loses nothing", "[runtime][loop][stress]") {
    TestRuntime rt;
    constexpr int kThreads = 8, kPosts = 5000;
    std::atomic<int> ran{0};
    AsyncEvent all;
    std::vector<std::thread> threads;
    for (int t = 0; t < kThreads; ++t) {
        threads.emplace_back([&] {
            for (int i = 0; i < kPosts; ++i) {
                rt.main_loop().post([&] {
                    if (++ran == kThreads * kPosts) all.set();
                });
                if (i % 64 == 0) std::this_thread::yield();
            }
        });
    }
    rt.run([](AsyncEvent* e) -> Task<void> { co_await e->wait(); }(&all));
    for (auto& t : threads) t.join();
    CHECK(ran == kThreads * kPosts);
}

/// Plays ping-pong with a loop that sleeps between the strokes: a lost wake-up hangs.
TEST_CASE("loop: a post reaches a loop that is just going to sleep", "[runtime][loop][stress]") {
    TestRuntime rt;
    Loop& io = rt.io_loop();
    std::atomic<int> pong{0};
    for (int i = 1; i <= 20'000; ++i) {
        io.post([&pong, i] { pong.store(i, std::memory_order_release); });
        const auto deadline = Clock::now() + 20s;
        while (pong.load(std::memory_order_acquire) != i && Clock::now() < deadline) {
            if (i % 3 == 0) std::this_thread::yield();
        }
        if (pong != i) FAIL("stroke " << i << " was lost");
    }
    CHECK(pong == 20'000);
}

Task<int> hop(TestRuntime* rt, int rounds) {
    int hops = 0;
    for (int i = 0; i < rounds; ++i) {
        for (size_t l = 0; l < rt->io_loop_count(); ++l) {
            co_await switch_to(rt->io_loop(l));
            if (rt->io_loop(l).in_loop()) ++hops;
        }
    }
    co_await switch_to(rt->main_loop());
    co_return hops;
}

TEST_CASE("loop: a coroutine travels over all loops and back", "[runtime][loop]") {
    TestRuntime rt;
    CHECK(rt.run(hop(&rt, 500)) == 500 * static_cast<int>(rt.io_loop_count()));
    CHECK(Loop::current_or_null() == nullptr);
}

Task<std::string> name_of_loop() {
    co_await yield_turn();
    co_return Loop::current().name();
}
Task<std::string> ask(Loop* loop) {
    auto name = co_await run_on(*loop, name_of_loop());
    if (Loop::current().name() != "main") co_return "came back elsewhere";
    co_return name;
}

TEST_CASE("loop: run_on runs there and returns here", "[runtime][loop]") {
    TestRuntime rt;
    CHECK(rt.run(ask(&rt.io_loop())) == rt.io_loop().name());
    CHECK(rt.run(ask(&rt.main_loop())) == "main");
}

Task<void> greedy(std::atomic<bool>* stop) {
    while (!*stop) co_await yield_turn();
}
Task<bool> io_beside_greedy() {
    std::atomic<bool> stop{false};
    TaskScope scope;
    scope.spawn(greedy(&stop));
    co_await sleep_for(2ms);  // needs the loop to come round although somebody is always ready
    stop = true;
    co_await scope.join();
    co_return true;
}

TEST_CASE("loop: a coroutine that is always ready does not starve timers", "[runtime][loop]") {
    TestRuntime rt;
    CHECK(rt.run(io_beside_greedy()));
}

TEST_CASE("loop: stop before run is not forgotten, and run may be called again", "[runtime][loop]") {
    TestRuntime rt;
    Loop& loop = rt.main_loop();
    loop.stop();
    loop.run();
    bool ran = false;
    loop.post([&] {
        ran = true;
        loop.stop();
    });
    loop.run();
    CHECK(ran);
    std::thread stopper([&] { loop.stop(); });
    loop.run();
    stopper.join();
}

TEST_CASE("loop: what was posted and never ran is freed", "[runtime][loop]") {
    auto shared = std::make_shared<int>(1);
    {
        TestRuntime rt;
        rt.main_loop().post([shared] { FAIL("ran without a turn"); });
        CHECK(shared.use_count() == 2);
    }
    CHECK(shared.use_count() == 1);
}

TEST_CASE("loop: busy polling answers posts, timers and stop", "[runtime][loop]") {
    TestRuntime rt;
    rt.io_loop().set_poll_max(200us);
    CHECK(rt.io_loop().poll_max() == 200us);
    CHECK(rt.run(hop(&rt, 2000)) == 2000 * static_cast<int>(rt.io_loop_count()));
    CHECK(rt.run_on_io([]() -> Task<int> {
        for (int i = 0; i < 20; ++i) co_await sleep_for(100us);
        co_return 20;
    }()) == 20);
}

TEST_CASE("loop: current() without a loop aborts", "[runtime][loop][death]") {
    CHECK_THAT(test::abort_message([] { Loop::current(); }), Catch::Contains("runs no loop"));
}

TEST_CASE("runtime: loops are added and removed at run time", "[runtime]") {
    TestRuntime rt;
    const size_t before = rt.runtime->all_loops().size();
    CHECK(before == rt.io_loop_count() + 1);
    auto loop = rt.runtime->add_loop("iothread-with-a-long-name", 10us);
    REQUIRE(loop);
    CHECK(rt.runtime->all_loops().size() == before + 1);
    CHECK(rt.run(ask(*loop)) == "iothread-with-a-long-name");
    CHECK((*loop)->thread_id() != 0);
    CHECK((*loop)->backend_name() == rt.main_loop().backend_name());
    rt.runtime->remove_loop(*loop);
    CHECK(rt.runtime->all_loops().size() == before);
}

TEST_CASE("runtime: without I/O loops the main loop serves", "[runtime]") {
    auto options = test::runtime_options_from_env();
    options.io_loops = 0;
    TestRuntime rt(options);
    REQUIRE(rt.io_loop_count() == 1);
    CHECK(&rt.io_loop() == &rt.main_loop());
    CHECK_FALSE(rt.runtime->backend_reason().empty());
}

TEST_CASE("runtime: the back end's name is checked", "[runtime]") {
    CHECK(*parse_io_backend("auto") == IoBackendKind::kAuto);
    CHECK(*parse_io_backend("io_uring") == IoBackendKind::kIoUring);
    CHECK(*parse_io_backend("epoll") == IoBackendKind::kEpoll);
    const auto r = parse_io_backend("aio");
    REQUIRE_FALSE(r);
    CHECK(r.error().message() == "I/O back end 'aio' is unknown; use auto, io_uring or epoll");
}

}  // namespace
}  // namespace gantry
