#include "fuse/stale_mounts.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <vector>

#include "fuse/mount.h"
#include "fuse/mount_helper.h"
#include "runtime/log.h"
#include "runtime/own_mounts.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

namespace {

constexpr size_t kMostQuestions = 64;  // at a time
std::atomic<bool> looked_for{false};
constexpr int kChildAnswers = 0, kChildGone = 1, kChildFailed = 2;

/// In the child, alone with what fork() has left of the process: system calls only. It keeps no descriptor but the
/// mount's (0) and the pipe's end (1): nobody must wait for the end of a child that may hang.
[[noreturn]] void ask_server(pid_t parent, int mount_fd, int pipe_fd, uint64_t uid, uint64_t gid) {
    // Without the one who asks nobody would end it.
    ::prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0);
    if (::getppid() != parent) ::_exit(kChildFailed);
    const int high_mount = ::fcntl(mount_fd, F_DUPFD, 2), high_pipe = ::fcntl(pipe_fd, F_DUPFD, 2);
    if (::dup2(high_mount, 0) < 0 || ::dup2(high_pipe, 1) < 0) ::_exit(kChildFailed);
    ::syscall(SYS_close_range, 2u, ~0u, 0u);
    // Others than the one who mounted it may not be let in.
    if (::geteuid() == 0 && uid != 0) {
        if (::syscall(SYS_setresgid, gid, gid, gid) != 0 || ::syscall(SYS_setresuid, uid, uid, uid) != 0) {
            ::_exit(kChildFailed);
        }
    }
    struct statx st;
    const int r = ::statx(0, "", AT_EMPTY_PATH | AT_STATX_FORCE_SYNC, STATX_BASIC_STATS, &st);
    // ECONNABORTED: it went while we asked.
    const bool gone = r < 0 && (errno == ENOTCONN || errno == ECONNREFUSED || errno == ECONNABORTED);
    ::_exit(r == 0 ? kChildAnswers : gone ? kChildGone : kChildFailed);
}

/// One mount's server, asked from the constructor on.
class Question {
  public:
    /// `fd`: O_PATH, of its root.
    Question(const MountEntry& mount, int fd) : mount_(mount) {
        int ends[2];
        if (::pipe2(ends, O_CLOEXEC) != 0) return;
        ended_.reset(ends[0]);
        const UniqueFd writing(ends[1]);
        const uint64_t uid = option_number(mount.options, "user_id", 0);
        const uint64_t gid = option_number(mount.options, "group_id", 0);
        const int pipe_fd = writing.get();
        const pid_t parent = ::getpid();
        child_ = ::fork();
        if (child_ == 0) ask_server(parent, fd, pipe_fd, uid, gid);
    }
    const MountEntry& mount() const { return mount_; }

    /// What cannot be found out counts as an answer: it is no reason to unmount anything.
    ServerState answer(std::chrono::steady_clock::time_point deadline) {
        if (child_ < 0) return ServerState::kAnswers;
        pollfd ended{ended_.get(), POLLIN, 0};
        int ready;
        do {
            const auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now());
            ready = ::poll(&ended, 1, static_cast<int>(std::max<int64_t>(0, left.count())));
        } while (ready < 0 && errno == EINTR);
        int status = 0;
        if (ready == 0) {
            // It ends when the server answers or goes.
            ::kill(child_, SIGKILL);
            ::waitpid(child_, &status, WNOHANG);
            return ServerState::kSilent;
        }
        while (::waitpid(child_, &status, 0) < 0 && errno == EINTR) {
        }
        return WIFEXITED(status) && WEXITSTATUS(status) == kChildGone ? ServerState::kGone : ServerState::kAnswers;
    }

  private:
    const MountEntry& mount_;
    pid_t child_ = -1;
    UniqueFd ended_;
};

bool is_ours_to_clean(const MountEntry& mount) {
    return mount.type == kFilesystemType &&
           (::geteuid() == 0 || option_number(mount.options, "user_id", ~uint64_t{0}) == ::geteuid());
}

