#include "systemd/fd_store.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "fake_manager.h"
#include "runtime/log.h"
#include "tests/support/child.h"

using gantry::UniqueFd;
using gantry::systemd::ActivationSockets;
using gantry::systemd::FdStore;
using gantry::systemd::Notifier;
using gantry::test::Environment;
using gantry::test::FakeManager;

namespace {

ino_t inode(int fd) {
    struct stat st{};
    return ::fstat(fd, &st) == 0 ? st.st_ino : 0;
}

UniqueFd memory(const std::string& text) {
    UniqueFd fd(::memfd_create("test", MFD_CLOEXEC));
    return ::write(fd.get(), text.data(), text.size()) == static_cast<ssize_t>(text.size()) ? std::move(fd)
                                                                                            : UniqueFd();
}

std::string content(int fd) {
    char buffer[100];
    const ssize_t n = ::pread(fd, buffer, sizeof buffer, 0);
    return n < 0 ? "?" : std::string(buffer, static_cast<size_t>(n));
}

}  // namespace

TEST_CASE("fd store: what is put arrives in one message, with its name", "[systemd]") {
    FakeManager manager;
    Environment socket("NOTIFY_SOCKET", manager.address());
    Environment room("FDSTORE", "10");
    Notifier notifier = Notifier::from_environment();
    ActivationSockets nothing;
    FdStore store(notifier, nothing, FdStore::Use::kAuto);
    REQUIRE(store.active());
    CHECK(::getenv("FDSTORE") == nullptr);
    UniqueFd a = memory("a"), b = memory("b");
    const int both[] = {a.get(), b.get()};
    REQUIRE(store.put("fuse-x", both));
    std::vector<UniqueFd> fds;
    CHECK(manager.receive(fds) == "FDSTORE=1\nFDPOLL=0\nFDNAME=gantry-fuse-x\n");
    REQUIRE(fds.size() == 2);
    CHECK(inode(fds[0].get()) == inode(a.get()));
    CHECK(inode(fds[1].get()) == inode(b.get()));
    store.drop("fuse-x");
    CHECK(manager.receive() == "FDSTOREREMOVE=1\nFDNAME=gantry-fuse-x\n");
}

TEST_CASE("fd store: names that the manager would not take are refused", "[systemd]") {
    FakeManager manager;
    Environment socket("NOTIFY_SOCKET", manager.address());
    Notifier notifier = Notifier::from_environment();
    ActivationSockets nothing;
    FdStore store(notifier, nothing, FdStore::Use::kOn);
    UniqueFd a = memory("a");
    const int one[] = {a.get()};
    for (const std::string& name : {std::string(), std::string("a:b"), std::string("a\nb"), std::string(201, 'x')}) {
        INFO(name);
        CHECK_FALSE(store.put(name, one));
    }
    const std::vector<int> many(Notifier::kMaxFds + 1, a.get());
    CHECK_FALSE(store.put("many", many));
    CHECK(store.put("some", std::span(many).first(Notifier::kMaxFds)));
    std::vector<UniqueFd> fds;
    CHECK(manager.receive(fds) == "FDSTORE=1\nFDPOLL=0\nFDNAME=gantry-some\n");
    CHECK(fds.size() == Notifier::kMaxFds);
}

TEST_CASE("fd store: without a manager that has one nothing is stored, and it says why", "[systemd]") {
    ::unsetenv("NOTIFY_SOCKET");
    ::unsetenv("FDSTORE");
    Notifier nobody = Notifier::from_environment();
    ActivationSockets nothing;
    FdStore alone(nobody, nothing, FdStore::Use::kOn);
    CHECK_FALSE(alone.active());
    CHECK(alone.why_inactive() == "no service manager has started this process");
    CHECK_FALSE(alone.put("x", {}));

    FakeManager manager;
    const std::string room = GENERATE(as<std::string>(), "", "0", "x", "-1");
    Environment socket("NOTIFY_SOCKET", manager.address());
    Environment variable("FDSTORE", room);
    Notifier notifier = Notifier::from_environment();
    FdStore store(notifier, nothing, FdStore::Use::kAuto);
    CHECK_FALSE(store.active());
    CHECK(store.why_inactive() == "the service manager names no descriptor store (FileDescriptorStoreMax=)");
}

TEST_CASE("fd store: what the process before has put comes back once, by name", "[systemd]") {
    const std::string out = gantry::test::in_child([] {
        gantry::log::set_level(gantry::log::Level::kError);
        UniqueFd a = memory("a"), b = memory("b"), c = memory("c"), d = memory("d");
        int fds[] = {a.get(), b.get(), c.get(), d.get()};
        for (int& fd : fds) fd = ::fcntl(fd, F_DUPFD, 50);
        for (int i = 0; i < 4; i++) ::dup2(fds[i], 3 + i);
        for (UniqueFd* fd : {&a, &b, &c, &d}) {
            if (fd->get() < 7) (void)fd->release();
        }
        ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
        ::setenv("LISTEN_FDS", "4", 1);
        ::setenv("LISTEN_FDNAMES", "gantry-one:stranger:gantry-two:gantry-one", 1);
        FakeManager manager;
        Environment socket("NOTIFY_SOCKET", manager.address());
        Notifier notifier = Notifier::from_environment();
        auto passed = ActivationSockets::from_environment();
        FdStore store(notifier, passed, FdStore::Use::kAuto);
        std::string text = store.active() ? "active" : "inactive";
        for (const std::string& name : store.waiting()) text += " " + name;
        if (::fcntl(4, F_GETFD) >= 0) text += " stranger-is-open";
        for (const UniqueFd& fd : store.take("one")) text += " " + content(fd.get());
        text += " then " + std::to_string(store.take("one").size());
        for (const std::string& name : store.waiting()) text += " " + name;
        store.drop("two");
        text += " left " + std::to_string(store.waiting().size()) + " " + manager.receive();
        return text;
    });
    CHECK(out == "active one two a d then 0 two left 0 FDSTOREREMOVE=1\nFDNAME=gantry-two\n");
}

TEST_CASE("fd store: switched off, what comes back is given up", "[systemd]") {
    const std::string out = gantry::test::in_child([] {
        UniqueFd a = memory("a");
        const int copy = ::fcntl(a.release(), F_DUPFD, 50);
        ::dup2(copy, 3);
        ::setenv("LISTEN_PID", std::to_string(::getpid()).c_str(), 1);
        ::setenv("LISTEN_FDS", "1", 1);
        ::setenv("LISTEN_FDNAMES", "gantry-one", 1);
        FakeManager manager;
        Environment socket("NOTIFY_SOCKET", manager.address());
        Notifier notifier = Notifier::from_environment();
        auto passed = ActivationSockets::from_environment();
        FdStore store(notifier, passed, FdStore::Use::kOff);
        std::string text = store.active() ? "active " : "inactive ";
        return text + std::to_string(store.waiting().size()) + " " + manager.receive();
    });
    CHECK(out == "inactive 0 FDSTOREREMOVE=1\nFDNAME=gantry-one\n");
}
