#include <signal.h>
#include <sys/wait.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <latch>
#include <set>

#include "runtime/blocking_pool.h"
#include "runtime/signal.h"
#include "runtime/task_scope.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;

Task<std::string> off_and_back() {
    const auto home = std::this_thread::get_id();
    int touched = 0;
    const auto away = co_await run_blocking([&touched] {
        ++touched;
        return std::this_thread::get_id();
    });
    co_await run_blocking([&touched] { ++touched; });
    if (away == home) co_return "ran on the loop";
    if (std::this_thread::get_id() != home) co_return "came back elsewhere";
    co_return touched == 2 ? "good" : "lost";
}

TEST_CASE("pool: blocking work runs elsewhere and its value comes home", "[runtime][pool]") {
    TestRuntime rt;
    CHECK(rt.run(off_and_back()) == "good");
    CHECK(rt.run_on_io(off_and_back()) == "good");
}

Task<void> meet(std::latch* everyone) {
    co_await run_blocking([everyone] { everyone->arrive_and_wait(); });
}
Task<int> meet_all(int n) {
    std::latch everyone(n);
    TaskScope scope;
    for (int i = 0; i < n; ++i) scope.spawn(meet(&everyone));
    co_await scope.join();
    co_return n;
}

TEST_CASE("pool: as many run at once as there are threads", "[runtime][pool]") {
    TestRuntime rt;  // 8 threads
    CHECK(rt.run(meet_all(8)) == 8);
    CHECK(rt.run(meet_all(8)) == 8);  // the same threads again
}

Task<void> one_call(std::atomic<int>* now, std::atomic<int>* peak, int* done) {
    co_await run_blocking([&] {
        const int n = ++*now;
        int p = *peak;
        while (n > p && !peak->compare_exchange_weak(p, n)) {
        }
        std::this_thread::yield();
        --*now;
    });
    ++*done;
}
Task<int> many_calls(std::atomic<int>* peak, int n) {
    std::atomic<int> now{0};
    int done = 0;
    TaskScope scope;
    for (int i = 0; i < n; ++i) scope.spawn(one_call(&now, peak, &done));
    co_await scope.join();
    co_return done;
}

TEST_CASE("pool: thousands of calls share a bounded number of threads", "[runtime][pool][stress]") {
    TestRuntime rt;
    std::atomic<int> peak{0};
    CHECK(rt.run(many_calls(&peak, 5000)) == 5000);
    CHECK(peak <= 8);
    CHECK(peak >= 1);
}

TEST_CASE("pool: the destructor runs what is queued", "[runtime][pool]") {
    struct Item : PoolItem {
        std::atomic<int>* count = nullptr;
    };
    std::atomic<int> count{0};
    std::vector<Item> items(200);
    {
        BlockingPool pool(2);
        for (Item& item : items) {
            item.count = &count;
            item.run = [](PoolItem* i) { ++*static_cast<Item*>(i)->count; };
            pool.submit(item);
        }
    }
    CHECK(count == 200);
}

Task<bool> pool_thread_takes_no_signals() {
    const bool blocked = co_await run_blocking([] {
        sigset_t mask;
        pthread_sigmask(SIG_SETMASK, nullptr, &mask);
        return sigismember(&mask, SIGTERM) == 1 && sigismember(&mask, SIGINT) == 1;
    });
    co_return blocked;
}

TEST_CASE("pool: its threads take no signals", "[runtime][pool]") {
    TestRuntime rt;
    CHECK(rt.run(pool_thread_takes_no_signals()));
}

Task<void> collect_signals(SignalWaiter* waiter, std::vector<int>* out) {
    for (;;) {
        const int s = co_await waiter->next();
        out->push_back(s);
        if (s == 0) break;
    }
}
Task<std::vector<int>> signal_story(SignalWaiter* waiter) {
    std::vector<int> got;
    TaskScope scope;
    scope.spawn(collect_signals(waiter, &got));
    ::kill(::getpid(), SIGHUP);
    co_await test::wait_until([&] { return got.size() == 1; });
    ::kill(::getpid(), SIGTERM);
    co_await test::wait_until([&] { return got.size() == 2; });
    waiter->cancel();
    co_await scope.join();
    const int after = co_await waiter->next();
    got.push_back(after);
    co_return got;
}

TEST_CASE("signals: arrive as events of the loop, and the wait can be cancelled", "[runtime][signal]") {
    // In a child, so that the mask of the test program stays as it is.
    const pid_t child = ::fork();
    if (child == 0) {
        for (const int s : {SIGABRT, SIGSEGV, SIGTERM, SIGHUP}) ::signal(s, SIG_DFL);
        block_signals();
        int status = 1;
        {
            TestRuntime rt;
            auto waiter = SignalWaiter::create();
            if (waiter && rt.run(signal_story(&*waiter)) == std::vector<int>{SIGHUP, SIGTERM, 0, 0}) status = 0;
        }
        if (::raise(SIGPIPE) != 0) status = 2;
        ::_exit(status);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

}  // namespace
}  // namespace gantry
