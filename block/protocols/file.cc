#include "block/protocols/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>

#include "block/align.h"
#include "block/protocols/file_create.h"
#include "block/protocols/host_device.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"

namespace gantry::block {

int64_t monotonic_ns() { return std::chrono::nanoseconds(Clock::now().time_since_epoch()).count(); }

namespace {

struct Opened {
    OpenedFile file;
    bool use_locks = false;
};

/// On the blocking pool.
Result<Opened> open_for_node(const OpenRequest& rq, const FileOptions& options) {
    TRY(OpenedFile file, open_file(rq));
    bool use_locks = options.locking != FileOptions::Locking::kOff;
    if (use_locks && !file_locks_supported(file.fd.get())) {
        if (options.locking == FileOptions::Locking::kOn) {
            return fail(
                ErrorKind::kUnsupported,
                "Could not open '{}': its file system has no locks of open file descriptions; use locking=auto or "
                "off",
                options.filename);
        }
        use_locks = false;
    }
    return Opened{std::move(file), use_locks};
}

constexpr std::string_view kReopenOptions[] = {"aio", "aio-max-batch", "drop-cache"};

Task<Result<std::shared_ptr<Node>>> open_file_driver(OpenContext& ctx) {
    CO_TRY(std::shared_ptr<FileNode> node, co_await open_file_node(ctx, "file", FileKind::kRegular));
    co_return std::shared_ptr<Node>(std::move(node));
}

Task<Result<std::shared_ptr<Node>>> open_host_device_driver(OpenContext& ctx) {
    CO_TRY(std::shared_ptr<FileNode> node, co_await open_file_node(ctx, "host_device", FileKind::kBlockDevice));
    co_return std::shared_ptr<Node>(std::move(node));
}

}  // namespace

constinit const Driver kFileDriver = {.name = "file",
                                      .open = open_file_driver,
                                      .reopen_options = kReopenOptions,
                                      .is_protocol = true,
                                      .creator = &kFileCreator};
constinit const Driver kHostDeviceDriver = {
    .name = "host_device", .open = open_host_device_driver, .reopen_options = kReopenOptions, .is_protocol = true};

Task<Result<std::shared_ptr<FileNode>>> open_file_node(OpenContext& ctx, std::string_view driver, FileKind kind) {
    const NodeFlags flags = ctx.flags();
    CO_TRY(FileOptions options, FileOptions::parse(driver, ctx.options(), flags));
    OpenRequest rq;
    rq.driver = driver;
    rq.filename = options.filename;
    rq.kind = kind;
    rq.direct = flags.cache_direct;
    // Without auto-read-only the right to write is part of opening; with it, it comes with the first writer.
    rq.write = !flags.read_only && !flags.auto_read_only;
    rq.probe_write = !flags.read_only && flags.auto_read_only;
    CO_TRY(Opened opened, co_await run_blocking([&] { return open_for_node(rq, options); }));
    if (!opened.use_locks && options.locking != FileOptions::Locking::kOff) {
        log::warn("node '{}': the file system of '{}' has no locks; other processes are not kept away", ctx.node_name(),
                  options.filename);
    }
    if (kind == FileKind::kBlockDevice) {
        co_return std::make_shared<HostDeviceNode>(ctx.node_name(), flags, std::move(options), std::move(opened.file),
                                                   opened.use_locks);
    }
    co_return std::make_shared<FileNode>(driver, ctx.node_name(), flags, std::move(options), kind,
                                         std::move(opened.file), opened.use_locks);
}

FileNode::FileNode(std::string_view driver, std::string name, const NodeFlags& flags, FileOptions options,
                   FileKind kind, OpenedFile file, bool use_locks)
    : Node(driver, std::move(name), flags),
      options_(std::move(options)),
      kind_(kind),
      use_locks_(use_locks),
      mode_(flags) {
    fd_ = std::move(file.fd);
    never_writable_ = file.never_writable;
    set_size(file.size);
    take_mode(file);
    FileNode::adopt_limits();
}

FileNode::~FileNode() = default;

void FileNode::take_mode(const OpenedFile& file) {
    attributes_.writable = file.writable;
    attributes_.direct = file.direct;
    attributes_.request_alignment = file.request_alignment;
    attributes_.memory_alignment = file.memory_alignment;
    attributes_.block_size = file.block_size;
    attributes_.fd_set_use = file.fd_set_use;
    direct_.store(file.direct, std::memory_order_relaxed);
    writable_.store(file.writable, std::memory_order_relaxed);
    set_read_only(mode_.read_only || never_writable_);
}

void FileNode::adopt_limits() {
    limits_.request_alignment = attributes_.request_alignment;
    limits_.memory_alignment = attributes_.memory_alignment;
    limits_.max_iov = 1024;
    limits_.can_grow_by_write = kind_ == FileKind::kRegular;
    limits_.supports_fua = true;
    limits_.supports_zeroes = true;
    // Parts of blocks cannot become holes; discarding less would only make the file system write zeroes.
    limits_.discard_alignment = attributes_.block_size;
    limits_.zeroes_alignment = attributes_.request_alignment;
    allow_fast_paths(!attributes_.direct, !attributes_.direct && attributes_.writable);
}

Task<Result<>> FileNode::do_resize(uint64_t new_size) {
    if (new_size > kMaxOffset)
        co_return fail(ErrorKind::kTooLarge, "Failed to resize '{}': the size is too large", filename());
    const int r = co_await run_blocking([&] {
        int n;
        do {
            n = ::ftruncate(fd_.get(), static_cast<off_t>(new_size));
        } while (n < 0 && errno == EINTR);
        return n < 0 ? errno : 0;
    });
    if (r) co_return fail_errno(r, "Failed to resize '{}' to {} bytes", filename(), new_size);
    forget_data_extent();
    dirty_.store(true, std::memory_order_relaxed);
    set_size(new_size);
    co_return Result<>();
}

/// An O_DIRECT write of the last, shorter unit of the disk has made the file a whole unit long; what others have added
/// is not ours to cut. On the pool, without requests in flight; 0 or errno.
int FileNode::cut_padding() {
    if (!padded_.load(std::memory_order_relaxed) || kind_ != FileKind::kRegular || !attributes_.writable) return 0;
    struct stat st;
    if (::fstat(fd_.get(), &st) < 0) return errno;
    const auto length = static_cast<uint64_t>(st.st_size);
    if (length <= size() || length - size() >= attributes_.request_alignment) return 0;
    return ::ftruncate(fd_.get(), static_cast<off_t>(size())) < 0 ? errno : 0;
}

Task<void> FileNode::close() {
    while (looks_ != 0) co_await looked_.wait();
    if (!fd_) co_return;
    const bool sync = dirty_.load(std::memory_order_relaxed) && !flags().cache_no_flush;
    const int r = co_await run_blocking([&] {
        int e = cut_padding();
        if (sync && ::fdatasync(fd_.get()) < 0) e = errno;
        // The kernel may hold the description for some time yet, behind a finished request of a ring or in a child that
        // is just being started.
        file_unlock(fd_.get(), locks_ | pending_.locks, {});
        fd_.reset();
        return e;
    });
    locks_ = {};
    if (r)
        log::error("node '{}': closing '{}': {}; what was written last may be lost", name(), filename(), errno_text(r));
}

Task<Result<ImageInfo>> FileNode::image_info() {
    ImageInfo info;
    info.virtual_size = size();
    if (closed()) co_return info;
    struct stat st;
    ++looks_;
    const int r = co_await run_blocking([&] { return ::fstat(fd_.get(), &st) < 0 ? errno : 0; });
    if (--looks_ == 0) looked_.notify_all();
    if (r) co_return fail_errno(r, "Could not look at '{}'", filename());
    info.actual_size = static_cast<uint64_t>(st.st_blocks) * 512;
    info.dirty = false;
    co_return info;
}

json::object FileNode::driver_stats() const {
    json::object stats;
    stats["driver"] = driver();
    stats["discard-nb-ok"] = discards_ok_.load(std::memory_order_relaxed);
    stats["discard-nb-failed"] = discards_failed_.load(std::memory_order_relaxed);
    stats["discard-bytes-ok"] = discarded_bytes_.load(std::memory_order_relaxed);
    return stats;
}

}  // namespace gantry::block
