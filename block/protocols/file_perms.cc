// Permissions and reopen: locks, and the exchange of the descriptor for one that can or cannot write.

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>

#include "block/protocols/file.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"

namespace gantry::block {

namespace {

constexpr Perm kWriting = Perm::kWrite | Perm::kWriteUnchanged | Perm::kResize;

bool wants_write(const NodeFlags& flags, EdgePerms perms, bool never_writable) {
    if (flags.read_only) return false;
    if (!flags.auto_read_only) return true;
    return any(perms.need & kWriting) && !never_writable;
}

bool has_more(FileLockSet a, FileLockSet b) { return any(a.taken & ~b.taken) || any(a.unshared & ~b.unshared); }

/// Closes a descriptor on the pool: close(2) may have to wait for a file server. Nobody waits for it.
struct CloseLater : PoolItem {
    explicit CloseLater(UniqueFd f) : fd(std::move(f)) {
        run = [](PoolItem* item) { delete static_cast<CloseLater*>(item); };
    }
    UniqueFd fd;
};

}  // namespace

FileLockSet FileNode::wanted_locks(const NodeFlags& flags, EdgePerms perms) const {
    if (!use_locks_ || flags.force_share) return {};
    return FileLockSet::of(perms);
}

/// What was written through the present description is made stable before another takes its place: a loss that nobody
/// has asked for yet would go with it. On the pool, drained.
void FileNode::leave_description() {
    if (!attributes_.writable) return;
    if (const int e = cut_padding()) log::warn("node '{}': cutting '{}': {}", name(), filename(), errno_text(e));
    if (mode_.cache_no_flush || !dirty_.exchange(false)) return;
    int r;
    do {
        r = ::fdatasync(fd_.get());
    } while (r < 0 && errno == EINTR);
    if (r == 0) return;
    const int e = errno;
    dirty_.store(true);
    note_sync_error(e);
    log::error("node '{}': flushing '{}': {}; what was written last may be lost", name(), filename(), errno_text(e));
}

/// Readies descriptor and locks for `flags` and `perms`; on failure everything is as it was before.
Task<Result<>> FileNode::prepare(const NodeFlags& flags, EdgePerms perms, bool never_writable) {
    const FileLockSet wanted = wanted_locks(flags, perms);
    const FileLockSet held = locks_ | pending_.locks;
    const bool write = wants_write(flags, perms, never_writable);
    const bool must = write || flags.cache_direct != attributes_.direct;
    const bool reopen = write != attributes_.writable || flags.cache_direct != attributes_.direct;
    if (!write && !flags.read_only && any(perms.need & kWriting)) {
        co_return fail(ErrorKind::kReadOnly, "Block node is read-only; '{}' of node '{}' cannot be opened for writing",
                       filename(), name());
    }
    // While nobody used the file it was not locked, and others may have changed its size.
    const bool first_user = !any(perms_.need) && any(perms.need);

    OpenRequest rq;
    rq.driver = driver();
    rq.filename = filename();
    rq.kind = kind_;
    rq.write = write;
    rq.direct = flags.cache_direct;
    rq.again = fd_.get();
    std::optional<OpenedFile> file;
    std::optional<uint64_t> size;
    const Result<> done = co_await run_blocking([&]() -> Result<> {
        if (reopen) {
            leave_description();
            Result<OpenedFile> opened = open_file(rq);
            // To give up the right to write is a courtesy: without a new descriptor the old one stays.
            if (!opened && must) return std::unexpected(std::move(opened).error());
            if (opened) file = std::move(*opened);
        }
        // First the union, then the look at others: of two who come at once one sees the other.
        CHECK_OK(file_lock_more(fd_.get(), held, wanted, rq.filename));
        if (has_more(wanted, locks_)) {
            Result<> checked = file_lock_check(fd_.get(), wanted, rq.filename);
            if (!checked) {
                file_unlock(fd_.get(), held | wanted, held);
                return checked;
            }
        }
        if (first_user) {
            if (const Result<uint64_t> now = file_size(fd_.get(), kind_)) size = *now;
        }
        return {};
    });
    if (!done) co_return done;
    if (size) pending_.size = size;
    pending_.locks = held | wanted;
    pending_.file = std::move(file);
    co_return Result<>();
}

Task<Result<>> FileNode::prepare_perms(EdgePerms perms) {
    CO_CHECK(co_await prepare(pending_.flags.value_or(mode_), perms,
                              pending_.flags ? pending_.never_writable : never_writable_));
    pending_.perms = perms;
    co_return Result<>();
}

Task<Result<>> FileNode::prepare_reopen(const json::object& options, const NodeFlags& flags) {
    CO_CHECK(co_await Node::prepare_reopen(options, flags));
    CO_TRY(FileOptions parsed, FileOptions::parse(driver(), schema::Options(options), flags));
    bool never_writable = false;
    const Result<uint64_t> now = co_await run_blocking([&] {
        if (!flags.read_only && flags.auto_read_only) {
            never_writable = !file_could_be_written(fd_.get(), filename(), kind_);
        }
        return file_size(fd_.get(), kind_);
    });
    if (!now) co_return std::unexpected(now.error());
    CO_CHECK(co_await prepare(flags, pending_.perms.value_or(perms_), never_writable));
    pending_.flags = flags;
    pending_.never_writable = never_writable;
    pending_.size = *now;
    co_return Result<>();
}

/// The description behind fd_ is exchanged; the locks of the old one are on the new one before they leave the old.
void FileNode::exchange_descriptor() {
    if (!pending_.file) return;
    OpenedFile file = std::move(*pending_.file);
    pending_.file.reset();
    // Shared locks that the old description holds: nobody can hold an exclusive one against us. Where the file system
    // fails nevertheless (a lost lock server), the old locks would be lost just the same.
    (void)file_lock_more(file.fd.get(), {}, pending_.locks, filename());

    // Duplicated first, so that dup3() does not close the old description here and now.
    UniqueFd old(::fcntl(fd_.get(), F_DUPFD_CLOEXEC, 0));
    detail::descriptor_closing(fd_.get());
    int r;
    do {
        r = ::dup3(file.fd.get(), fd_.get(), O_CLOEXEC);
    } while (r < 0 && (errno == EINTR || errno == EBUSY));
    CHECK(r >= 0, "a descriptor is exchanged for an open one");
    file.fd.reset();
    if (old) {
        file_unlock(old.get(), pending_.locks, {});
        auto* item = new CloseLater(std::move(old));
        Loop::current().pool().submit(*item);
    }
    take_mode(file);
    adopt_limits();
}

/// When nothing is left to be committed or aborted: the locks become what is needed now.
void FileNode::finish_commit() {
    exchange_descriptor();
    if (pending_.perms || pending_.flags) return;
    const FileLockSet wanted = wanted_locks(mode_, perms_);
    file_unlock(fd_.get(), locks_ | pending_.locks, wanted);
    locks_ = wanted;
    pending_.locks = {};
}

/// The rest of a unit that our own O_DIRECT write added is no growth.
void FileNode::take_pending_size() {
    if (!pending_.size) return;
    const uint64_t now = *pending_.size, old = size();
    pending_.size.reset();
    const bool padding = padded_.load(std::memory_order_relaxed) && now > old && now - old < limits_.request_alignment;
    if (padding || now == old) return;
    set_size(now);
    forget_data_extent();
}

void FileNode::commit_perms(EdgePerms perms) {
    take_pending_size();
    perms_ = perms;
    pending_.perms.reset();
    finish_commit();
}

void FileNode::commit_reopen() {
    if (pending_.flags) {
        mode_ = *pending_.flags;
        never_writable_ = pending_.never_writable;
    }
    take_pending_size();
    forget_data_extent();
    pending_.flags.reset();
    finish_commit();
    set_read_only(mode_.read_only || never_writable_);
}

void FileNode::forget_pending_part(bool perms) {
    if (perms) {
        pending_.perms.reset();
    } else {
        pending_.flags.reset();
    }
    if (pending_.perms || pending_.flags) return;
    pending_.size.reset();
    pending_.file.reset();
    file_unlock(fd_.get(), locks_ | pending_.locks, locks_);
    pending_.locks = {};
}

void FileNode::abort_perms() { forget_pending_part(true); }

void FileNode::abort_reopen() { forget_pending_part(false); }

}  // namespace gantry::block
