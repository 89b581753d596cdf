#include "block/protocols/file_alignment.h"

#include <fcntl.h>
#include <linux/fs.h>
#include <linux/stat.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>

#include "runtime/buffer.h"

namespace gantry::block {

namespace {

constexpr uint32_t kMaxAlignment = 64 << 10;  // what a request can reasonably be widened to

bool sane(uint32_t alignment) { return std::has_single_bit(alignment) && alignment <= kMaxAlignment; }

/// Linux 6.1 and newer, on file systems that answer.
bool ask_statx(int fd, DirectAlignment& out) {
#ifdef STATX_DIOALIGN
    struct statx st{};
    if (::statx(fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &st) < 0 || !(st.stx_mask & STATX_DIOALIGN)) return false;
    if (!sane(st.stx_dio_offset_align) || !sane(st.stx_dio_mem_align)) return false;
    out.request = st.stx_dio_offset_align;
    out.memory = st.stx_dio_mem_align;
    return true;
#else
    return false;
#endif
}

}  // namespace

uint32_t logical_block_size(int fd) {
    int bytes = 0;
    if (::ioctl(fd, BLKSSZGET, &bytes) < 0 || bytes <= 0 || !sane(static_cast<uint32_t>(bytes))) return 512;
    return static_cast<uint32_t>(bytes);
}

DirectAlignment direct_alignment(int fd, FileKind kind) {
    DirectAlignment out;
    if (ask_statx(fd, out)) return out;
    if (kind == FileKind::kBlockDevice) {
        out.request = out.memory = logical_block_size(fd);
        return out;
    }
    Buffer buffer = Buffer::alloc(3 * 4096);
    return probe_alignment([&](off_t offset, uint32_t length, uint32_t memory_offset) -> int {
        const ssize_t n = ::pread(fd, buffer.data() + memory_offset, length, offset);
        return n < 0 ? -errno : static_cast<int>(n);
    });
}

}  // namespace gantry::block
