#include "runtime/sync.h"

#include <atomic>
#include <catch2/catch.hpp>

#include "runtime/task_scope.h"
#include "tests/support/death_test.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;
using namespace std::chrono_literals;

struct Shared {
    AsyncMutex mutex;
    int value = 0;   // guarded by mutex
    int inside = 0;  // guarded by mutex
    bool overlapped = false;
};

Task<void> add_under_mutex(Shared* s, int rounds) {
    for (int i = 0; i < rounds; ++i) {
        auto guard = co_await s->mutex.lock();
        if (++s->inside != 1) s->overlapped = true;
        if (i % 8 == 0) co_await yield_turn();
        ++s->value;
        --s->inside;
    }
}

Task<void> on_loop(Loop* loop, Task<void> task) { co_await run_on(*loop, std::move(task)); }

Task<void> add_from_all_loops(TestRuntime* rt, Shared* s) {
    TaskScope scope;
    for (Loop* loop : rt->runtime->all_loops()) {
        for (int i = 0; i < 3; ++i) scope.spawn(on_loop(loop, add_under_mutex(s, 500)));
    }
    co_await scope.join();
}

TEST_CASE("sync: a mutex excludes coroutines of all loops", "[runtime][sync]") {
    TestRuntime rt;
    Shared s;
    rt.run(add_from_all_loops(&rt, &s));
    CHECK(s.value == 3 * 500 * static_cast<int>(rt.runtime->all_loops().size()));
    CHECK_FALSE(s.overlapped);
}

struct Order {
    AsyncMutex mutex;
    std::vector<int> got;
};
Task<void> lock_and_note(Order* o, int id) {
    auto guard = co_await o->mutex.lock();
    o->got.push_back(id);
}
Task<void> queue_up(TestRuntime* rt, Order* o) {
    TaskScope scope;
    auto guard = co_await o->mutex.lock();
    for (int i = 0; i < 10; ++i) {
        // Each waits in the queue before the next comes: alternately of this loop and of another.
        Loop& loop = i % 2 ? rt->io_loop(static_cast<size_t>(i)) : rt->main_loop();
        scope.spawn(on_loop(&loop, lock_and_note(o, i)));
        if (i % 2) co_await run_on(loop, []() -> Task<void> { co_await yield_turn(); }());
    }
    if (o->mutex.try_lock()) o->got.push_back(-1);
    guard.unlock();
    // Nobody barges in: the first in the queue owns it already.
    if (o->mutex.try_lock()) o->got.push_back(-2);
    co_await scope.join();
}

TEST_CASE("sync: a mutex serves waiters of several loops first come, first served", "[runtime][sync]") {
    TestRuntime rt;
    Order o;
    rt.run(queue_up(&rt, &o));
    CHECK(o.got == std::vector<int>{0, 1, 2, 3, 4, 5, 6, 7, 8, 9});
    CHECK(o.mutex.try_lock());
}

Task<void> wait_and_count(AsyncEvent* e, std::atomic<int>* n) {
    co_await e->wait();
    ++*n;
}
Task<int> event_story(TestRuntime* rt) {
    AsyncEvent event;
    std::atomic<int> woken{0};
    TaskScope scope;
    for (Loop* loop : rt->runtime->all_loops()) {
        for (int i = 0; i < 20; ++i) scope.spawn(on_loop(loop, wait_and_count(&event, &woken)));
    }
    co_await sleep_for(1ms);
    if (woken != 0) co_return -1;
    event.set();
    const int inline_wakes = woken;  // those of this loop cannot have run yet
    co_await scope.join();
    co_await event.wait();  // stays set
    event.reset();
    if (event.is_set() || inline_wakes > static_cast<int>(20 * rt->io_loop_count())) co_return -2;
    co_return woken;
}

TEST_CASE("sync: an event wakes the waiters of all loops and stays set until reset", "[runtime][sync]") {
    TestRuntime rt;
    CHECK(rt.run(event_story(&rt)) == 20 * static_cast<int>(rt.runtime->all_loops().size()));
}

Task<void> sleeper(WaitQueue* q, std::vector<int>* out, int id) {
    co_await q->wait();
    out->push_back(id);
}
Task<std::vector<int>> notify_story() {
    WaitQueue queue;
    std::vector<int> out;
    TaskScope scope;
    queue.notify_all();  // nobody there: not remembered
    for (int i = 0; i < 5; ++i) scope.spawn(sleeper(&queue, &out, i));
    queue.notify_one();
    co_await yield_turn();
    out.push_back(10);
    queue.notify_one();
    queue.notify_one();
    co_await yield_turn();
    out.push_back(11);
    queue.notify_all();
    co_await scope.join();
    if (!queue.empty()) out.push_back(-1);
    co_return out;
}

TEST_CASE("sync: a wait queue wakes one or all, in order, without memory", "[runtime][sync]") {
    TestRuntime rt;
    CHECK(rt.run(notify_story()) == std::vector<int>{0, 10, 1, 2, 11, 3, 4});
}

Task<void> take(AsyncSemaphore* s, uint64_t units, int id, std::vector<int>* out) {
    co_await s->acquire(units);
    out->push_back(id);
}
Task<std::vector<int>> semaphore_story() {
    AsyncSemaphore s(4);
    std::vector<int> out;
    TaskScope scope;
    co_await s.acquire(3);
    scope.spawn(take(&s, 4, 0, &out));  // waits
    scope.spawn(take(&s, 1, 1, &out));  // one is free, but the big one came first
    co_await yield_turn();
    out.push_back(10);
    s.release(3);
    co_await yield_turn();
    out.push_back(11);
    s.release(4);
    co_await scope.join();
    co_return out;
}

TEST_CASE("sync: a semaphore does not let small requests overtake a big one", "[runtime][sync]") {
    TestRuntime rt;
    CHECK(rt.run(semaphore_story()) == std::vector<int>{10, 0, 11, 1});
}

struct Level {
    std::atomic<int> now{0};
    std::atomic<int> peak{0};
};
Task<void> bounded_work(AsyncSemaphore* s, Level* level, int rounds) {
    for (int i = 0; i < rounds; ++i) {
        co_await s->acquire(1);
        const int n = ++level->now;
        int peak = level->peak;
        while (n > peak && !level->peak.compare_exchange_weak(peak, n)) {
        }
        co_await yield_turn();
        --level->now;
        s->release(1);
    }
}
Task<void> bounded_everywhere(TestRuntime* rt, AsyncSemaphore* s, Level* level) {
    TaskScope scope;
    for (Loop* loop : rt->runtime->all_loops()) {
        for (int i = 0; i < 5; ++i) scope.spawn(on_loop(loop, bounded_work(s, level, 100)));
    }
    co_await scope.join();
}

TEST_CASE("sync: a semaphore bounds work over all loops", "[runtime][sync]") {
    TestRuntime rt;
    AsyncSemaphore s(3);
    Level level;
    rt.run(bounded_everywhere(&rt, &s, &level));
    CHECK(level.now == 0);
    CHECK(level.peak <= 3);
    CHECK(level.peak > 0);
}

TEST_CASE("sync: destroying a held mutex aborts", "[runtime][sync][death]") {
    const auto text = test::abort_message([] {
        auto mutex = std::make_unique<AsyncMutex>();
        auto guard = mutex->try_lock();
        mutex.reset();
    });
    CHECK_THAT(text, Catch::Contains("an AsyncMutex is destroyed while held"));
}

}  // namespace
}  // namespace gantry
