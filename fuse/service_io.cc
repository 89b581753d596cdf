// READ and WRITE.

#include <fcntl.h>

#include <algorithm>
#include <cerrno>

#include "fuse/reply_error.h"
#include "fuse/service.h"

namespace gantry::fuse {

namespace {

constexpr uint64_t kMaxEnd = INT64_MAX;
/// A page that a client has written to by mmap, brought by the kernel some time later.
constexpr uint32_t kWriteCache = 1;
/// A request that met a node of another size than expected is tried again; somebody would have to resize it all the
/// time.
constexpr int kAttempts = 16;

/// Smaller writes are done before another thread would have begun with them.
constexpr uint32_t kOverlapMin = 128 << 10;

/// How much of [offset, offset + length) lies before `size`.
uint32_t clipped(uint64_t size, uint64_t offset, uint32_t length) {
    return offset >= size ? 0 : static_cast<uint32_t>(std::min<uint64_t>(length, size - offset));
}

/// Who has opened the file with O_DSYNC or O_SYNC, or says RWF_DSYNC, is told by the answer that his data is stable:
/// the kernel sends no FSYNC behind such a write where it keeps no pages.
block::WriteFlags flags_of(const WriteIn& in) {
    return in.flags & O_DSYNC ? block::WriteFlags::kFua : block::WriteFlags::kNone;
}

}  // namespace

bool FileService::try_read(Call& call, block::Channel& channel) {
    const auto in = call.arguments<ReadIn>();
    if (in.size > call.room_size || in.offset > kMaxEnd) [[unlikely]] {
        call.fail(EINVAL);
        return true;
    }
    const uint32_t length = clipped(channel.size(), in.offset, in.size);
    if (length != 0) {
        const iovec one{call.room, length};
        if (channel.try_read(in.offset, IoVec(one)) != 0) return false;
    }
    call.succeed_with_data(length);
    return true;
}

Task<void> FileService::do_read(Call& call, block::Channel& channel) {
    const auto in = call.arguments<ReadIn>();
    Result<> done;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
        while (channel.quiesced()) co_await channel.resumed();
        const uint32_t length = clipped(channel.size(), in.offset, in.size);
        if (length != 0) {
            const iovec one{call.room, length};
            done = co_await channel.read(in.offset, IoVec(one), true);
        }
        if (length == 0 || done) {
            call.succeed_with_data(length);
            co_return;
        }
        if (clipped(channel.size(), in.offset, in.size) == length) break;
    }
    call.fail(reply_errno(done.error()));
}

bool FileService::try_write(Call& call, block::Channel& channel) {
    const auto in = call.arguments<WriteIn>();
    if (!options_.writable) [[unlikely]] {
        call.fail(EACCES);
        return true;
    }
    if (in.size > call.data_size || in.offset > kMaxEnd || in.size > kMaxEnd - in.offset) [[unlikely]] {
        call.fail(in.size > call.data_size ? EIO : EFBIG);
        return true;
    }
    if (in.size != 0) {
        if (in.offset + in.size > channel.size()) return false;
        // While one is copied to the page cache the next can be fetched.
        if (call.among_others && in.size > kOverlapMin) return false;
        const iovec one{call.room, in.size};
        if (channel.try_write(in.offset, IoVec(one), flags_of(in)) != 0) return false;
        written();
    }
    call.succeed(WriteOut{.size = in.size});
    return true;
}

Task<void> FileService::do_write(Call& call, block::Channel& channel) {
    const auto in = call.arguments<WriteIn>();
    const uint64_t end = in.offset + in.size;
    // What was mapped when the file was longer does not make it long again.
    const bool late = (in.write_flags & kWriteCache) != 0;
    int failure = ENOSPC;
    for (int attempt = 0; attempt < kAttempts; ++attempt) {
        while (channel.quiesced()) co_await channel.resumed();
        uint64_t size = channel.size();
        if (end > size && options_.growable && !late) {
            Result<> grown = co_await grow(channel, end);
            size = channel.size();
            // What fits is written all the same.
            if (!grown && in.offset >= size) {
                failure = reply_errno(grown.error());
                break;
            }
            // Cut again already.
            if (grown && size < end) continue;
        }
        const uint32_t length = clipped(size, in.offset, in.size);
        if (length == 0 && !late) {
            failure = ENOSPC;
            break;
        }
        Result<> done;
        if (length != 0) {
            const iovec one{call.room, length};
            done = co_await channel.write(in.offset, IoVec(one), flags_of(in), true);
            // What part of a failed write has come to the disk is not known.
            written();
        }
        if (done) {
            call.succeed(WriteOut{.size = late ? in.size : length});
            co_return;
        }
        failure = reply_errno(done.error());
        if (clipped(channel.size(), in.offset, in.size) == length) break;
    }
    call.fail(failure);
}

}  // namespace gantry::fuse
