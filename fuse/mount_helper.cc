#include "fuse/mount_helper.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>
#include <vector>

namespace gantry::fuse {

namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::seconds kPatience{30};
constexpr size_t kMostText = 2048;
constexpr int kCommunication = 3;  // the descriptor's number in the child

/// Moves `fd` away from the numbers that the child uses.
Result<UniqueFd> out_of_the_way(UniqueFd fd) {
    UniqueFd high(::fcntl(fd.get(), F_DUPFD_CLOEXEC, kCommunication + 1));
    if (!high) return fail_errno(errno, "Cannot start fusermount3");
    return high;
}

class SpawnActions {
  public:
    SpawnActions() {
        ::posix_spawn_file_actions_init(&actions_);
        ::posix_spawnattr_init(&attributes_);
    }
    SpawnActions(const SpawnActions&) = delete;
    SpawnActions& operator=(const SpawnActions&) = delete;
    ~SpawnActions() {
        ::posix_spawn_file_actions_destroy(&actions_);
        ::posix_spawnattr_destroy(&attributes_);
    }
    /// fusermount3's stdio, its end of the socket, and signals as a program expects them.
    int prepare(int errors, int communication) {
        int e = ::posix_spawn_file_actions_addopen(&actions_, 0, "/dev/null", O_RDONLY, 0);
        if (!e) e = ::posix_spawn_file_actions_addopen(&actions_, 1, "/dev/null", O_WRONLY, 0);
        if (!e) e = ::posix_spawn_file_actions_adddup2(&actions_, errors, 2);
        if (!e && communication >= 0) {
            e = ::posix_spawn_file_actions_adddup2(&actions_, communication, kCommunication);
        }
        sigset_t none, standard;
        ::sigemptyset(&none);
        ::sigemptyset(&standard);
        ::sigaddset(&standard, SIGPIPE);
        if (!e) e = ::posix_spawnattr_setsigmask(&attributes_, &none);
        if (!e) e = ::posix_spawnattr_setsigdefault(&attributes_, &standard);
        if (!e) e = ::posix_spawnattr_setflags(&attributes_, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
        return e;
    }
    posix_spawn_file_actions_t actions_;
    posix_spawnattr_t attributes_;
};

std::vector<std::string> child_environment() {
    std::vector<std::string> all{"LC_ALL=C", "_FUSE_COMMFD=" + std::to_string(kCommunication)};
    for (char** each = environ; each && *each; ++each) {
        const std::string_view text(*each);
        if (!text.starts_with("LC_ALL=") && !text.starts_with("_FUSE_COMMFD=")) all.emplace_back(text);
    }
    return all;
}

std::vector<char*> pointers(std::vector<std::string>& words) {
    std::vector<char*> out;
    for (std::string& word : words) out.push_back(word.data());
    out.push_back(nullptr);
    return out;
}

/// Reads until all writers are gone; false when that takes too long.
bool read_text(int fd, std::string& text) {
    const auto deadline = Clock::now() + kPatience;
    for (;;) {
        const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - Clock::now()).count();
        pollfd poll_fd{fd, POLLIN, 0};
        const int ready = left > 0 ? ::poll(&poll_fd, 1, static_cast<int>(left)) : 0;
        if (ready < 0 && errno == EINTR) continue;
        if (ready <= 0) return false;
        std::array<char, 512> buffer;
        const ssize_t n = ::read(fd, buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n <= 0) return true;
        if (text.size() < kMostText) text.append(buffer.data(), static_cast<size_t>(n));
    }
}

/// The exit status; -1 when it does not end.
int reap(pid_t child, bool killed) {
    const auto deadline = Clock::now() + std::chrono::seconds(killed ? 1 : 30);
    for (;;) {
        int status = 0;
        const pid_t r = ::waitpid(child, &status, WNOHANG);
        if (r == child) return WIFEXITED(status) ? WEXITSTATUS(status) : 128;
        if (r < 0 && errno != EINTR) return -1;
        if (Clock::now() >= deadline) return -1;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
}

/// Its first line, without its name.
std::string first_line(std::string text) {
    text.resize(std::min(text.size(), text.find('\n')));
    constexpr std::string_view kName = "fusermount3: ";
    if (text.starts_with(kName)) text.erase(0, kName.size());
    for (char& c : text) {
        if (static_cast<unsigned char>(c) < 0x20) c = '?';
    }
    return text.empty() ? "it failed without a word" : text;
}

/// Why a set-user-ID program may be without its power.
std::string hint() {
    if (::geteuid() != 0 && ::prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1) {
        return "; no_new_privs is set for this process (NoNewPrivileges= of a unit), so that fusermount3 cannot become "
               "root";
    }
    return "";
}

Result<> run_helper(std::vector<std::string> words, int communication) {
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC) != 0) return fail_errno(errno, "Cannot start fusermount3");
    UniqueFd reading(ends[0]);
    TRY(UniqueFd writing, out_of_the_way(UniqueFd(ends[1])));
    SpawnActions spawn;
    std::vector<std::string> environment = child_environment();
    pid_t child = -1;
    int e = spawn.prepare(writing.get(), communication);
    if (!e) {
        e = ::posix_spawnp(&child, words[0].c_str(), &spawn.actions_, &spawn.attributes_, pointers(words).data(),
                           pointers(environment).data());
    }
    if (e == ENOENT) {
        return std::unexpected(Error(
            ErrorKind::kNotFound, "fusermount3 is not there; install the package fuse3, or run this as root", ENOENT));
    }
    if (e) return fail_errno(e, "Cannot start fusermount3");
    writing.reset();
    std::string text;
    const bool ended = read_text(reading.get(), text);
    if (!ended) ::kill(child, SIGKILL);
    const int status = reap(child, !ended);
    if (!ended || status < 0) {
        return fail(ErrorKind::kTimedOut, "fusermount3 did not end within {} seconds", kPatience.count());
    }
    if (status == 0) return {};
    const std::string line = first_line(std::move(text));
    const bool busy = line.find("busy") != std::string::npos;
    return fail(busy ? ErrorKind::kBusy : ErrorKind::kPermission, "fusermount3: {}{}", line, hint());
}

