// Measurements, not run by default: `test_runtime "[speed]"` of a release build prints nanoseconds per operation.

#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <iostream>

#include "runtime/buffer.h"
#include "runtime/io.h"
#include "runtime/iovec.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TestRuntime;

double report(const char* what, Clock::time_point since, int64_t n) {
    const double ns = std::chrono::duration<double, std::nano>(Clock::now() - since).count() / static_cast<double>(n);
    std::cout << what << ": " << ns << " ns\n";
    return ns;
}

[[gnu::noinline]] Task<int> leaf(int n) { co_return n; }
[[gnu::noinline]] Task<int> middle(int n) {
    const int r = co_await leaf(n);
    co_return r + 1;
}
Task<double> nested(int64_t n) {
    const auto start = Clock::now();
    int64_t sum = 0;
    for (int64_t i = 0; i < n; ++i) {
        const int r = co_await middle(1);
        sum += r;
    }
    co_return sum == 2 * n ? report("nested synchronous task, per layer", start, 2 * n) : 1e9;
}

Task<void> nothing() { co_return; }
Task<double> spawning(int64_t n) {
    const auto start = Clock::now();
    TaskScope scope;
    for (int64_t i = 0; i < n; ++i) scope.spawn(nothing());
    co_await scope.join();
    co_return report("spawn of a task that ends at once", start, n);
}

Task<double> yielding(int64_t n) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < n; ++i) co_await yield_turn();
    co_return report("yield", start, n);
}

Task<double> locking(int64_t n) {
    AsyncMutex mutex;
    const auto start = Clock::now();
    for (int64_t i = 0; i < n; ++i) auto guard = co_await mutex.lock();
    co_return report("uncontended AsyncMutex", start, n);
}

Task<double> hopping(Loop* other, Loop* home, int64_t n) {
    const auto start = Clock::now();
    for (int64_t i = 0; i < n; ++i) {
        co_await switch_to(*other);
        co_await switch_to(*home);
    }
    co_return report("hop to another loop", start, 2 * n);
}

Task<double> echoing(int a, int b, int64_t n) {
    const auto start = Clock::now();
    char c = 'x';
    for (int64_t i = 0; i < n; ++i) {
        co_await io_send(a, &c, 1);
        co_await io_recv(b, &c, 1);
    }
    co_return report("send and recv of one byte on one loop", start, n);
}

TEST_CASE("speed: tasks, scopes, locks, hops", "[.][speed]") {
    TestRuntime rt;
    std::cout << rt.main_loop().backend_name() << "\n";
    CHECK(rt.run(nested(5'000'000)) < 500);
    CHECK(rt.run(spawning(2'000'000)) < 1000);
    CHECK(rt.run(yielding(5'000'000)) < 500);
    CHECK(rt.run(locking(5'000'000)) < 500);
    CHECK(rt.run(hopping(&rt.io_loop(), &rt.main_loop(), 50'000)) < 1'000'000);
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    const UniqueFd a(fds[0]), b(fds[1]);
    CHECK(rt.run(echoing(a.get(), b.get(), 200'000)) < 1'000'000);
}

TEST_CASE("speed: buffers and zero detection", "[.][speed]") {
    constexpr int64_t kRounds = 1'000'000;
    auto start = Clock::now();
    for (int64_t i = 0; i < kRounds; ++i) {
        Buffer b = Buffer::alloc(64 * 1024);
        b.data()[0] = static_cast<uint8_t>(i);
    }
    CHECK(report("64 KiB buffer from the cache", start, kRounds) < 5000);
    const std::vector<uint8_t> zero(64 * 1024);
    start = Clock::now();
    int64_t zeroes = 0;
    for (int64_t i = 0; i < 20'000; ++i)
        zeroes += memory_is_zero(zero.data(), zero.size() - static_cast<size_t>(i % 2));
    CHECK(zeroes == 20'000);
    CHECK(report("64 KiB of zeroes recognised", start, 20'000) < 100'000);
}

}  // namespace
}  // namespace gantry
