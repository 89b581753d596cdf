// in_child: runs something in a process of its own that may do what it likes to descriptors and environment. Header
// only.

#pragma once

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

namespace gantry::test {

/// The text that `fn` returned in a forked child; "child died" and its status when it did not return.
template <class Fn>
std::string in_child(Fn fn) {
    int pipe_fds[2];
    if (::pipe2(pipe_fds, O_CLOEXEC) != 0) return "no pipe";
    const pid_t child = ::fork();
    if (child == 0) {
        // Far away from the numbers that the child may want to use.
        const int out = ::fcntl(pipe_fds[1], F_DUPFD_CLOEXEC, 100);
        const std::string text = fn();
        const bool written = ::write(out, text.data(), text.size()) == static_cast<ssize_t>(text.size());
        ::_exit(written ? 0 : 1);
    }
    ::close(pipe_fds[1]);
    std::string text;
    char buffer[512];
    ssize_t n;
    while ((n = ::read(pipe_fds[0], buffer, sizeof buffer)) > 0) text.append(buffer, static_cast<size_t>(n));
    ::close(pipe_fds[0]);
    int status = 0;
    ::waitpid(child, &status, 0);
    return status == 0 ? text : "child died: " + std::to_string(status);
}

}  // namespace gantry::test
