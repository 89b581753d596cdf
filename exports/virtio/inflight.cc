#include "exports/virtio/inflight.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>

#include "exports/virtio/packed_inflight.h"
#include "exports/virtio/ring.h"
#include "exports/virtio/split_inflight.h"

namespace gantry::virtio {

namespace {

constexpr uint64_t kRegionAlign = 64;
/// Where both layouts have their version; 0: not set up.
constexpr uint64_t kVersion = 8;
/// And the number of descriptors; 0: never set up.
constexpr uint64_t kDescriptors = 10;

uint64_t region_bytes(uint16_t queue_size, bool packed) {
    const uint64_t bytes = packed ? PackedInflight::kHeaderBytes + PackedInflight::kEntryBytes * queue_size
                                  : SplitInflight::kHeaderBytes + SplitInflight::kEntryBytes * queue_size;
    return (bytes + kRegionAlign - 1) / kRegionAlign * kRegionAlign;
}

Result<> check(uint16_t queues, uint16_t queue_size) {
    if (queues == 0) return fail(ErrorKind::kInvalid, "an inflight region for no queues");
    if (queue_size == 0 || queue_size > kMaxQueueSize)
        return fail(ErrorKind::kInvalid, "an inflight region for queues of {} descriptors; 1 to {} are possible",
                    queue_size, kMaxQueueSize);
    return {};
}

}  // namespace

Result<std::shared_ptr<InflightFile>> InflightFile::create(uint16_t queues, uint16_t queue_size, bool packed) {
    CHECK_OK(check(queues, queue_size));
    const uint64_t size = size_of(queues, queue_size, packed);
    UniqueFd fd(::memfd_create("gantry-inflight", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (!fd) return fail_errno(errno, "making a file for the inflight region");
    if (::ftruncate(fd.get(), static_cast<off_t>(size)) != 0 ||
        ::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0)
        return fail_errno(errno, "making a file of {} bytes for the inflight region", size);
    return adopt(std::move(fd), 0, size, queues, queue_size, packed);
}

Result<std::shared_ptr<InflightFile>> InflightFile::adopt(UniqueFd fd, uint64_t offset, uint64_t size, uint16_t queues,
                                                          uint16_t queue_size, bool packed) {
    CHECK_OK(check(queues, queue_size));
    const uint64_t needed = size_of(queues, queue_size, packed);
    if (size < needed)
        return fail(ErrorKind::kInvalid, "an inflight region of {} bytes; {} queues of {} descriptors need {}", size,
                    queues, queue_size, needed);
    if (offset % kRegionAlign != 0)
        return fail(ErrorKind::kInvalid, "an inflight region at offset {}, which is no multiple of {}", offset,
                    kRegionAlign);
    auto mapping = Mapping::create(fd.get(), offset, size);
    if (!mapping) return std::unexpected(std::move(mapping).error().context("mapping the inflight region"));
    std::shared_ptr<InflightFile> file(new InflightFile);
    file->fd_ = std::move(fd);
    file->mapping_ = std::move(*mapping);
    file->size_ = size;
    file->queues_ = queues;
    file->queue_size_ = queue_size;
    file->packed_ = packed;
    return file;
}

uint64_t InflightFile::size_of(uint16_t queues, uint16_t queue_size, bool packed) {
    return queues * region_bytes(queue_size, packed);
}

std::byte* InflightFile::region(size_t queue) const {
    return queue < queues_ ? mapping_->data() + queue * region_bytes(queue_size_, packed_) : nullptr;
}

void InflightFile::forget(size_t queue) const {
    if (std::byte* const at = region(queue)) store<uint16_t>(at + kVersion, 0, std::memory_order_release);
}

bool InflightFile::in_use(size_t queue) const {
    const std::byte* const at = region(queue);
    return at && load<uint16_t>(at + kVersion) != 0;
}

bool InflightFile::forgotten(size_t queue) const {
    const std::byte* const at = region(queue);
    return at && load<uint16_t>(at + kVersion) == 0 && load<uint16_t>(at + kDescriptors) != 0;
}

}  // namespace gantry::virtio
