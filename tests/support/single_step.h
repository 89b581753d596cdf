// single_step: runs something instruction by instruction, to see every state in which a kill could leave what it shares
// with others. Header only.

#pragma once

#include <sched.h>
#include <signal.h>
#include <sys/ptrace.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <string>

namespace gantry::test {

/// Called by what single_step() runs, once.
inline void step_from_here() { ::raise(SIGSTOP); }

/// Runs `fn` in a forked child; `look` runs here after each instruction that comes after step_from_here(), while the
/// child stands still. Memory that both have mapped shared is theirs together. Empty when `fn` returned true; else why
/// not. "no ptrace" where this is not allowed.
template <class Fn, class Look>
std::string single_step(Fn fn, Look look) {
    // Both on one processor: they take turns anyway.
    cpu_set_t all, one;
    const bool pinned = ::sched_getaffinity(0, sizeof all, &all) == 0;
    CPU_ZERO(&one);
    for (int i = 0; pinned && i < CPU_SETSIZE && CPU_COUNT(&one) == 0; i++)
        if (CPU_ISSET(i, &all)) CPU_SET(i, &one);
    if (pinned) ::sched_setaffinity(0, sizeof one, &one);
    const pid_t child = ::fork();
    if (child == 0) {
        const rlimit no_core{0, 0};
        ::setrlimit(RLIMIT_CORE, &no_core);
        for (const int s : {SIGABRT, SIGSEGV, SIGTERM}) ::signal(s, SIG_DFL);  // the test framework has handlers
        if (::ptrace(PTRACE_TRACEME, 0, nullptr, nullptr) != 0) ::_exit(77);
        ::_exit(fn() ? 0 : 1);
    }
    int status = 0;
    if (child < 0 || ::waitpid(child, &status, 0) != child) return "no child";
    if (WIFSTOPPED(status)) ::ptrace(PTRACE_SETOPTIONS, child, nullptr, PTRACE_O_EXITKILL);
    int signal = 0;
    while (WIFSTOPPED(status)) {
        if (::ptrace(PTRACE_SINGLESTEP, child, nullptr, signal) != 0 || ::waitpid(child, &status, 0) != child) break;
        if (!WIFSTOPPED(status)) break;
        signal = WSTOPSIG(status) == SIGTRAP ? 0 : WSTOPSIG(status);
        look();
    }
    if (pinned) ::sched_setaffinity(0, sizeof all, &all);
    if (WIFEXITED(status)) {
        if (WEXITSTATUS(status) == 77) return "no ptrace";
        return WEXITSTATUS(status) == 0 ? "" : "it failed";
    }
    return "it died of signal " + std::to_string(WTERMSIG(status));
}

}  // namespace gantry::test
