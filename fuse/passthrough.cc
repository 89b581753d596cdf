#include "fuse/passthrough.h"

#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/stat.h>

#include <cerrno>

#include "fuse/saved.h"
#include "fuse/wire.h"
#include "runtime/log.h"

namespace gantry::fuse {

namespace {

std::unexpected<Error> refuse(const block::Root& root, ErrorKind kind, std::string_view why) {
    return fail(kind, "{} cannot pass requests through to a file: {}; x-passthrough=off serves it", root.user(), why);
}

/// What an errno of the kernel means here.
std::string meaning(int e) {
    switch (e) {
        case EPERM:
            return "naming files to the kernel needs CAP_SYS_ADMIN outside of any container";
        case EOPNOTSUPP:
        case ENOTTY:
            return "this kernel has no FUSE passthrough (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)";
        case ELOOP:
            return "its file lies on a stacked file system (overlay or FUSE) itself";
        case EINVAL:
            return "the kernel takes regular files alone";
        default:
            return errno_text(e);
    }
}

}  // namespace

Result<> Passthrough::lease() {
    auto leased = root_.lease_passthrough();
    if (!leased) return refuse(root_, leased.error().kind(), leased.error().message());
    leased_ = true;
    fd_ = leased->fd;
    struct stat st;
    if (::fstat(fd_, &st) != 0) return refuse(root_, ErrorKind::kIo, errno_text(errno));
    file_device_ = st.st_dev;
    file_inode_ = st.st_ino;
    if (!S_ISREG(st.st_mode)) return refuse(root_, ErrorKind::kUnsupported, meaning(EINVAL));
    if (leased->offset != 0 || static_cast<uint64_t>(st.st_size) != root_.node().size()) {
        return refuse(root_, ErrorKind::kUnsupported,
                      fmt::format("node '{}' ({} bytes from {}) is not the whole of its file ({} bytes)",
                                  root_.node().name(), root_.node().size(), leased->offset, st.st_size));
    }
    if (const int flags = ::fcntl(fd_, F_GETFL); flags >= 0 && (flags & O_DIRECT)) {
        return refuse(root_, ErrorKind::kUnsupported, "cache.direct=on, and clients would use the page cache");
    }
    return {};
}

Result<std::unique_ptr<Passthrough>> Passthrough::open(block::Root& root, int device, const Negotiated& agreed) {
    std::unique_ptr<Passthrough> out(new Passthrough(root, device));
    CHECK_OK(out->lease());
    if (!agreed.has(kPassthrough)) return refuse(root, ErrorKind::kUnsupported, meaning(EOPNOTSUPP));
    BackingMap map{.fd = out->fd_};
    const int id = ::ioctl(device, kIocBackingOpen, &map);
    if (id <= 0) {
        const int e = id < 0 ? errno : EIO;
        return refuse(root, e == EPERM ? ErrorKind::kPermission : ErrorKind::kUnsupported, meaning(e));
    }
    out->id_ = id;
    return out;
}

Result<std::unique_ptr<Passthrough>> Passthrough::inherit(block::Root& root, int device, const json::object& saved) {
    std::unique_ptr<Passthrough> out(new Passthrough(root, device));
    CHECK_OK(out->lease());
    const uint64_t id = number_in(saved, "id");
    if (id == 0 || id > INT32_MAX || number_in(saved, "file-device") != out->file_device_ ||
        number_in(saved, "file-inode") != out->file_inode_) {
        return fail(ErrorKind::kInvalid, "clients read and write another file directly");
    }
    out->id_ = static_cast<int32_t>(id);
    return out;
}

json::object Passthrough::save() const {
    return {{"id", id_}, {"file-device", file_device_}, {"file-inode", file_inode_}};
}

Passthrough::~Passthrough() {
    if (id_ != 0 && !left_) {
        auto id = static_cast<uint32_t>(id_);
        if (::ioctl(device_, kIocBackingClose, &id) != 0 && errno != ENOENT) {
            log::debug("{}: the kernel keeps its file named: {}", root_.user(), errno_text(errno));
        }
    }
    if (leased_) root_.release_passthrough();
}

}  // namespace gantry::fuse
