// Death tests: does a function abort? Header only.

#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

namespace gantry::test {

/// Runs `fn` in a child process. The text it wrote to stderr when it ended by SIGABRT; empty when it did not.
template <class Fn>
std::string abort_message(Fn fn) {
    int pipe_fds[2];
    if (::pipe2(pipe_fds, O_CLOEXEC) != 0) return {};
    const pid_t child = ::fork();
    if (child == 0) {
        const rlimit no_core{0, 0};
        ::setrlimit(RLIMIT_CORE, &no_core);
        for (const int s : {SIGABRT, SIGSEGV, SIGTERM}) ::signal(s, SIG_DFL);  // the test framework has handlers
        ::dup2(pipe_fds[1], 2);
        fn();
        ::_exit(0);
    }
    ::close(pipe_fds[1]);
    std::string text;
    char buffer[512];
    ssize_t n;
    while ((n = ::read(pipe_fds[0], buffer, sizeof buffer)) > 0) text.append(buffer, static_cast<size_t>(n));
    ::close(pipe_fds[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? text : std::string();
}

}  // namespace gantry::test
