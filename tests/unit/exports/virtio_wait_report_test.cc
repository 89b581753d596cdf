// WaitReport: who waits long is told of, who does not is not.

#include <catch2/catch.hpp>

#include "exports/virtio/wait_report.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::test;
using namespace std::chrono_literals;

TEST_CASE("virtio wait report: says again and again that something is waited for, until it is over", "[virtio][wait]") {
    TestRuntime runtime;
    int said = 0;
    runtime.run([](int* count) -> Task<void> {
        virtio::WaitReport report([count](std::chrono::seconds) { ++*count; }, 1ms, 1ms);
        const bool told = co_await wait_until([count] { return *count >= 3; });
        CHECK(told);
        co_await report.over();
    }(&said));
    const int before = said;
    runtime.run([](int* count) -> Task<void> {
        virtio::WaitReport report([count](std::chrono::seconds) { ++*count; }, 1h, 1ms);
        co_await yield_turn();
        co_await report.over();
    }(&said));
    CHECK(said == before);
}
