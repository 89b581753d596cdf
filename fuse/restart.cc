#include "fuse/restart.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

#include <algorithm>

#include "fuse/mount.h"
#include "fuse/mount_point.h"
#include "fuse/mountinfo.h"
#include "fuse/saved.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"
#include "runtime/own_mounts.h"
#include "schema/options.h"

namespace gantry::fuse {

namespace {

constexpr std::string_view kNamePrefix = "fuse-";

std::string keeper_name(const std::string& export_id) { return fmt::format("{}{}", kNamePrefix, export_id); }

enum class Part : uint8_t { kDevice, kCovered, kState, kUnknown };

/// The keeper hands descriptors back in no certain order: what each is shows by itself.
Part part_of(int fd) {
    const int flags = ::fcntl(fd, F_GETFL);
    if (flags < 0) return Part::kUnknown;
    if (flags & O_PATH) return Part::kCovered;
    struct stat st;
    if (::fstat(fd, &st) != 0) return Part::kUnknown;
    if (S_ISCHR(st.st_mode) && st.st_rdev == ::gnu_dev_makedev(10, 229)) return Part::kDevice;
    return S_ISREG(st.st_mode) ? Part::kState : Part::kUnknown;
}

OwnMounts::Mounted place_in(const std::string& export_id, const json::object& mount) {
    return {fmt::format("FUSE export '{}'", export_id), text_in(mount, "path"), number_in(mount, "device"),
            number_in(mount, "covered-device"), number_in(mount, "covered-inode")};
}

bool is_mounted(const std::string& export_id, uint64_t device) {
    const auto mounts = read_mountinfo();
    return mounts && device != 0 && std::ranges::any_of(*mounts, [&](const MountEntry& mount) {
               return mount.type == kFilesystemType && mount.device == device &&
                      mount.source == mount_source(export_id);
           });
}

Result<Legacy> assemble(std::vector<UniqueFd> fds) {
    Legacy legacy;
    for (UniqueFd& fd : fds) {
        switch (part_of(fd.get())) {
            case Part::kDevice:
                legacy.devices.push_back(std::move(fd));
                break;
            case Part::kCovered:
                legacy.covered = std::move(fd);
                break;
            case Part::kState: {
                TRY(legacy.file, StateFile::adopt(std::move(fd)));
                break;
            }
            case Part::kUnknown:
                return fail(ErrorKind::kInvalid, "a descriptor among them is nothing of an export");
        }
    }
    if (!legacy.file || legacy.devices.empty()) {
        return fail(ErrorKind::kInvalid, "a part is missing: {} of /dev/fuse, {} with the state", legacy.devices.size(),
                    legacy.file ? 1 : 0);
    }
    TRY(legacy.state, legacy.file->read());
    const json::object* agreed = object_in(legacy.state, "negotiated");
    if (!agreed || !object_in(legacy.state, "mount")) {
        return fail(ErrorKind::kInvalid, "its state does not tell what was agreed with the kernel");
    }
    TRY(legacy.agreed, Negotiated::load(*agreed));
    return legacy;
}

}  // namespace

void announce_legacies(exports::Keeper& keeper) {
    for (const std::string& name : keeper.waiting()) {
        if (!name.starts_with(kNamePrefix)) continue;
        const std::string id = name.substr(kNamePrefix.size());
        std::vector<UniqueFd> copies;
        for (const int fd : keeper.look(name)) copies.emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
        Result<Legacy> legacy = assemble(std::move(copies));
        if (legacy) {
            OwnMounts::Mounted place = place_in(id, *object_in(legacy->state, "mount"));
            if (is_mounted(id, place.device)) {
                log::info("export '{}': '{}' waits for whoever takes it over", id, place.path);
                OwnMounts::process().left_behind(std::move(place), std::move(legacy->covered));
                continue;
            }
            log::info("export '{}': '{}' was unmounted meanwhile", id, place.path);
        } else {
            log::warn("export '{}': what was left of it is of no use: {}", id, legacy.error().message());
        }
        keeper.take(name).clear();
        keeper.drop(name);
    }
}

std::optional<Legacy> take_legacy(exports::Keeper& keeper, const std::string& export_id) {
    std::vector<UniqueFd> fds = keeper.take(keeper_name(export_id));
    if (fds.empty()) return std::nullopt;
    Result<Legacy> legacy = assemble(std::move(fds));
    if (!legacy) {
        log::warn("export '{}': what was left of it is of no use: {}", export_id, legacy.error().message());
        keeper.drop(keeper_name(export_id));
        return std::nullopt;
    }
    const OwnMounts::Mounted place = place_in(export_id, *object_in(legacy->state, "mount"));
    OwnMounts::process().remove(place.covered_device, place.covered_inode);
    return std::move(*legacy);
}

Task<void> give_up_legacy(exports::Keeper& keeper, std::string export_id, Legacy legacy) {
    const json::object saved = *object_in(legacy.state, "mount");
    auto mount = co_await Mount::adopt(saved, std::move(legacy.devices.front()), std::move(legacy.covered));
    legacy.devices.clear();
    keeper.drop(keeper_name(export_id));
    if (!mount) {
        // What a connection that was aborted leaves is still mounted.
        co_await run_blocking([] { return clean_stale_mounts(); });
        co_return;
    }
    if ((*mount)->can_abort()) co_await (*mount)->abort();
    (*mount)->close_fd();
    const Result<> gone = co_await (*mount)->unmount(true);
    if (!gone) log::warn("export '{}': {}", export_id, gone.error().message());
}

Task<void> give_up_legacies(exports::Keeper& keeper) {
    for (const std::string& name : keeper.waiting()) {
        if (!name.starts_with(kNamePrefix)) continue;
        const std::string id = name.substr(kNamePrefix.size());
        std::optional<Legacy> legacy = take_legacy(keeper, id);
        if (!legacy) continue;
        log::warn("export '{}' of the process before this one is not wanted any more: its file is unmounted", id);
        co_await give_up_legacy(keeper, id, std::move(*legacy));
    }
}

KeptExport::KeptExport(exports::Keeper& keeper, const std::string& export_id)
    : keeper_(keeper), name_(keeper_name(export_id)) {}

Result<std::unique_ptr<KeptExport>> KeptExport::begin(exports::Keeper& keeper, const std::string& export_id,
                                                      std::span<const int> devices, int covered,
                                                      const json::object& state) {
    std::unique_ptr<KeptExport> kept(new KeptExport(keeper, export_id));
    TRY(kept->file_, StateFile::create());
    CHECK_OK(kept->file_->write(state));
    std::vector<int> all(devices.begin(), devices.end());
    if (covered >= 0) all.push_back(covered);
    all.push_back(kept->file_->fd());
    CHECK_OK(keeper.put(kept->name_, all));
    return kept;
}

std::unique_ptr<KeptExport> KeptExport::inherit(exports::Keeper& keeper, const std::string& export_id,
                                                std::unique_ptr<StateFile> file) {
    std::unique_ptr<KeptExport> kept(new KeptExport(keeper, export_id));
    kept->file_ = std::move(file);
    kept->inherited_ = true;
    return kept;
}

Result<> KeptExport::add(std::span<const int> devices) { return keeper_.put(name_, devices); }

void KeptExport::update(const json::object& state) {
    if (const Result<> written = file_->write(state); !written) {
        log::warn("'{}' is kept as it was before: {}", name_, written.error().message());
    }
}

void KeptExport::end() { keeper_.drop(name_); }

}  // namespace gantry::fuse
