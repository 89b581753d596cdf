#include "systemd/activation.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "runtime/log.h"
#include "tests/support/child.h"
#include "tests/support/temp_dir.h"

using gantry::UniqueFd;
using gantry::systemd::ActivationSockets;

namespace {

UniqueFd listener(const std::string& path, int type = SOCK_STREAM) {
    UniqueFd fd(::socket(AF_UNIX, type, 0));
    sockaddr_un addr{};
    addr.sun_family = AF_UNIX;
    path.copy(addr.sun_path, sizeof addr.sun_path - 1);
    if (::bind(fd.get(), reinterpret_cast<sockaddr*>(&addr), sizeof addr) != 0) return {};
    if (type == SOCK_STREAM) ::listen(fd.get(), 1);
    return fd;
}

/// In a child: `fds` become 3, 4, ..., the variables are set, and what comes out is described in a line.
std::string take(std::vector<int> fds, std::string count, std::string names, bool our_pid = true) {
    return gantry::test::in_child([&] {
        gantry::log::set_level(gantry::log::Level::kError);
        for (size_t i = 0; i < fds.size(); i++) fds[i] = ::fcntl(fds[i], F_DUPFD, 50);
        for (size_t i = 0; i < fds.size(); i++) ::dup2(fds[i], static_cast<int>(3 + i));
        ::setenv("LISTEN_PID", std::to_string(our_pid ? ::getpid() : 1).c_str(), 1);
        ::setenv("LISTEN_FDS", count.c_str(), 1);
        ::setenv("LISTEN_FDNAMES", names.c_str(), 1);
        auto sockets = ActivationSockets::from_environment();
        if (!sockets.take_others([](std::string_view) { return false; }).empty()) return std::string("others");
        std::string out = fmt::format("{}", fmt::join(sockets.names(), ","));
        for (const char* name : {"LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"}) {
            if (::getenv(name)) out += fmt::format(" {} is still set", name);
        }
        for (const std::string& name : sockets.names()) {
            auto copy = sockets.duplicate(name);
            if (!copy) return out + " no duplicate";
            if (!(::fcntl(copy->get(), F_GETFD) & FD_CLOEXEC)) out += " duplicate survives exec";
            if (!(::fcntl(copy->get(), F_GETFL) & O_NONBLOCK)) out += " duplicate blocks";
        }
        for (size_t i = 0; i < sockets.names().size(); i++) {
            if (!(::fcntl(static_cast<int>(3 + i), F_GETFD) & FD_CLOEXEC)) out += " survives exec";
        }
        if (auto none = sockets.duplicate("no-such"); !none) out += " | " + none.error().message();
        return out;
    });
}

const std::string kNobody =
    " | File descriptor named 'no-such' has not been found; the service manager passed no sockets";

}  // namespace

TEST_CASE("activation: sockets are found by name", "[systemd]") {
    gantry::test::TempDir dir;
    UniqueFd a = listener(dir.file("a")), b = listener(dir.file("b"));
    REQUIRE(a);
    REQUIRE(b);
    const std::string missing = " | File descriptor named 'no-such' has not been found; passed sockets are: ";
    CHECK(take({a.get(), b.get()}, "2", "qmp:nbd") == "qmp,nbd" + missing + "qmp, nbd");
    // Missing and impossible names.
    CHECK(take({a.get(), b.get()}, "2", "qmp") == "qmp,unknown" + missing + "qmp, unknown");
    CHECK(take({a.get(), b.get()}, "2", "") == "unknown,unknown" + missing + "unknown, unknown");
    CHECK(take({a.get(), b.get()}, "2", "a\tb:" + std::string(256, 'x')) ==
          "unknown,unknown" + missing + "unknown, unknown");
    CHECK(take({a.get(), b.get()}, "2", "x:y:z:") == "x,y" + missing + "x, y");
}

TEST_CASE("activation: what was passed to another process, or says nonsense, is not taken", "[systemd]") {
    gantry::test::TempDir dir;
    UniqueFd a = listener(dir.file("a"));
    CHECK(take({a.get()}, "1", "qmp", false) == kNobody);
    for (const char* count : {"0", "-1", "x", "", "1000000", "1x"}) {
        INFO(count);
        CHECK(take({a.get()}, count, "qmp") == kNobody);
    }
}

TEST_CASE("activation: what is no listening stream socket is closed", "[systemd]") {
    gantry::test::TempDir dir;
    UniqueFd good = listener(dir.file("good")), datagram = listener(dir.file("datagram"), SOCK_DGRAM);
    UniqueFd file(::open("/dev/null", O_RDONLY)), quiet(::socket(AF_UNIX, SOCK_STREAM, 0));
    CHECK(take({file.get(), datagram.get(), quiet.get(), good.get()}, "4", "file:datagram:quiet:good") ==
          "good | File descriptor named 'no-such' has not been found; passed sockets are: good");
}

TEST_CASE("activation: the socket's file stays when the process ends", "[systemd]") {
    gantry::test::TempDir dir;
    UniqueFd a = listener(dir.file("a"));
    CHECK(take({a.get()}, "1", "nbd").starts_with("nbd"));
    CHECK(::access(dir.file("a").c_str(), F_OK) == 0);
}
