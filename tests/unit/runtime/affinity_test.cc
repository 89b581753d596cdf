#include "runtime/affinity.h"

#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <thread>

#include "runtime/loop.h"
#include "runtime/runtime.h"
#include "tests/support/test_runtime.h"

using namespace gantry;

namespace {

int allowed_cpus() {
    cpu_set_t set;
    CPU_ZERO(&set);
    REQUIRE(::sched_getaffinity(0, sizeof set, &set) == 0);
    return CPU_COUNT(&set);
}

/// A thread that stays on one CPU until it is told to end.
struct Pinned {
    explicit Pinned(int cpu) {
        thread = std::thread([this, cpu] {
            const bool kept = keep_thread_on(cpu);
            tid = kept ? ::gettid() : -1;
            end.wait(false);
        });
        while (tid.load() == 0) std::this_thread::yield();
    }
    ~Pinned() {
        end = true;
        end.notify_all();
        thread.join();
    }
    std::thread thread;
    std::atomic<int> tid{0};
    std::atomic<bool> end{false};
};

}  // namespace

TEST_CASE("affinity: the CPU of a thread is told by its number", "[runtime][affinity]") {
    note_process_cpus();
    const Pinned other(::sched_getcpu());
    REQUIRE(other.tid > 0);
    CHECK(cpu_of_thread(other.tid) >= 0);
    CHECK(cpu_of_thread(1 << 30) == -1);
}

TEST_CASE("affinity: a loop follows a thread to its CPU, and what it starts there does not stay",
          "[runtime][affinity]") {
    test::TestRuntime rt;
    const int before = allowed_cpus();
    const int cpu = ::sched_getcpu();
    const Pinned client(cpu);
    REQUIRE(client.tid > 0);
    struct Seen {
        bool followed = false;
        int cpu = -1, cpus = 0, pool_cpus = 0, afterwards = 0;
    };
    const auto look = [](int tid) -> Task<Seen> {
        Loop& loop = Loop::current();
        Seen seen;
        seen.followed = loop.follow(tid) && loop.following();
        seen.cpu = ::sched_getcpu();
        seen.cpus = allowed_cpus();
        seen.pool_cpus = co_await run_blocking([] { return allowed_cpus(); });
        loop.unfollow();
        seen.afterwards = loop.following() ? -1 : allowed_cpus();
        co_return seen;
    };
    const Seen seen = rt.run_on_io(look(client.tid));
    REQUIRE(seen.followed);
    CHECK(seen.cpu == cpu);
    CHECK(seen.cpus == 1);
    CHECK(seen.pool_cpus == before);
    CHECK(seen.afterwards == before);
}

TEST_CASE("affinity: following ends by itself", "[runtime][affinity]") {
    test::TestRuntime rt;
    const Pinned client(::sched_getcpu());
    REQUIRE(client.tid > 0);
    const auto turn_on = [](int tid) -> Task<int> {
        Loop& loop = Loop::current();
        if (!loop.follow(tid)) co_return -1;
        const uint64_t end = loop.turns() + Loop::kFollowTurns + 2;
        while (loop.turns() < end) co_await sleep_for(std::chrono::nanoseconds(1));
        co_return loop.following() ? -2 : allowed_cpus();
    };
    const int before = allowed_cpus();
    CHECK(rt.run_on_io(turn_on(client.tid)) == before);
}

TEST_CASE("affinity: who is not there is not followed", "[runtime][affinity]") {
    test::TestRuntime rt;
    const auto look = []() -> Task<bool> {
        const bool followed = Loop::current().follow(1 << 30);
        co_return followed || Loop::current().following();
    };
    CHECK_FALSE(rt.run_on_io(look()));
}
