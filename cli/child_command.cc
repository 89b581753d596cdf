#include "cli/child_command.h"

#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>

namespace gantry::cli {

Result<> ChildCommand::start(std::vector<std::string> words) {
    std::vector<char*> arguments;
    for (std::string& word : words) arguments.push_back(word.data());
    arguments.push_back(nullptr);
    posix_spawnattr_t attributes;
    ::posix_spawnattr_init(&attributes);
    sigset_t none, standard;
    ::sigemptyset(&none);
    ::sigemptyset(&standard);
    ::sigaddset(&standard, SIGPIPE);
    ::posix_spawnattr_setsigmask(&attributes, &none);
    ::posix_spawnattr_setsigdefault(&attributes, &standard);
    ::posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
    pid_t pid = -1;
    const int e = ::posix_spawnp(&pid, arguments[0], nullptr, &attributes, arguments.data(), environ);
    ::posix_spawnattr_destroy(&attributes);
    if (e != 0) return fail_errno(e, "Could not run '{}'", words[0]);
    pid_ = pid;
    pidfd_.reset(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
    if (!pidfd_) {
        const int failed = errno;
        send(SIGTERM);
        (void)wait();
        return fail_errno(failed, "Could not watch '{}' (this needs Linux 5.3 or later)", words[0]);
    }
    return {};
}

Task<void> ChildCommand::ended() {
    while (!stopped_) {
        CancellableIo io(io_poll(pidfd_.get(), POLLIN));
        waiting_ = &io;
        const int r = co_await io;
        waiting_ = nullptr;
        if (r > 0) co_return;
    }
}

void ChildCommand::stop_watching() {
    stopped_ = true;
    if (waiting_) waiting_->cancel();
}

void ChildCommand::send(int signal) const {
    if (pid_ > 0) ::kill(pid_, signal);
}

int ChildCommand::wait() const {
    sigset_t passed_on;
    ::sigemptyset(&passed_on);
    ::sigaddset(&passed_on, SIGTERM);
    ::sigaddset(&passed_on, SIGHUP);
    for (;;) {
        int status = 0;
        const pid_t r = ::waitpid(pid_, &status, WNOHANG);
        if (r == pid_) return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
        if (r < 0 && errno != EINTR) return 1;
        const timespec pause{0, 20'000'000};
        if (const int signal = ::sigtimedwait(&passed_on, nullptr, &pause); signal > 0) send(signal);
    }
}

}  // namespace gantry::cli
