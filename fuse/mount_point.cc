#include "fuse/mount_point.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <thread>

#include "fuse/mount_helper.h"
#include "fuse/stale_mounts.h"
#include "runtime/log.h"
#include "runtime/own_mounts.h"

namespace gantry::fuse {

namespace {

constexpr const char* kDevice = "/dev/fuse";
constexpr std::chrono::seconds kLockPatience{2};

/// The mount of one of our kind that `place` lies in, if it does.
std::optional<MountEntry> gantry_mount_at(const Place& place) {
    auto mounts = read_mountinfo();
    if (!mounts) return std::nullopt;
    for (MountEntry& mount : *mounts) {
        if (mount.type == kFilesystemType && mount.device == place.device &&
            (place.mount_id == 0 || place.mount_id == mount.id)) {
            return std::move(mount);
        }
    }
    return std::nullopt;
}

Result<std::string> path_of(int fd, const std::string& given) {
    std::array<char, 4097> buffer;
    const std::string link = fmt::format("/proc/self/fd/{}", fd);
    const ssize_t n = ::readlink(link.c_str(), buffer.data(), buffer.size());
    if (n < 0) return fail_errno(errno, "Failed to resolve '{}' through '{}'", given, link);
    if (static_cast<size_t>(n) >= buffer.size())
        return fail(ErrorKind::kInvalid, "The path of '{}' is too long", given);
    return std::string(buffer.data(), static_cast<size_t>(n));
}

/// An open descriptor that nothing of ours lies over.
Result<UniqueFd> open_uncovered(const std::string& path) {
    for (int round = 0; round < 16; ++round) {
        UniqueFd fd(::open(path.c_str(), O_PATH | O_CLOEXEC));
        if (!fd) return fail_errno(errno, "Failed to stat '{}'", path);
        TRY(const Place place, place_of(fd.get()));
        if (auto server = OwnMounts::process().server_of(place.device)) {
            return fail(ErrorKind::kExists, "There already is a FUSE export on '{}'; it is {}", path, *server);
        }
        const std::optional<MountEntry> mount = gantry_mount_at(place);
        if (!mount) return fd;
        const ServerState state = probe(*mount, fd.get());
        if (!is_on_top(*mount)) continue;  // somebody else has just cleaned it away
        if (state != ServerState::kGone) {
            return fail(ErrorKind::kExists,
                        "There already is a FUSE export on '{}'; another process serves it: end that, or take another "
                        "mount point",
                        path);
        }
        CHECK_OK(detach(*mount, fd.get()));
        log::info("unmounted '{}', which a daemon that is gone has left behind", path);
    }
    return fail(ErrorKind::kBusy, "'{}' is covered by many mounts of daemons that are gone", path);
}

std::string device_hint(int e) {
    switch (e) {
        case ENOENT:
            return "; load the kernel's module (modprobe fuse), or hand the device to the container (--device "
                   "/dev/fuse)";
        case ENXIO:
        case ENODEV:
            return "; this kernel has no FUSE, or its module is not loaded (modprobe fuse)";
        case EPERM:
            return "; the container or the unit does not allow the device (--device /dev/fuse, DeviceAllow=/dev/fuse "
                   "rw)";
        case EACCES:
            return fmt::format("; uid {} needs to read and write it", ::geteuid());
        default:
            return "";
    }
}

std::unexpected<Error> failed(const MountPoint& point, int e, std::string_view what) {
    const Error cause = Error::from_errno(e, what);
    return std::unexpected(
        Error(cause.kind(),
              fmt::format("Failed to mount FUSE session to export on '{}': {}", point.path, cause.message()), e));
}

std::string kernel_options(int fd, const MountRequest& request, bool allow_other) {
    return fmt::format("fd={},rootmode=100000,user_id={},group_id={},max_read={},default_permissions{}", fd,
                       ::geteuid(), ::getegid(), request.max_read, allow_other ? ",allow_other" : "");
}

std::string helper_options(const MountRequest& request, bool allow_other) {
    return fmt::format("{},nosuid,nodev,noatime,fsname={},subtype=gantry,max_read={},default_permissions{}",
                       request.read_only ? "ro" : "rw", mount_source(request.export_id), request.max_read,
                       allow_other ? ",allow_other" : "");
}

Result<UniqueFd> cover_by_helper(const MountPoint& point, const MountRequest& request, bool allow_other) {
    auto fd = helper_mount(helper_options(request, allow_other), point.path);
    if (fd) return fd;
    std::string hint;
    if (lacks_user_allow_other(fd.error())) {
        hint = "; add that line there, or use allow-other=off";
    } else if (::faccessat(AT_FDCWD, fmt::format("/proc/self/fd/{}", point.fd.get()).c_str(), W_OK, AT_EACCESS) != 0 &&
               errno == EACCES) {
        hint = "; a user mounts over files that he may write, and this one he may not";
    } else if (fd.error().kind() == ErrorKind::kNotFound) {
        hint = "; without it mounting needs CAP_SYS_ADMIN";
    }
    return std::unexpected(Error(
        fd.error().kind(),
        fmt::format("Failed to mount FUSE session to export on '{}': {}{}", point.path, fd.error().message(), hint),
        fd.error().errno_value()));
}

/// Alone with a file for as long as mounting takes; nothing where it cannot be read, or somebody else does not let go.
UniqueFd lock_file(int fd) {
    const std::string link = fmt::format("/proc/self/fd/{}", fd);
    UniqueFd file(::open(link.c_str(), O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC));
    const auto deadline = std::chrono::steady_clock::now() + kLockPatience;
    while (file && ::flock(file.get(), LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK || std::chrono::steady_clock::now() >= deadline) return {};
        std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return file;
}

Result<MountPoint> look_at(const std::string& path) {
    MountPoint point;
    TRY(point.fd, open_uncovered(path));
    struct statx st;
    // What the kernel knows already is enough: a server that hangs is not asked.
    if (::statx(point.fd.get(), "", AT_EMPTY_PATH | AT_STATX_DONT_SYNC, STATX_TYPE | STATX_INO, &st) != 0) {
        return fail_errno(errno, "Failed to stat '{}'", path);
    }
    if (!S_ISREG(st.stx_mode)) {
        return fail(ErrorKind::kInvalid,
                    "'{}' is not a regular file; an export covers one, its content does not matter", path);
    }
    point.device = ::gnu_dev_makedev(st.stx_dev_major, st.stx_dev_minor);
    point.inode = st.stx_ino;
    TRY(point.path, path_of(point.fd.get(), path));
    return point;
}

}  // namespace

std::string mount_source(const std::string& export_id) { return "gantry:" + export_id; }

Result<MountPoint> find_mount_point(const std::string& path) {
    TRY(MountPoint point, look_at(path));
    for (int round = 0; round < 4; ++round) {
        UniqueFd lock = lock_file(point.fd.get());
        if (!lock) return look_at(path);
        // Whoever had it before us has covered it meanwhile, or there is another file now.
        TRY(MountPoint again, look_at(path));
        const bool same = again.device == point.device && again.inode == point.inode;
        point = std::move(again);
        if (!same) continue;
        point.lock = std::move(lock);
        return point;
    }
    return fail(ErrorKind::kBusy, "'{}' becomes another file again and again", path);
}

Result<Covered> cover(const MountPoint& point, const MountRequest& request) {
    UniqueFd device(::open(kDevice, O_RDWR | O_CLOEXEC));
    if (!device) {
        const int e = errno;
        std::unexpected<Error> error = failed(point, e, kDevice);
        return std::unexpected(Error(error.error().kind(), error.error().message() + device_hint(e), e));
    }
    const bool ask_for_all = request.allow_other != AllowOther::kOff;
    const std::string target = fmt::format("/proc/self/fd/{}", point.fd.get());
    const unsigned long flags = MS_NOSUID | MS_NODEV | MS_NOATIME | (request.read_only ? MS_RDONLY : 0ul);
    const std::string options = kernel_options(device.get(), request, ask_for_all);
    if (::mount(mount_source(request.export_id).c_str(), target.c_str(), std::string(kFilesystemType).c_str(), flags,
                options.c_str()) == 0) {
        return Covered{std::move(device), ask_for_all};
    }
    const int e = errno;
    if (e == ENODEV) return failed(point, e, "this kernel has no FUSE, or its module is not loaded (modprobe fuse)");
    if (e != EPERM) return failed(point, e, "mount");
    device.reset();
    auto fd = cover_by_helper(point, request, ask_for_all);
    if (fd) return Covered{std::move(*fd), ask_for_all};
    if (request.allow_other != AllowOther::kAuto || !lacks_user_allow_other(fd.error())) {
        return std::unexpected(std::move(fd).error());
    }
    TRY(UniqueFd alone, cover_by_helper(point, request, false));
    return Covered{std::move(alone), false};
}

}  // namespace gantry::fuse
