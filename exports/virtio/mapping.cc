// Mapping: see guest_memory.h.

#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/statfs.h>
#include <unistd.h>

#include <bit>
#include <cerrno>

#include "exports/virtio/guest_memory.h"
#include "exports/virtio/sigbus.h"

namespace gantry::virtio {

namespace {

/// What offset and length of a mapping of this file are multiples of.
Result<size_t> page_size(int fd) {
    struct statfs fs{};
    if (::fstatfs(fd, &fs) != 0) return fail_errno(errno, "finding out about the file system of shared memory");
    const auto base = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    if (static_cast<uint64_t>(fs.f_type) != HUGETLBFS_MAGIC) return base;
    const auto huge = static_cast<size_t>(fs.f_bsize);
    return huge > base && std::has_single_bit(huge) ? huge : base;
}

}  // namespace

Result<std::shared_ptr<Mapping>> Mapping::create(int fd, uint64_t offset, uint64_t size, bool writable) {
    struct stat about{};
    if (::fstat(fd, &about) != 0) return fail_errno(errno, "looking at the file of shared memory");
    if (size == 0) return fail(ErrorKind::kInvalid, "shared memory of 0 bytes cannot be mapped");
    uint64_t end;
    if (__builtin_add_overflow(offset, size, &end) || end > INT64_MAX)
        return fail(ErrorKind::kInvalid, "{} bytes of shared memory at offset {} end beyond what a file can have", size,
                    offset);
    // What is no regular file (the kernel's own) has no size; mmap refuses what is not there.
    if (S_ISREG(about.st_mode) && end > static_cast<uint64_t>(about.st_size))
        return fail(ErrorKind::kInvalid,
                    "the file of shared memory has {} bytes, but {} at offset {} were to be mapped; it must be as long "
                    "as the memory that it is said to hold",
                    about.st_size, size, offset);
    TRY(const size_t page, page_size(fd));
    const uint64_t before = offset % page;
    const uint64_t length = (before + size + page - 1) / page * page;
    // What a driver lets us write where we may only read goes to pages of our own, and nowhere else.
    void* const base =
        ::mmap(nullptr, length, PROT_READ | PROT_WRITE, (writable ? MAP_SHARED : MAP_PRIVATE) | MAP_NORESERVE, fd,
               static_cast<off_t>(offset - before));
    if (base == MAP_FAILED) return fail_errno(errno, "mapping {} bytes of shared memory at offset {}", size, offset);
    // A core dump of this process is no place for what guests keep in memory.
    (void)::madvise(base, length, MADV_DONTDUMP);
    std::shared_ptr<Mapping> mapping(new Mapping);
    mapping->base_ = base;
    mapping->length_ = length;
    mapping->data_ = static_cast<std::byte*>(base) + before;
    mapping->size_ = size;
    mapping->slot_ = sigbus::watch(base, length, page);
    return mapping;
}

Mapping::~Mapping() {
    if (!base_) return;
    sigbus::forget(slot_);
    ::munmap(base_, length_);
}

bool Mapping::broken() const { return sigbus::hit(slot_); }

}  // namespace gantry::virtio
