// FileService: which call goes where, and what is answered at once.

#include "fuse/service.h"

#include <fcntl.h>

#include <cerrno>

#include "fuse/long_call.h"
#include "fuse/reply_error.h"
#include "runtime/cross_loop.h"

namespace gantry::fuse {

namespace {

constexpr uint32_t kFilesystemBlock = 4096;
constexpr uint32_t kNameLength = 255;

}  // namespace

FileService::FileService(Loop& main_loop, ServiceOptions options)
    : main_loop_(main_loop), options_(std::move(options)), attributes_(options_.writable, options_.uid, options_.gid) {}

FileService::~FileService() { CHECK(!long_calls_, "a FileService outlives its calls"); }

bool FileService::try_answer(Call& call, block::Channel& channel) {
    switch (call.opcode()) {
        case Opcode::kRead:
            return try_read(call, channel);
        case Opcode::kWrite:
            return try_write(call, channel);
        case Opcode::kGetattr:
            if (!attributes_known()) return false;
            call.succeed(attributes_.answer(channel.size()));
            return true;
        case Opcode::kOpen: {
            const auto in = call.arguments<OpenIn>();
            if (options_.honour_o_trunc && options_.writable && (in.flags & O_TRUNC)) return false;
            open(call);
            return true;
        }
        case Opcode::kFlush:
            // What passes us by lies in the file behind, as after any close.
            if (unflushed_.load() && !backing_id_.load(std::memory_order_relaxed)) return false;
            call.succeed();
            return true;
        case Opcode::kRelease:
            release();
            call.succeed();
            return true;
        case Opcode::kStatfs:
            statfs(call, channel);
            return true;
        case Opcode::kSetattr:
        case Opcode::kFsync:
        case Opcode::kFallocate:
        case Opcode::kLseek:
            return false;
        case Opcode::kLookup:
            call.fail(ENOENT);
            return true;
        case Opcode::kIoctl:
            call.fail(ENOTTY);
            return true;
        case Opcode::kDestroy:
            call.succeed();
            return true;
        case Opcode::kInterrupt:
            LongCall::interrupt(*this, call.arguments<uint64_t>());
            call.silent = true;
            return true;
        case Opcode::kForget:
        case Opcode::kBatchForget:
        case Opcode::kNotifyReply:
            call.silent = true;
            return true;
        default:
            // The kernel does not ask again, and does without: locks are its own, copies go through memory, extended
            // attributes do not exist.
            call.fail(ENOSYS);
            return true;
    }
}

Task<void> FileService::answer(Call& call, block::Channel& channel) {
    switch (call.opcode()) {
        case Opcode::kRead:
            return do_read(call, channel);
        case Opcode::kWrite:
            return do_write(call, channel);
        case Opcode::kGetattr:
            return do_getattr(call, channel);
        case Opcode::kSetattr:
            return do_setattr(call, channel);
        case Opcode::kOpen:
            return do_open(call, channel);
        case Opcode::kFlush:
        case Opcode::kFsync:
            return do_flush(call, channel);
        case Opcode::kFallocate:
            return do_fallocate(call, channel);
        case Opcode::kLseek:
            return do_lseek(call, channel);
        default:
            break;
    }
    CHECK(try_answer(call, channel), "what needs no waiting is answered at once");
    return []() -> Task<void> { co_return; }();
}

void FileService::set_backing(int32_t backing_id, int fd) {
    backing_fd_.store(backing_id ? fd : -1, std::memory_order_relaxed);
    backing_id_.store(backing_id, std::memory_order_relaxed);
}

void FileService::touched() { attributes_.data_changed_visibly(); }

void FileService::hurry() { hurry_.store(true, std::memory_order_relaxed); }

void FileService::written() {
    attributes_.data_changed();
    if (!unflushed_.load()) unflushed_.store(true);
}

void FileService::open(Call& call) {
    const auto in = call.arguments<OpenIn>();
    const bool reads_only = (in.flags & O_ACCMODE) == O_RDONLY;
    if (!reads_only && !options_.writable) return call.fail(EROFS);
    OpenOut out;
    if (const int32_t backing = backing_id_.load(std::memory_order_relaxed)) {
        out.open_flags = kOpenPassthrough;
        out.backing_id = backing;
    } else if (options_.cached) {
        out.open_flags = kOpenKeepCache;
    } else {
        out.open_flags = kOpenDirectIo | kOpenParallelDirectWrites;
    }
    if (reads_only) out.open_flags |= kOpenNoFlush;
    open_files_.fetch_add(1, std::memory_order_relaxed);
    call.succeed(out);
}

void FileService::release() {
    uint64_t open = open_files_.load(std::memory_order_relaxed);
    while (open != 0 && !open_files_.compare_exchange_weak(open, open - 1, std::memory_order_relaxed)) {
    }
}

void FileService::statfs(Call& call, block::Channel& channel) const {
    StatfsOut out;
    out.bsize = out.frsize = kFilesystemBlock;
    out.blocks = channel.size() / kFilesystemBlock;
    out.namelen = kNameLength;
    call.succeed(out);
}

Task<void> FileService::do_open(Call& call, block::Channel& channel) {
    Result<> cut = co_await truncate(channel, 0);
    if (!cut) {
        call.fail(reply_errno(cut.error()));
        co_return;
    }
    open(call);
}

Task<void> FileService::do_flush(Call& call, block::Channel& channel) {
    unflushed_.store(false);
    Result<> flushed = co_await channel.flush();
    if (flushed) {
        call.succeed();
        co_return;
    }
    unflushed_.store(true);
    call.fail(reply_errno(flushed.error()));
}

// ---- The length of the node ----

Task<Result<>> FileService::resize_on_main(uint64_t size, bool grow_only) {
    co_return co_await options_.resize(size, grow_only);
}

Task<Result<>> FileService::grow(block::Channel& channel, uint64_t size) {
    constexpr uint64_t kSector = 512;
    auto guard = co_await resize_mutex_.lock();
    if (channel.size() >= size) co_return Result<>();
    if (!options_.resize) co_return fail(ErrorKind::kUnsupported, "nothing can enlarge the node");
    Result<> done = co_await run_on(main_loop_, resize_on_main(size, true));
    // Formats that count in sectors refuse other sizes.
    if (!done && done.error().kind() == ErrorKind::kInvalid && size % kSector != 0) {
        const uint64_t sectors = size / kSector + 1;
        done = co_await run_on(main_loop_, resize_on_main(sectors * kSector, true));
    }
    if (done) attributes_.data_changed_visibly();
    co_return done;
}

Task<Result<>> FileService::truncate(block::Channel& channel, uint64_t size) {
    auto guard = co_await resize_mutex_.lock();
    if (!options_.resize) co_return fail(ErrorKind::kUnsupported, "nothing can resize the node");
    // As with any file, its mtime changes also when its length does not.
    Result<> done;
    if (channel.size() != size) done = co_await run_on(main_loop_, resize_on_main(size, false));
    if (done) {
        attributes_.data_changed_visibly();
        unflushed_.store(true);
    }
    co_return done;
}

}  // namespace gantry::fuse
