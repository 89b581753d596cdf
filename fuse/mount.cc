#include "fuse/mount.h"

#include <poll.h>

#include <algorithm>
#include <optional>

#include "fuse/mount_point.h"
#include "fuse/saved.h"
#include "fuse/stale_mounts.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"
#include "runtime/own_mounts.h"

namespace gantry::fuse {

namespace {

/// Where the mount of `device` is now: it may have been moved. Nothing: it is gone.
Result<std::optional<MountEntry>> find_mount(uint64_t device) {
    TRY(std::vector<MountEntry> mounts, read_mountinfo());
    std::optional<MountEntry> found;
    for (MountEntry& mount : mounts) {
        if (mount.device != device || mount.type != kFilesystemType) continue;
        // Bind mounts of it elsewhere belong to whoever made them; the first is ours.
        if (!found) found = std::move(mount);
    }
    return found;
}

/// clean_stale_mounts() beside everything else: a mount whose server is silent takes it a second.
struct CleaningWork : PoolItem {
    static void start(BlockingPool& pool) {
        auto* work = new CleaningWork;
        work->run = [](PoolItem* item) {
            clean_stale_mounts();
            delete static_cast<CleaningWork*>(item);
        };
        pool.submit(*work);
    }
};

}  // namespace

Task<Result<std::unique_ptr<Mount>>> Mount::create(MountRequest request) {
    if (!stale_mounts_looked_for()) CleaningWork::start(Loop::current().pool());
    co_return co_await run_blocking([&request] { return create_blocking(std::move(request)); });
}

Result<std::unique_ptr<Mount>> Mount::create_blocking(MountRequest request) {
    TRY(MountPoint point, find_mount_point(request.mountpoint));
    std::unique_ptr<Mount> mount(new Mount);
    mount->export_id_ = request.export_id;
    mount->path_ = point.path;
    mount->covered_device_ = point.device;
    mount->covered_inode_ = point.inode;
    OwnMounts& own = OwnMounts::process();
    CHECK_OK(own.reserve(
        {fmt::format("FUSE export '{}'", request.export_id), request.mountpoint, 0, point.device, point.inode}));
    mount->known_ = true;
    TRY(Covered covered, cover(point, request));
    mount->fd_ = std::move(covered.fd);
    mount->allow_other_ = covered.allow_other;
    const auto place = place_of(mount->path_, false);
    if (!place || place->device == point.device) {
        return fail(ErrorKind::kIo, "Failed to mount FUSE session to export on '{}': something else is there now",
                    mount->path_);
    }
    mount->device_ = place->device;
    mount->mounted_ = true;
    mount->covered_ = std::move(point.fd);
    own.mounted(point.device, point.inode, place->device);
    return mount;
}

Task<Result<std::unique_ptr<Mount>>> Mount::adopt(const json::object& saved, UniqueFd fd, UniqueFd covered) {
    std::unique_ptr<Mount> mount(new Mount);
    mount->fd_ = std::move(fd);
    mount->covered_ = std::move(covered);
    mount->export_id_ = text_in(saved, "export-id");
    mount->path_ = text_in(saved, "path");
    mount->device_ = number_in(saved, "device");
    mount->covered_device_ = number_in(saved, "covered-device");
    mount->covered_inode_ = number_in(saved, "covered-inode");
    mount->allow_other_ = flag_in(saved, "allow-other");
    CO_TRY(const std::optional<MountEntry> entry, find_mount(mount->device_));
    // Where the connection was aborted, the mount may still be there, and so may one of another daemon by that number.
    if (!entry || mount->device_ == 0 || entry->source != mount_source(mount->export_id_) || !mount->connected()) {
        co_return fail(ErrorKind::kInvalid, "FUSE export '{}' is not mounted on '{}' any more", mount->export_id_,
                       mount->path_);
    }
    OwnMounts& own = OwnMounts::process();
    CO_CHECK(own.reserve({fmt::format("FUSE export '{}'", mount->export_id_), mount->path_, mount->device_,
                          mount->covered_device_, mount->covered_inode_}));
    mount->known_ = true;
    mount->mounted_ = true;
    co_return mount;
}

json::object Mount::save() const {
    return {{"export-id", export_id_},
            {"path", path_},
            {"device", device_},
            {"covered-device", covered_device_},
            {"covered-inode", covered_inode_},
            {"allow-other", allow_other_}};
}

bool Mount::connected() const {
    pollfd ready{fd_.get(), POLLIN, 0};
    return fd_ && ::poll(&ready, 1, 0) >= 0 && !(ready.revents & (POLLERR | POLLHUP | POLLNVAL));
}

UniqueFd Mount::open_own_root() const {
    const auto entry = find_mount(device_);
    return entry && *entry ? open_root(**entry) : UniqueFd();
}

Task<Result<>> Mount::unmount(bool hard) {
    co_return co_await run_blocking([this, hard] { return unmount_blocking(hard); });
}

Result<> Mount::unmount_blocking(bool hard) {
    if (!mounted_) return {};
    TRY(const std::optional<MountEntry> entry, find_mount(device_));
    if (entry && !connected()) {
        // Somebody has unmounted it, or the connection was aborted: the number may be that of another mount by now.
        const UniqueFd root = open_root(*entry);
        if (root && probe(*entry, root.get()) == ServerState::kGone) CHECK_OK(detach(*entry, root.get()));
    } else if (entry && is_on_top(*entry)) {
        CHECK_OK(unmount_entry(*entry, hard));
    } else if (entry) {
        log::warn("'{}' is covered by a mount of somebody else: FUSE export '{}' stays mounted below it", entry->path,
                  export_id_);
    }
    mounted_ = false;
    forget();
    return {};
}

void Mount::forget() {
    if (known_) OwnMounts::process().remove(covered_device_, covered_inode_);
    known_ = false;
}

Mount::~Mount() {
    if (!left_) {
        // Lazily: this waits for no answer of ours.
        if (const Result<> gone = unmount_blocking(true); !gone) {
            log::warn("FUSE export '{}' stays mounted: {}", export_id_, gone.error().message());
        }
    }
    forget();
}

}  // namespace gantry::fuse
