// Poller: work that shows up in memory.

#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "runtime/cross_loop.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

/// A counter that another thread raises; `bell` rings when the loop asks for that.
struct Box final : Poller {
    std::atomic<int> filled{0};
    std::atomic<bool> wants_bell{false};
    int taken = 0;
    int sleeps = 0;
    std::coroutine_handle<> waiting;
    UniqueFd bell{::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)};

    bool poll() override {
        if (!waiting || filled.load(std::memory_order_seq_cst) == taken) return false;
        Loop::current().ready(std::exchange(waiting, {}));
        return true;
    }
    bool before_sleep() override {
        ++sleeps;
        wants_bell.store(true, std::memory_order_seq_cst);
        return poll();
    }
    void after_sleep() override { wants_bell.store(false, std::memory_order_relaxed); }

    struct Awaiter {
        Box& box;
        bool await_ready() const { return false; }
        void await_suspend(std::coroutine_handle<> h) { box.waiting = h; }
        void await_resume() const {}
    };
    void fill() {
        filled.fetch_add(1, std::memory_order_seq_cst);
        if (wants_bell.exchange(false)) {
            const uint64_t one = 1;
            [[maybe_unused]] const auto n = ::write(bell.get(), &one, sizeof one);
        }
    }
};

Task<void> hear_bell(Box* box, bool* done) {
    while (!*done) {
        const int events = co_await io_poll(box->bell.get(), POLLIN);
        GANTRY_CHECK(events > 0, "a bell can be waited for");
        uint64_t count;
        [[maybe_unused]] const auto n = ::read(box->bell.get(), &count, sizeof count);
    }
}

Task<void> empty_box(Box* box, int count) {
    Loop& loop = Loop::current();
    loop.add_poller(*box);
    bool done = false;
    TaskScope scope;
    scope.spawn(hear_bell(box, &done));
    while (box->taken < count) {
        const int filled = box->filled.load(std::memory_order_acquire);
        if (filled == box->taken) {
            co_await Box::Awaiter{*box};
            continue;
        }
        box->taken = filled;
    }
    loop.remove_poller(*box);
    done = true;
    const uint64_t one = 1;
    [[maybe_unused]] const auto n = ::write(box->bell.get(), &one, sizeof one);
    co_await scope.join();
    loop.forget_fd(box->bell.get());
}

void run_box(std::optional<std::chrono::nanoseconds> poll_max) {
    test::TestRuntime rt;
    const Result<Loop*> loop = rt.runtime->add_loop("box", poll_max);
    REQUIRE(loop);
    constexpr int kCount = 3000;
    Box box;
    std::thread peer([&box] {
        for (int i = 0; i < kCount; ++i) {
            box.fill();
            // Sometimes long enough for the loop to sleep.
            if (i % 64 == 0) std::this_thread::sleep_for(std::chrono::microseconds(200));
        }
    });
    rt.run(run_on(**loop, empty_box(&box, kCount)));
    peer.join();
    CHECK(box.taken == kCount);
    CHECK(box.sleeps > 0);
    rt.runtime->remove_loop(*loop);
}

TEST_CASE("loop: a poller loses nothing between looking and sleeping", "[runtime][loop]") {
    run_box(std::chrono::nanoseconds(0));
    run_box(std::chrono::microseconds(30));
    run_box(std::nullopt);
}

Task<bool> found_while_expected(Box* box) {
    Loop& loop = Loop::current();
    loop.add_poller(*box);
    loop.expect_soon(std::chrono::seconds(30));
    std::thread peer([box] {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        box->filled.store(1, std::memory_order_release);  // no bell
    });
    co_await Box::Awaiter{*box};
    peer.join();
    loop.remove_poller(*box);
    co_return box->sleeps == 0;
}

TEST_CASE("loop: what is expected may show up in memory", "[runtime][loop]") {
    test::TestRuntime rt;
    Box box;
    CHECK(rt.run(found_while_expected(&box)));
}

}  // namespace
}  // namespace gantry
