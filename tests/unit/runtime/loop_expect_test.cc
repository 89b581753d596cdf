// Loop::expect_soon(): polling for an announced event.

#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <thread>

#include "runtime/cross_loop.h"
#include "runtime/io.h"
#include "runtime/unique_fd.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

Task<int> expect_in_vain(int rounds) {
    int done = 0;
    for (; done < rounds; ++done) {
        Loop::current().expect_soon(std::chrono::microseconds(20));
        co_await sleep_for(std::chrono::microseconds(50));
    }
    co_return done;
}

Task<int> expect_byte(int fd) {
    char byte;
    Loop::current().expect_soon(std::chrono::seconds(30));
    const int n = co_await io_recv(fd, &byte, 1);
    co_return n;
}

TEST_CASE("loop: what is expected in vain only delays the sleep", "[runtime][loop]") {
    test::TestRuntime rt;
    CHECK(rt.run(expect_in_vain(1000)) == 1000);
}

TEST_CASE("loop: an expected event ends the polling when it comes, long before its limit", "[runtime][loop]") {
    test::TestRuntime rt;
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    const UniqueFd here(fds[0]), there(fds[1]);
    const auto begin = Clock::now();
    std::thread peer([fd = there.get()] { [[maybe_unused]] const auto n = ::send(fd, "x", 1, 0); });
    CHECK(rt.run(expect_byte(here.get())) == 1);
    CHECK(Clock::now() - begin < std::chrono::seconds(15));
    peer.join();
    rt.main_loop().forget_fd(here.get());
}

TEST_CASE("loop: nothing is expected on a loop that was told how long to poll", "[runtime][loop]") {
    test::TestRuntime rt;
    const Result<Loop*> loop = rt.runtime->add_loop("quiet", std::chrono::nanoseconds(0));
    REQUIRE(loop);
    // A wait that polls uses its thread's CPU time up; this one sleeps.
    const auto cpu_time = [] {
        timespec t{};
        ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
        return std::chrono::seconds(t.tv_sec) + std::chrono::nanoseconds(t.tv_nsec);
    };
    const auto wait = [](auto now) -> Task<std::chrono::nanoseconds> {
        const std::chrono::nanoseconds before = now();
        Loop::current().expect_soon(std::chrono::seconds(30));
        co_await sleep_for(std::chrono::milliseconds(200));
        co_return now() - before;
    };
    CHECK(rt.run(run_on(**loop, wait(cpu_time))) < std::chrono::milliseconds(100));
    rt.runtime->remove_loop(*loop);
}

TEST_CASE("runtime: how long loops poll, as a person says it", "[runtime]") {
    CHECK_FALSE(parse_io_poll("auto").value());
    CHECK(parse_io_poll("off").value() == std::chrono::nanoseconds(0));
    CHECK(parse_io_poll("32768").value() == std::chrono::nanoseconds(32768));
    CHECK_FALSE(parse_io_poll("-1"));
    CHECK_FALSE(parse_io_poll("1000000001"));
    CHECK_FALSE(parse_io_poll("1s"));
}

}  // namespace
}  // namespace gantry
