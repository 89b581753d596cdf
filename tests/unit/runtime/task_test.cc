#include "runtime/task.h"

#include <catch2/catch.hpp>

#include "runtime/timer.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;

Task<int> add(int a, int b) { co_return a + b; }

Task<Result<int>> half(int n) {
    if (n % 2 != 0) co_return fail(ErrorKind::kInvalid, "{} is odd", n);
    co_return n / 2;
}

Task<Result<int>> quarter(int n) {
    CO_TRY(const int h, co_await half(n));
    CO_TRY(const int q, co_await half(h));
    co_return q;
}

Task<int64_t> sum_of_awaits(int64_t n) {
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int one = co_await add(static_cast<int>(i & 1), 1);
        sum += one;
    }
    co_return sum;
}

Task<uintptr_t> stack_position() { co_return reinterpret_cast<uintptr_t>(__builtin_frame_address(0)); }

Task<size_t> stack_growth(int n) {
    const uintptr_t first = co_await stack_position();
    uintptr_t last = first;
    for (int i = 0; i < n; ++i) last = co_await stack_position();
    co_return first > last ? first - last : last - first;
}

TEST_CASE("task: returns its value to the awaiter", "[runtime][task]") {
    TestRuntime rt;
    CHECK(rt.run(add(20, 22)) == 42);
}

TEST_CASE("task: errors travel through CO_TRY", "[runtime][task]") {
    TestRuntime rt;
    CHECK(*rt.run(quarter(8)) == 2);
    auto r = rt.run(quarter(6));
    REQUIRE_FALSE(r);
    CHECK(r.error().message() == "3 is odd");
    CHECK(r.error().kind() == ErrorKind::kInvalid);
}

TEST_CASE("task: an unstarted task frees its frame and its parameters", "[runtime][task]") {
    auto shared = std::make_shared<int>(7);
    {
        auto never = [](std::shared_ptr<int> p) -> Task<int> { co_return *p; }(shared);
        CHECK(shared.use_count() == 2);
    }
    CHECK(shared.use_count() == 1);
}

TEST_CASE("task: a million synchronous awaits do not grow the stack", "[runtime][task]") {
    TestRuntime rt;
    CHECK(rt.run(sum_of_awaits(1'000'000)) == 1'500'000);
    CHECK(rt.run(stack_growth(1'000'000)) < 4096);
}

}  // namespace
}  // namespace gantry
