// The hard end of a connection to the kernel.

#include <fcntl.h>
#include <sys/mount.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>

#include "fuse/mount.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"

namespace gantry::fuse {

namespace {

/// Of the control file system (fusectl), named after the mount's device.
std::string control_file(uint64_t device) {
    return fmt::format("/sys/fs/fuse/connections/{}/abort", minor(static_cast<dev_t>(device)));
}

int write_abort(const std::string& path) {
    const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    if (!fd) return errno;
    return ::write(fd.get(), "1", 1) == 1 ? 0 : errno;
}

/// The same where that file system is mounted nowhere, as in a container: by a mount of it that has no place.
int write_abort_unseen(uint64_t device) {
    const UniqueFd context(::fsopen("fusectl", FSOPEN_CLOEXEC));
    if (!context || ::fsconfig(context.get(), FSCONFIG_CMD_CREATE, nullptr, nullptr, 0) != 0) return errno;
    const UniqueFd mounted(::fsmount(context.get(), FSMOUNT_CLOEXEC, 0));
    if (!mounted) return errno;
    const std::string name = fmt::format("{}/abort", minor(static_cast<dev_t>(device)));
    const UniqueFd fd(::openat(mounted.get(), name.c_str(), O_WRONLY | O_CLOEXEC));
    if (!fd) return errno;
    return ::write(fd.get(), "1", 1) == 1 ? 0 : errno;
}

}  // namespace

bool Mount::can_abort() const { return ::geteuid() == 0 || ::access(control_file(device_).c_str(), W_OK) == 0; }

Task<void> Mount::abort() {
    const int error = co_await run_blocking([this] {
        // It has ended already, and its number and its place may be those of another mount by now.
        if (!connected()) return 0;
        const int failed = write_abort(control_file(device_));
        if (failed == 0 || write_abort_unseen(device_) == 0) return 0;
        // Where that is not to be had: the forced kind of unmounting aborts first, and need not succeed as a whole.
        // By a descriptor, which keeps it mounted, and shows that it is ours: somebody may have covered it.
        if (const UniqueFd root = open_own_root()) {
            (void)::umount2(fmt::format("/proc/self/fd/{}", root.get()).c_str(), MNT_FORCE);
        }
        return ::geteuid() == 0 ? 0 : failed;
    });
    if (error != 0) log::warn("'{}': aborting the connection to the kernel: {}", path_, errno_text(error));
}

}  // namespace gantry::fuse
