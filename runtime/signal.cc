#include "runtime/signal.h"

#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/signalfd.h>

#include <cerrno>

namespace gantry {

namespace {

sigset_t handled_signals() {
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGHUP);
    return set;
}

}  // namespace

void block_signals() {
    const sigset_t set = handled_signals();
    pthread_sigmask(SIG_BLOCK, &set, nullptr);
    ::signal(SIGPIPE, SIG_IGN);
}

void unblock_signals() {
    const sigset_t set = handled_signals();
    pthread_sigmask(SIG_UNBLOCK, &set, nullptr);
    ::signal(SIGPIPE, SIG_DFL);
}

Result<SignalWaiter> SignalWaiter::create() {
    const sigset_t set = handled_signals();
    UniqueFd fd(::signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC));
    if (!fd) return fail_errno(errno, "cannot create a signal descriptor");
    return SignalWaiter(std::move(fd));
}

Task<int> SignalWaiter::next() {
    while (!cancelled_) {
        signalfd_siginfo info;
        if (::read(fd_.get(), &info, sizeof info) == static_cast<ssize_t>(sizeof info)) {
            by_terminal_ = info.ssi_code == SI_KERNEL;
            co_return static_cast<int>(info.ssi_signo);
        }
        CancellableIo io(io_poll(fd_.get(), POLLIN));
        CHECK(!waiting_, "one waiter for signals");
        waiting_ = &io;
        co_await io;
        waiting_ = nullptr;
    }
    co_return 0;
}

void SignalWaiter::cancel() {
    cancelled_ = true;
    if (waiting_) waiting_->cancel();
}

}  // namespace gantry
