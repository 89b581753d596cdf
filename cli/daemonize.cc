#include "cli/daemonize.h"

#include <fcntl.h>
#include <sys/wait.h>
#include <unistd.h>

namespace gantry::cli {

Result<Daemonizer> Daemonizer::start() {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return fail_errno(errno, "cannot daemonize: pipe");
    UniqueFd read_end(ends[0]), write_end(ends[1]);
    pid_t child = ::fork();
    if (child < 0) return fail_errno(errno, "cannot daemonize: fork");
    if (child > 0) {
        write_end.reset();
        char status = 0;
        ssize_t n;
        do {
            n = ::read(read_end.get(), &status, 1);
        } while (n < 0 && errno == EINTR);
        // The child has said on our stderr what went wrong.
        ::_exit(n == 1 ? 0 : 1);
    }
    ::setsid();
    Daemonizer d;
    d.pipe_ = std::move(write_end);
    return d;
}

void Daemonizer::ready() {
    if (!pipe_) return;
    UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    for (int fd = 0; null && fd < 3; fd++) ::dup2(null.get(), fd);
    char status = 0;
    ssize_t n;
    do {
        n = ::write(pipe_.get(), &status, 1);
    } while (n < 0 && errno == EINTR);
    pipe_.reset();
}

}  // namespace gantry::cli
