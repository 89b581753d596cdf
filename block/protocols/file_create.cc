#include "block/protocols/file_create.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <vector>

#include "block/measure.h"
#include "block/protocols/file_locks.h"
#include "block/protocols/file_open.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"
#include "runtime/own_mounts.h"
#include "runtime/unique_fd.h"
#include "schema/options.h"

namespace gantry::block {

namespace {

constexpr uint64_t kReserveStep = uint64_t{1} << 30;
constexpr uint64_t kFillStep = uint64_t{16} << 20;

/// What an open file is while it is being made: locked against everybody who minds, or minded.
struct Making {
    UniqueFd fd;
    FileCreated created;
    uint64_t device_bytes = 0;
};

std::unexpected<Error> could_not(const std::string& filename, int e) {
    return fail_errno(e, "Could not create '{}'", filename);
}

/// Of two makers at once one is refused: each takes the right to write and shares it with nobody.
Result<> lock(int fd, const std::string& filename) {
    if (!file_locks_supported(fd)) {
        log::warn("the file system of '{}' has no locks; other processes are not kept away", filename);
        return {};
    }
    const FileLockSet wanted{Perm::kWrite | Perm::kResize, Perm::kWrite | Perm::kResize};
    CHECK_OK(file_lock_more(fd, {}, wanted, filename));
    return file_lock_check(fd, wanted, filename);
}

/// `existed` is certain: the file is made with O_EXCL or found.
Result<Making> open_or_make(const std::string& filename) {
    Making making;
    constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY;
    for (int attempt = 0; attempt < 16 && !making.fd; attempt++) {
        CHECK_OK(OwnMounts::process().check_path(filename));
        making.fd.reset(::open(filename.c_str(), kFlags));
        making.created.existed = true;
        if (making.fd) break;
        if (errno == EINTR) continue;
        if (errno != ENOENT) return could_not(filename, errno);
        making.fd.reset(::open(filename.c_str(), kFlags | O_CREAT | O_EXCL, 0644));
        making.created.existed = false;
        if (!making.fd && errno != EEXIST && errno != EINTR) return could_not(filename, errno);
    }
    if (!making.fd) return could_not(filename, EAGAIN);
    CHECK_OK(OwnMounts::process().check_fd(making.fd.get(), filename));
    struct stat st;
    if (::fstat(making.fd.get(), &st) < 0) return could_not(filename, errno);
    if (S_ISBLK(st.st_mode)) {
        making.created.is_device = true;
        TRY(making.device_bytes, file_size(making.fd.get(), FileKind::kBlockDevice));
        return making;
    }
    if (S_ISDIR(st.st_mode)) return could_not(filename, EISDIR);
    if (!S_ISREG(st.st_mode)) {
        return fail(ErrorKind::kInvalid, "Could not create '{}': it exists and is neither a file nor a block device",
                    filename);
    }
    return making;
}

/// Neither is worth failing for unless it was asked for: other file systems do not have it.
Result<> apply_hints(int fd, const FileCreation& what) {
    if (what.extent_size_hint != 0) {
        struct fsxattr attributes = {};
        int r = ::ioctl(fd, FS_IOC_FSGETXATTR, &attributes);
        if (r == 0 && !(attributes.fsx_xflags & FS_XFLAG_EXTSIZE)) {
            attributes.fsx_xflags |= FS_XFLAG_EXTSIZE;
            attributes.fsx_extsize = static_cast<uint32_t>(what.extent_size_hint);
            r = ::ioctl(fd, FS_IOC_FSSETXATTR, &attributes);
        }
        if (r < 0 && what.hint_given) {
            return fail_errno(errno, "Failed to set extent size hint of '{}' to {}", what.filename,
                              what.extent_size_hint);
        }
    }
    if (what.nocow) {
        // Only an empty file can be switched; the result shows in speed alone.
        int flags = 0;
        if (::ioctl(fd, FS_IOC_GETFLAGS, &flags) == 0) {
            flags |= FS_NOCOW_FL;
            (void)::ioctl(fd, FS_IOC_SETFLAGS, &flags);
        }
    }
    return {};
}

Result<> set_length(int fd, uint64_t bytes, const std::string& filename) {
    int r;
    do {
        r = ::ftruncate(fd, static_cast<off_t>(bytes));
    } while (r < 0 && errno == EINTR);
    if (r < 0) return fail_errno(errno, "Could not resize file '{}' to {} bytes", filename, bytes);
    return {};
}

Result<> write_zero_bytes(int fd, uint64_t offset, uint64_t bytes, const std::string& filename) {
    static const std::vector<uint8_t> kZeroes(1 << 20);
    while (bytes != 0) {
        const ssize_t r =
            ::pwrite(fd, kZeroes.data(), std::min<uint64_t>(bytes, kZeroes.size()), static_cast<off_t>(offset));
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) return fail_errno(r < 0 ? errno : EIO, "Could not write zeros for preallocation of '{}'", filename);
        offset += static_cast<uint64_t>(r);
        bytes -= static_cast<uint64_t>(r);
    }
    return {};
}

Result<> reserve_bytes(int fd, uint64_t offset, uint64_t bytes, const std::string& filename) {
    const int e = ::posix_fallocate(fd, static_cast<off_t>(offset), static_cast<off_t>(bytes));
    if (e != 0) return fail_errno(e, "Could not preallocate data for the new file '{}'", filename);
    return {};
}

/// The first steps, all blocking: nothing is changed before the locks are ours.
Result<Making> begin(const FileCreation& what) {
    TRY(Making making, open_or_make(what.filename));
    if (making.created.is_device) {
        if (making.device_bytes < what.size) {
            return fail(ErrorKind::kNoSpace,
                        "The image size is too large for '{}': the device has {} bytes, {} are "
                        "needed",
                        what.filename, making.device_bytes, what.size);
        }
        return making;
    }
    const int fd = making.fd.get();
    Result<> ready = lock(fd, what.filename);
    if (ready) ready = set_length(fd, 0, what.filename);
    if (ready) ready = apply_hints(fd, what);
    if (ready) ready = set_length(fd, what.size, what.filename);
    if (ready) return making;
    if (!making.created.existed) (void)::unlink(what.filename.c_str());
    return std::unexpected(std::move(ready).error());
}

Task<Result<>> take_space(int fd, FileCreation what, Progress progress) {
    const bool full = what.preallocation == Preallocation::kFull;
    const uint64_t step = full ? kFillStep : kReserveStep;
    for (uint64_t done = 0; done < what.size;) {
        const uint64_t now = std::min(step, what.size - done);
        CO_CHECK(co_await run_blocking([&] {
            return full ? write_zero_bytes(fd, done, now, what.filename) : reserve_bytes(fd, done, now, what.filename);
        }));
        done += now;
        if (progress && !progress(done, what.size)) co_return fail(ErrorKind::kCancelled, "cancelled");
    }
    if (!full) co_return Result<>();
    const int e = co_await run_blocking([&] { return ::fsync(fd) < 0 ? errno : 0; });
    if (e) co_return fail_errno(e, "Could not flush the new file '{}'", what.filename);
    co_return Result<>();
}

// ---- The creator ----

constexpr CreationOption kWords[] = {
    {"size", "size", "Virtual disk size"},
    {"preallocation", "str", "Preallocation mode (off, falloc, full)"},
    {"nocow", "bool (on/off)", "Turn off copy-on-write (valid only on btrfs)"},
    {"extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"},
};

std::span<const CreationOption> creation_words() { return kWords; }

Task<Result<>> create(Graph&, json::object object, Progress progress) {
    const schema::Options options(object);
    FileCreation what;
    what.filename = options.str("filename");
    what.size = options.size("size");
    CO_TRY(what.preallocation, preallocation_named("preallocation", options.str("preallocation", "off")));
    what.nocow = options.flag("nocow");
    what.hint_given = options.has("extent-size-hint");
    what.extent_size_hint = options.size("extent-size-hint", what.extent_size_hint);
    CO_TRY([[maybe_unused]] const FileCreated created,
           co_await create_plain_file(std::move(what), std::move(progress)));
    co_return Result<>();
}

Task<Result<>> create_from_words(Graph&, std::string filename, CreationWords words, Progress progress) {
    CO_TRY(FileCreation what, file_creation_from(std::move(filename), words));
    CO_TRY(what.size, disk_size_word(words));
    CO_TRY([[maybe_unused]] const FileCreated created,
           co_await create_plain_file(std::move(what), std::move(progress)));
    co_return Result<>();
}

Task<Result<MeasureResult>> measure_raw(MeasureSource, CreationWords words) {
    CO_TRY(const uint64_t size, disk_size_word(words));
    co_return MeasureResult{.required = size, .fully_allocated = size, .bitmaps = std::nullopt};
}

}  // namespace