Result<UniqueFd> receive_fd(int socket) {
    char byte;
    iovec iov{&byte, 1};
    alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))];
    msghdr message{};
    message.msg_iov = &iov;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof control;
    const ssize_t n = ::recvmsg(socket, &message, MSG_CMSG_CLOEXEC | MSG_DONTWAIT);
    const cmsghdr* first = n > 0 ? CMSG_FIRSTHDR(&message) : nullptr;
    if (!first || first->cmsg_level != SOL_SOCKET || first->cmsg_type != SCM_RIGHTS ||
        first->cmsg_len < CMSG_LEN(sizeof(int))) {
        return fail(ErrorKind::kIo, "fusermount3 has passed no descriptor");
    }
    int fd = -1;
    std::memcpy(&fd, CMSG_DATA(first), sizeof fd);
    return UniqueFd(fd);
}

}  // namespace

Result<UniqueFd> helper_mount(const std::string& options, const std::string& path) {
    int ends[2];
    if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
        return fail_errno(errno, "Cannot start fusermount3");
    }
    UniqueFd ours(ends[0]);
    TRY(UniqueFd theirs, out_of_the_way(UniqueFd(ends[1])));
    CHECK_OK(run_helper({"fusermount3", "-o", options, "--", path}, theirs.get()));
    return receive_fd(ours.get());
}

Result<> helper_unmount(const std::string& path, bool lazy) {
    return run_helper({"fusermount3", lazy ? "-uz" : "-u", "--", path}, -1);
}

bool lacks_user_allow_other(const Error& error) {
    return error.message().find("user_allow_other") != std::string::npos;
}

}  // namespace gantry::fuse
