#include "systemd/watchdog.h"

#include <atomic>
#include <catch2/catch.hpp>
#include <chrono>
#include <future>

#include "fake_manager.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace std::chrono_literals;
using gantry::systemd::Notifier;
using gantry::systemd::Watchdog;

namespace {

Notifier watched(test::FakeManager& manager, std::chrono::microseconds interval) {
    test::Environment socket("NOTIFY_SOCKET", manager.address());
    test::Environment usec("WATCHDOG_USEC", std::to_string(interval.count()));
    return Notifier::from_environment();
}

/// Runs the main loop for a while: that is where the watchdog lives.
Task<void> serve(std::chrono::nanoseconds time) { co_await sleep_for(time); }
Task<void> start(Watchdog* watchdog) {
    watchdog->start();
    co_return;
}

int count_messages(test::FakeManager& manager) {
    int n = 0;
    while (manager.receive(0) == "WATCHDOG=1\n") n++;
    return n;
}

}  // namespace

TEST_CASE("watchdog: signs of life come every half interval", "[systemd]") {
    test::TestRuntime rt;
    test::FakeManager manager;
    Notifier notifier = watched(manager, 100ms);
    Watchdog watchdog(*rt.runtime, notifier);
    rt.run(start(&watchdog));
    rt.run(serve(1s));
    rt.run(watchdog.stop());
    const int n = count_messages(manager);
    CHECK(n >= 10);  // 20 on an idle machine
    CHECK(n <= 22);
    rt.run(serve(200ms));
    CHECK(count_messages(manager) == 0);
}

TEST_CASE("watchdog: silent when the manager asks for none", "[systemd]") {
    test::TestRuntime rt;
    test::FakeManager manager;
    Notifier notifier = watched(manager, 0us);
    Watchdog watchdog(*rt.runtime, notifier);
    rt.run(start(&watchdog));
    rt.run(serve(100ms));
    rt.run(watchdog.stop());
    CHECK(count_messages(manager) == 0);
}

TEST_CASE("watchdog: a loop that hangs ends the signs of life until it answers", "[systemd]") {
    test::TestRuntime rt;
    test::FakeManager manager;
    Notifier notifier = watched(manager, 50ms);
    Watchdog watchdog(*rt.runtime, notifier);
    rt.run(start(&watchdog));
    CHECK(manager.receive() == "WATCHDOG=1\n");
    std::promise<void> hung, release;
    Loop* added = rt.runtime->add_loop("hangs", 0ns).value();
    added->post([&] {
        hung.set_value();
        release.get_future().wait();
    });
    hung.get_future().wait();
    rt.run(serve(100ms));  // the rounds that began before are over
    (void)count_messages(manager);
    rt.run(serve(300ms));
    CHECK(count_messages(manager) == 0);
    release.set_value();
    bool alive = false;
    for (int i = 0; i < 100 && !alive; i++) {
        rt.run(serve(50ms));
        alive = count_messages(manager) > 0;
    }
    CHECK(alive);
    rt.run(watchdog.stop());
    rt.runtime->remove_loop(added);
}

TEST_CASE("watchdog: stops at once, also with a long interval and a loop taken away", "[systemd]") {
    test::TestRuntime rt;
    test::FakeManager manager;
    Notifier notifier = watched(manager, 1h);
    Watchdog watchdog(*rt.runtime, notifier);
    Loop* added = rt.runtime->add_loop("short", 0ns).value();
    rt.run(start(&watchdog));
    rt.runtime->remove_loop(added);
    const auto begin = std::chrono::steady_clock::now();
    rt.run(watchdog.stop());
    CHECK(std::chrono::steady_clock::now() - begin < 10s);
    CHECK(count_messages(manager) == 1);
}