bool is_same(const Place& place, const MountEntry& mount) {
    return place.device == mount.device && (place.mount_id == 0 || place.mount_id == mount.id);
}

}  // namespace

bool is_on_top(const MountEntry& mount) {
    const auto place = place_of(mount.path, false);
    return place && is_same(*place, mount);
}

UniqueFd open_root(const MountEntry& mount) {
    UniqueFd fd(::open(mount.path.c_str(), O_PATH | O_NOFOLLOW | O_CLOEXEC));
    const auto place = fd ? place_of(fd.get()) : Result<Place>(std::unexpected(Error::from_errno(errno, mount.path)));
    return place && is_same(*place, mount) ? std::move(fd) : UniqueFd();
}

ServerState probe(const MountEntry& mount, int fd, std::chrono::milliseconds patience) {
    return Question(mount, fd).answer(std::chrono::steady_clock::now() + patience);
}

Result<> detach(const MountEntry& mount, int fd) {
    if (::umount2(fmt::format("/proc/self/fd/{}", fd).c_str(), MNT_DETACH) == 0) return {};
    const int e = errno;
    if (!is_on_top(mount)) return {};
    if (e != EPERM) return fail_errno(e, "Cannot unmount '{}'", mount.path);
    Result<> helped = helper_unmount(mount.path, true);
    if (helped || !is_on_top(mount)) return {};
    return std::unexpected(std::move(helped).error().context(fmt::format("Cannot unmount '{}'", mount.path)));
}

Result<> unmount_entry(const MountEntry& mount, bool lazy) {
    if (lazy) {
        const UniqueFd fd = open_root(mount);
        return fd ? detach(mount, fd.get()) : Result<>();
    }
    if (!is_on_top(mount) || ::umount2(mount.path.c_str(), UMOUNT_NOFOLLOW) == 0) return {};
    const int e = errno;
    if (e == EBUSY) {
        return std::unexpected(
            Error(ErrorKind::kBusy, fmt::format("'{}' is in use; somebody has it open", mount.path), EBUSY));
    }
    if (e != EPERM) return is_on_top(mount) ? fail_errno(e, "Cannot unmount '{}'", mount.path) : Result<>();
    Result<> helped = helper_unmount(mount.path, false);
    if (helped || !is_on_top(mount)) return {};
    return std::unexpected(std::move(helped).error().context(fmt::format("Cannot unmount '{}'", mount.path)));
}

bool stale_mounts_looked_for() { return looked_for.load(); }

size_t clean_stale_mounts() {
    looked_for = true;
    size_t cleaned = 0;
    // What lay below a mount comes up when that is gone: more than one round.
    for (int round = 0; round < 16; ++round) {
        const std::vector<MountEntry> mounts = read_mountinfo().value_or(std::vector<MountEntry>());
        std::vector<Question> questions;
        std::vector<UniqueFd> roots;  // held: numbers of mounts are used again
        for (const MountEntry& mount : mounts) {
            if (questions.size() >= kMostQuestions) break;
            if (!is_ours_to_clean(mount) || OwnMounts::process().server_of(mount.device)) continue;
            UniqueFd root = open_root(mount);
            if (!root) continue;
            questions.emplace_back(mount, root.get());
            roots.push_back(std::move(root));
        }
        // The kernel answers at once for those who are gone.
        const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
        size_t now = 0;
        for (size_t i = 0; i < questions.size(); ++i) {
            if (questions[i].answer(deadline) != ServerState::kGone || !is_on_top(questions[i].mount())) continue;
            const std::string& path = questions[i].mount().path;
            const Result<> gone = detach(questions[i].mount(), roots[i].get());
            if (gone) {
                ++now;
                log::info("unmounted '{}', which a daemon that is gone has left behind", path);
            } else {
                log::warn("a mount that is left of a daemon that is gone stays: {}", gone.error().message());
            }
        }
        cleaned += now;
        if (now == 0) break;
    }
    return cleaned;
}

}  // namespace gantry::fuse