constinit const Creator kFileCreator = {.create = create, .create_file = create_from_words, .words = creation_words};
constinit const Creator kRawCreator = {
    .create = nullptr, .create_file = create_from_words, .measure = measure_raw, .words = creation_words};

Task<Result<FileCreated>> create_plain_file(FileCreation what, Progress progress) {
    if (what.preallocation == Preallocation::kMetadata) {
        co_return fail(ErrorKind::kUnsupported, "Unsupported preallocation mode: metadata; a plain file has none");
    }
    if (what.size > INT64_MAX) co_return fail(ErrorKind::kTooLarge, "Could not resize file: File too large");
    // Above this the attribute of the file system has no room.
    if (what.extent_size_hint > UINT32_MAX) {
        co_return fail(ErrorKind::kTooLarge, "Extent size hint is too large; {} is more than {}", what.extent_size_hint,
                       UINT32_MAX);
    }
    CO_TRY(Making making, co_await run_blocking([&] { return begin(what); }));
    if (!making.created.is_device && what.preallocation != Preallocation::kOff) {
        Result<> taken = co_await take_space(making.fd.get(), what, std::move(progress));
        if (!taken) {
            // What could not be had whole is given back at once.
            (void)co_await run_blocking([&] { return ::ftruncate(making.fd.get(), 0); });
            co_await undo_plain_file(what.filename, making.created);
            co_return std::unexpected(std::move(taken).error());
        }
    }
    // Closing may wait for a file server.
    co_await run_blocking([&] { making.fd.reset(); });
    co_return making.created;
}

Task<void> undo_plain_file(std::string filename, FileCreated created) {
    if (created.existed || created.is_device) co_return;
    (void)co_await run_blocking([&] { return ::unlink(filename.c_str()); });
}

Result<FileCreation> file_creation_from(std::string filename, const CreationWords& words) {
    FileCreation what;
    what.filename = filename.starts_with("file:") ? filename.substr(5) : std::move(filename);
    TRY(what.preallocation,
        preallocation_named("preallocation", word(words, "preallocation").value_or(std::string("off"))));
    TRY(const auto nocow, flag_word(words, "nocow"));
    what.nocow = nocow.value_or(false);
    TRY(const auto hint, size_word(words, "extent_size_hint"));
    what.hint_given = hint.has_value();
    what.extent_size_hint = hint.value_or(what.extent_size_hint);
    return what;
}

json::object file_definition(const std::string& filename, FileCreated created) {
    return {{"driver", created.is_device ? "host_device" : "file"}, {"filename", filename}};
}

}  // namespace gantry::block
