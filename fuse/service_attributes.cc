// GETATTR and SETATTR.

#include <sys/stat.h>

#include <cerrno>

#include "fuse/reply_error.h"
#include "fuse/service.h"
#include "runtime/blocking_pool.h"
#include "runtime/cross_loop.h"

namespace gantry::fuse {

namespace {

constexpr uint32_t kOwnerBits = kSetUid | kSetGid;
/// Mean nothing here: times are those of the data, set-id bits are never honoured (the mount is nosuid).
constexpr uint32_t kHarmless =
    kSetFh | kSetLockOwner | kSetKillSuidgid | kSetAtime | kSetMtime | kSetCtime | kSetAtimeNow | kSetMtimeNow;

}  // namespace

Task<std::optional<uint64_t>> allocated_bytes(std::shared_ptr<block::Node> node) {
    Result<block::ImageInfo> info = co_await node->image_info();
    co_return info ? info->actual_size : std::nullopt;
}

Task<std::optional<int64_t>> last_written_ns(std::shared_ptr<block::Node> node) {
    while (!node->children().empty()) {
        const block::Child* data = node->child("data-file");
        for (const auto& child : node->children()) {
            if (!data && child->role != block::ChildRole::kBacking) data = child.get();
        }
        if (!data) co_return std::nullopt;
        node = data->node;
    }
    const auto file = node->passthrough();
    if (!file) co_return std::nullopt;
    struct stat st;
    const int r = co_await run_blocking([&] { return ::fstat(file->fd, &st); });
    if (r < 0) co_return std::nullopt;
    const int64_t seconds = st.st_mtim.tv_sec;
    co_return seconds * 1'000'000'000 + st.st_mtim.tv_nsec;
}

bool FileService::attributes_known() const {
    if (backing_id_.load(std::memory_order_relaxed) != 0) return false;
    return !options_.allocated || !attributes_.allocation_stale();
}

Task<void> FileService::refresh_allocation() {
    attributes_.allocation_asked();
    const std::optional<uint64_t> bytes = co_await options_.allocated();
    attributes_.set_allocation(bytes);
}

Task<void> FileService::do_getattr(Call& call, block::Channel& channel) {
    if (const int fd = backing_fd_.load(std::memory_order_relaxed); fd >= 0) {
        struct stat st;
        const int r = co_await run_blocking([&] { return ::fstat(fd, &st) < 0 ? errno : 0; });
        AttrOut out = attributes_.answer(channel.size());
        if (r == 0) {
            Attr& a = out.attr;
            a.blocks = static_cast<uint64_t>(st.st_blocks);
            a.mtime = static_cast<uint64_t>(st.st_mtim.tv_sec);
            a.mtime_nsec = static_cast<uint32_t>(st.st_mtim.tv_nsec);
            if (std::pair(a.ctime, a.ctime_nsec) < std::pair(a.mtime, a.mtime_nsec)) {
                a.ctime = a.mtime;
                a.ctime_nsec = a.mtime_nsec;
            }
        }
        call.succeed(out);
        co_return;
    }
    // One asks; who comes meanwhile is told what is known.
    if (options_.allocated && attributes_.allocation_stale() && !asking_allocation_.exchange(true)) {
        co_await run_on(main_loop_, refresh_allocation());
        asking_allocation_.store(false);
    }
    call.succeed(attributes_.answer(channel.size()));
}

bool FileService::check_setattr(Call& call, const SetattrIn& in) const {
    uint32_t allowed = kHarmless | kSetMode | kSetSize;
    if (options_.allow_other) allowed |= kOwnerBits;
    if (in.valid & ~allowed) {
        call.fail(EOPNOTSUPP);
        return false;
    }
    if (in.valid & kSetMode) {
        if (!options_.allow_other && (in.mode & 077)) {
            call.fail(EPERM);
            return false;
        }
        if (!options_.writable && (in.mode & 0222)) {
            call.fail(EROFS);
            return false;
        }
    }
    if (in.valid & kSetSize) {
        if (!options_.writable || in.size > INT64_MAX) {
            call.fail(options_.writable ? EFBIG : EACCES);
            return false;
        }
    }
    return true;
}

Task<void> FileService::do_setattr(Call& call, block::Channel& channel) {
    const auto in = call.arguments<SetattrIn>();
    if (!check_setattr(call, in)) co_return;
    // First what may fail.
    if (in.valid & kSetSize) {
        Result<> cut = co_await truncate(channel, in.size);
        if (!cut) {
            call.fail(reply_errno(cut.error()));
            co_return;
        }
    }
    if (in.valid & kSetMode) attributes_.set_mode(in.mode);
    if (in.valid & kSetUid) attributes_.set_uid(in.uid);
    if (in.valid & kSetGid) attributes_.set_gid(in.gid);
    if (in.valid & (kSetMode | kOwnerBits)) {
        attributes_.status_changed();
        if (options_.status_changed) options_.status_changed();
    }
    co_await do_getattr(call, channel);
}

}  // namespace gantry::fuse
