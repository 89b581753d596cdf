// ChildProcess: another program beside the test. Header only.

#pragma once

#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "runtime/unique_fd.h"

namespace gantry::test {

inline bool have_program(const std::string& name) {
    return std::system(("command -v " + name + " >/dev/null 2>&1").c_str()) == 0;
}

/// Runs until its standard input is closed (if it reads that) or it is killed; at the latest by the destructor.
class ChildProcess {
  public:
    explicit ChildProcess(std::vector<std::string> command) {
        int in[2], out[2];
        if (::pipe2(in, O_CLOEXEC) != 0 || ::pipe2(out, O_CLOEXEC) != 0) std::abort();
        std::vector<char*> argv;
        for (std::string& word : command) argv.push_back(word.data());
        argv.push_back(nullptr);
        pid_ = ::fork();
        if (pid_ == 0) {
            ::dup2(in[0], 0);
            ::dup2(out[1], 1);
            ::dup2(out[1], 2);
            ::execvp(argv[0], argv.data());
            ::_exit(127);
        }
        ::close(in[0]);
        ::close(out[1]);
        stdin_.reset(in[1]);
        output_.reset(out[0]);
    }
    ~ChildProcess() {
        if (pid_ > 0) ::kill(pid_, SIGKILL);
        (void)wait();
    }
    ChildProcess(const ChildProcess&) = delete;

    pid_t pid() const { return pid_; }
    /// Closes its input, collects what it says, waits: its exit code, or -signal.
    int wait() {
        if (pid_ <= 0) return status_;
        stdin_.reset();
        char buffer[4096];
        ssize_t n;
        while ((n = ::read(output_.get(), buffer, sizeof buffer)) > 0) text_.append(buffer, static_cast<size_t>(n));
        int status = 0;
        ::waitpid(pid_, &status, 0);
        pid_ = -1;
        status_ = WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
        return status_;
    }
    const std::string& output() const { return text_; }

  private:
    pid_t pid_ = -1;
    int status_ = 0;
    UniqueFd stdin_, output_;
    std::string text_;
};

/// Runs a program to its end.
struct Ran {
    int status;
    std::string output;
};
inline Ran run_program(std::vector<std::string> command) {
    ChildProcess child(std::move(command));
    const int status = child.wait();
    return {status, child.output()};
}

}  // namespace gantry::test
