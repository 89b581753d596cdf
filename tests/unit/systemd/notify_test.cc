#include "systemd/notify.h"

#include <unistd.h>

#include <catch2/catch.hpp>

#include "fake_manager.h"

using gantry::systemd::Notifier;
using gantry::test::Environment;
using gantry::test::FakeManager;

TEST_CASE("notify: without a manager nothing is sent", "[systemd]") {
    ::unsetenv("NOTIFY_SOCKET");
    Notifier notifier = Notifier::from_environment();
    CHECK_FALSE(notifier.active());
    CHECK_FALSE(notifier.send("READY=1\n"));
    CHECK(notifier.watchdog_interval().count() == 0);
}

TEST_CASE("notify: each message is one datagram of lines", "[systemd]") {
    const bool abstract = GENERATE(false, true);
    FakeManager manager(abstract);
    Environment variable("NOTIFY_SOCKET", manager.address());
    Notifier notifier = Notifier::from_environment();
    CHECK(::getenv("NOTIFY_SOCKET") == nullptr);  // children do not inherit it
    REQUIRE(notifier.active());
    notifier.ready("3 exports");
    CHECK(manager.receive() == "READY=1\nSTATUS=3 exports\n");
    notifier.status("2 exports");
    CHECK(manager.receive() == "STATUS=2 exports\n");
    notifier.watchdog();
    CHECK(manager.receive() == "WATCHDOG=1\n");
    notifier.error(13);
    CHECK(manager.receive() == "ERRNO=13\n");
    notifier.stopping();
    CHECK(manager.receive() == "STOPPING=1\nSTATUS=Stopping\n");
    CHECK(notifier.send("MAINPID=1\n"));
    CHECK(manager.receive() == "MAINPID=1\n");
}

TEST_CASE("notify: addresses of other managers are ignored", "[systemd]") {
    const std::string address =
        GENERATE(as<std::string>(), "vsock:2:1234", "relative", "", std::string(200, 'x'), "/" + std::string(200, 'x'));
    Environment variable("NOTIFY_SOCKET", address);
    CHECK_FALSE(Notifier::from_environment().active());
}

TEST_CASE("notify: a manager that is gone or does not read costs nothing", "[systemd]") {
    Notifier notifier;
    {
        FakeManager manager;
        Environment variable("NOTIFY_SOCKET", manager.address());
        notifier = Notifier::from_environment();
        int sent = 0;
        while (sent < 100000 && notifier.send("STATUS=x\n")) sent++;
        CHECK(sent > 0);
        CHECK(sent < 100000);  // its queue is full: refused, not waited for
    }
    CHECK_FALSE(notifier.send("READY=1\n"));
}

TEST_CASE("notify: the watchdog's interval is for this process alone", "[systemd]") {
    const std::string self = std::to_string(::getpid());
    auto [usec, pid, expected] = GENERATE_COPY(table<std::string, std::string, int64_t>({
        {"30000000", self, 30000000},
        {"30000000", "1", 0},
        {"0", self, 0},
        {"soon", self, 0},
        {"-5", self, 0},
        {"500x", self, 0},
    }));
    Environment interval("WATCHDOG_USEC", usec);
    Environment owner("WATCHDOG_PID", pid);
    CHECK(Notifier::from_environment().watchdog_interval().count() == expected);
    CHECK(::getenv("WATCHDOG_USEC") == nullptr);
}
