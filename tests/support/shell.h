// shell: a command line as a test runs it. Header only.

#pragma once

#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <string>

namespace gantry::test {

struct ShellResult {
    int status = -1;     // the exit status; -1 when it was ended by a signal
    std::string output;  // stdout and stderr
};

/// Runs `command` by the shell. qemu-img measures its own speed before it makes a LUKS image, and gives up when the
/// kernel counted none of its time: only then the command is run again, so it must begin with what fails.
inline ShellResult shell(const std::string& command) {
    ShellResult done;
    for (int attempt = 0; attempt < 40; attempt++) {
        done = {};
        FILE* pipe = ::popen(("{ " + command + "\n} 2>&1").c_str(), "r");
        if (!pipe) return done;
        std::array<char, 4096> part;
        for (size_t n; (n = std::fread(part.data(), 1, part.size(), pipe)) > 0;) done.output.append(part.data(), n);
        const int raw = ::pclose(pipe);
        done.status = WIFEXITED(raw) ? WEXITSTATUS(raw) : -1;
        if (done.status == 0 || done.output.find("Unable to get accurate CPU usage") == std::string::npos) break;
    }
    return done;
}

inline bool has_program(const std::string& name) { return shell("command -v " + name).status == 0; }

}  // namespace gantry::test
