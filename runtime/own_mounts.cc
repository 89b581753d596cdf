#include "runtime/own_mounts.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>

#include "runtime/unique_fd.h"

namespace gantry {

namespace {

Result<Place> ask(int fd, const char* path, int flags) {
    struct statx st;
    // An empty mask: FUSE then tells the device and asks nobody; the mount's id comes from the kernel in any case.
    if (::statx(fd, path, flags | AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, 0, &st) < 0) {
        return std::unexpected(Error::from_errno(errno, path));
    }
    Place place;
    place.device = ::gnu_dev_makedev(st.stx_dev_major, st.stx_dev_minor);
    if (st.stx_mask & STATX_MNT_ID) place.mount_id = st.stx_mnt_id;
    return place;
}

}  // namespace

Result<Place> place_of(const std::string& path, bool follow) {
    return ask(AT_FDCWD, path.c_str(), follow ? 0 : AT_SYMLINK_NOFOLLOW);
}

Result<Place> place_of(int fd) { return ask(fd, "", AT_EMPTY_PATH); }

std::string real_path_of_place(const std::string& path) {
    const UniqueFd fd(::open(path.c_str(), O_PATH | O_CLOEXEC));
    if (!fd) return {};
    std::array<char, 4097> buffer;
    const ssize_t n = ::readlink(fmt::format("/proc/self/fd/{}", fd.get()).c_str(), buffer.data(), buffer.size());
    if (n <= 0 || static_cast<size_t>(n) >= buffer.size()) return {};
    return std::string(buffer.data(), static_cast<size_t>(n));
}

OwnMounts& OwnMounts::process() {
    static OwnMounts mounts;
    return mounts;
}

Result<> OwnMounts::reserve(Mounted entry) {
    const std::lock_guard lock(m_);
    const auto same = std::ranges::find_if(all_, [&](const Mounted& other) {
        return other.covered_device == entry.covered_device && other.covered_inode == entry.covered_inode;
    });
    if (same != all_.end()) {
        return fail(ErrorKind::kExists, "There already is a FUSE export on '{}'; it is {}", entry.path, same->user);
    }
    all_.push_back(std::move(entry));
    count_.store(all_.size());
    return {};
}

void OwnMounts::mounted(uint64_t covered_device, uint64_t covered_inode, uint64_t device) {
    const std::lock_guard lock(m_);
    for (Mounted& entry : all_) {
        if (entry.covered_device == covered_device && entry.covered_inode == covered_inode) entry.device = device;
    }
}

void OwnMounts::remove(uint64_t covered_device, uint64_t covered_inode) {
    const std::lock_guard lock(m_);
    std::erase_if(all_, [&](const Mounted& entry) {
        return entry.covered_device == covered_device && entry.covered_inode == covered_inode;
    });
    std::erase_if(left_, [&](const Left& entry) {
        return entry.covered_device == covered_device && entry.covered_inode == covered_inode;
    });
    count_.store(all_.size());
}

void OwnMounts::left_behind(Mounted entry, UniqueFd covered) {
    const std::lock_guard lock(m_);
    left_.push_back({entry.covered_device, entry.covered_inode, entry.device, std::move(covered)});
    all_.push_back(std::move(entry));
    count_.store(all_.size());
}

UniqueFd OwnMounts::below_left_behind(const std::string& path) const {
    if (count_.load() == 0) return {};
    const auto place = place_of(path, true);
    if (!place) return {};
    const std::lock_guard lock(m_);
    for (const Left& entry : left_) {
        if (entry.device == place->device && entry.covered) {
            return UniqueFd(::fcntl(entry.covered.get(), F_DUPFD_CLOEXEC, 3));
        }
    }
    return {};
}

std::optional<std::string> OwnMounts::server_of(uint64_t device) const {
    if (count_.load() == 0) return std::nullopt;
    const std::lock_guard lock(m_);
    for (const Mounted& entry : all_) {
        if (entry.device == device && device != 0) return entry.user;
    }
    return std::nullopt;
}

Result<> OwnMounts::check_path(const std::string& path) const {
    if (count_.load() == 0) return {};
    const auto place = place_of(path, true);
    return check_device(place ? std::optional(place->device) : std::nullopt, path);
}

Result<> OwnMounts::check_fd(int fd, const std::string& path) const {
    if (count_.load() == 0) return {};
    const auto place = place_of(fd);
    return check_device(place ? std::optional(place->device) : std::nullopt, path);
}

Result<> OwnMounts::check_device(std::optional<uint64_t> device, const std::string& path) const {
    if (!device) return {};
    const std::optional<std::string> server = server_of(*device);
    if (!server) return {};
    return std::unexpected(Error(ErrorKind::kInvalid,
                                 fmt::format("Could not open '{}': {}; it is {} of this process, which would wait for "
                                             "itself",
                                             path, errno_text(EDEADLK), *server),
                                 EDEADLK));
}

}  // namespace gantry
