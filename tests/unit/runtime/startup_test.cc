// What depends on the process's surroundings: kernels that refuse io_uring, and where the log goes. Each in a child
// process.

#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstddef>
#include <cstdlib>

#include "runtime/log.h"
#include "runtime/runtime.h"
#include "runtime/timer.h"

namespace gantry {
namespace {

/// From here on io_uring_setup fails with EPERM, as container runtimes have it.
bool forbid_io_uring() {
    sock_filter rules[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_io_uring_setup, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    const sock_fprog program{std::size(rules), rules};
    return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 && ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

Task<bool> sleep_a_little() {
    co_await sleep_for(std::chrono::microseconds(100));
    co_return true;
}

TEST_CASE("runtime: (child) io_uring is refused", "[.][refused]") {
    auto asked = Runtime::create({.backend = IoBackendKind::kIoUring});
    REQUIRE_FALSE(asked);
    CHECK(asked.error().kind() == ErrorKind::kUnsupported);
    CHECK_THAT(asked.error().message(), Catch::Contains("seccomp"));
    auto automatic = Runtime::create({.backend = IoBackendKind::kAuto});
    REQUIRE(automatic);
    CHECK((*automatic)->main_loop().backend_name() == "epoll");
    CHECK_THAT((*automatic)->backend_reason(), Catch::Contains("epoll") && Catch::Contains("Operation not permitted"));
    CHECK((*automatic)->main_loop().run_until_complete(sleep_a_little()));
}

TEST_CASE("runtime: where io_uring is forbidden, auto takes epoll and says why", "[runtime]") {
    const pid_t child = ::fork();
    if (child == 0) {
        // A new program: this one may have asked the kernel already and remembers the answer.
        if (forbid_io_uring()) ::execl("/proc/self/exe", "test_runtime", "[refused]", "-o", "/dev/null", nullptr);
        ::_exit(99);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    CHECK(WEXITSTATUS(status) == 0);
}

std::string logged_by_child(void (*fn)()) {
    int fds[2];
    REQUIRE(::pipe(fds) == 0);
    const pid_t child = ::fork();
    if (child == 0) {
        ::dup2(fds[1], STDERR_FILENO);
        fn();
        ::_exit(0);
    }
    ::close(fds[1]);
    std::string text;
    char buffer[4096];
    ssize_t n;
    while ((n = ::read(fds[0], buffer, sizeof buffer)) > 0) text.append(buffer, static_cast<size_t>(n));
    ::close(fds[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    return text;
}

TEST_CASE("log: one line each, from its level on, whatever the text contains", "[runtime][log]") {
    const std::string text = logged_by_child([] {
        ::unsetenv("JOURNAL_STREAM");
        log::set_level(log::Level::kInfo);
        log::debug("unseen");
        log::info("node '{}' added", "a\nb\033[31m");
        log::error("disk {} failed {{}}", 7);
        log::set_level(log::Level::kOff);
        log::error("silent");
    });
    CHECK(std::count(text.begin(), text.end(), '\n') == 2);
    CHECK_THAT(text, Catch::Contains("info: node 'a b [31m' added\n") && Catch::Contains("error: disk 7 failed {}\n"));
    CHECK_THAT(text, !Catch::Contains("unseen") && !Catch::Contains("silent"));
}

}  // namespace
}  // namespace gantry
