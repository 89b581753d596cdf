#include "exports/virtio/blk_request.h"

#include <algorithm>
#include <array>
#include <cstring>

namespace gantry::virtio {

namespace {

constexpr uint64_t kSector = 512;

/// struct virtio_blk_req up to its data; little-endian, as we are.
struct Header {
    uint32_t type;
    uint32_t priority;
    uint64_t sector;
};
static_assert(sizeof(Header) == 16);

/// struct virtio_blk_discard_write_zeroes.
struct Range {
    uint64_t sector;
    uint32_t sectors;
    uint32_t flags;
};
static_assert(sizeof(Range) == 16);
constexpr uint32_t kUnmap = 1;

IoVec readable(const Chain& chain) { return {chain.parts.data(), chain.readable, chain.readable_bytes}; }

/// The readable part without its first `n` bytes, which it has.
IoVec without_front(Chain& chain, size_t n) {
    iovec* part = chain.parts.data();
    uint32_t left = chain.readable;
    const uint64_t rest = chain.readable_bytes - n;
    while (n > 0 && n >= part->iov_len) {
        n -= part->iov_len;
        ++part;
        --left;
    }
    if (n > 0) {
        part->iov_base = static_cast<std::byte*>(part->iov_base) + n;
        part->iov_len -= n;
    }
    return {part, left, rest};
}

}  // namespace

const char* BlkService::begin(BlkRequest& request) const {
    Chain& chain = request.chain;
    if (chain.writable_bytes == 0) return "a request has no place for its status";
    if (chain.readable_bytes < sizeof(Header)) return "a request is shorter than its header";
    Header header;
    if (chain.parts[0].iov_len >= sizeof header) [[likely]] {
        std::memcpy(&header, chain.parts[0].iov_base, sizeof header);
    } else {
        copy_from_iovec(readable(chain), 0, &header, sizeof header);
    }
    iovec& last = chain.parts.back();
    request.status = static_cast<std::byte*>(last.iov_base) + --last.iov_len;
    const auto writable_parts =
        static_cast<uint32_t>(chain.parts.size() - chain.readable - (last.iov_len == 0 ? 1 : 0));
    request.type = static_cast<BlkType>(header.type);
    request.stable = !device_.write_cache();
    // Sectors that overflow as bytes are beyond the end, too.
    request.offset = header.sector <= UINT64_MAX / kSector ? header.sector * kSector : UINT64_MAX;
    switch (request.type) {
        case BlkType::kIn:
        case BlkType::kGetId:
            request.data = {chain.parts.data() + chain.readable, writable_parts, chain.writable_bytes - 1};
            break;
        default:
            request.data = without_front(chain, sizeof header);
    }
    return nullptr;
}

/// Whether the range of a read or write lies on the disk, in whole blocks.
bool BlkService::fits(const BlkRequest& request) const {
    const uint64_t size = device_.capacity() * kSector, length = request.data.bytes;
    const uint64_t mask = device_.shape().block_size - 1;
    return length <= kMaxChainBytes && ((length | request.offset) & mask) == 0 && request.offset <= size &&
           length <= size - request.offset;
}

bool BlkService::try_answer(BlkRequest& request, block::Channel& channel) const {
    switch (request.type) {
        case BlkType::kIn:
            if (!fits(request)) [[unlikely]] {
                request.finish(BlkStatus::kIoError);
                return true;
            }
            if (request.data.bytes != 0 && channel.try_read(request.offset, request.data) != 0) return false;
            request.finish(BlkStatus::kOk, request.data.bytes);
            return true;
        case BlkType::kOut:
            if (!device_.shape().writable || !fits(request)) [[unlikely]] {
                request.finish(BlkStatus::kIoError);
                return true;
            }
            if (request.data.bytes != 0) {
                const auto flags = request.stable ? block::WriteFlags::kFua : block::WriteFlags::kNone;
                if (channel.try_write(request.offset, request.data, flags) != 0) return false;
            }
            request.finish(BlkStatus::kOk);
            return true;
        case BlkType::kGetId:
            answer_id(request);
            return true;
        case BlkType::kFlush:
        case BlkType::kDiscard:
        case BlkType::kWriteZeroes:
            return false;
    }
    request.finish(BlkStatus::kUnsupported);
    return true;
}

void BlkService::answer_id(BlkRequest& request) const {
    std::array<char, BlkDevice::kIdBytes> id{};
    const std::string& serial = device_.shape().serial;
    std::copy_n(serial.begin(), std::min(serial.size(), id.size()), id.begin());
    const size_t length = std::min<size_t>(id.size(), request.data.bytes);
    copy_to_iovec(request.data, 0, id.data(), length);
    request.finish(BlkStatus::kOk, length);
}

Task<void> BlkService::answer(BlkRequest& request, block::Channel& channel) const {
    Result<> done;
    switch (request.type) {
        case BlkType::kIn:
            done = co_await channel.read(request.offset, request.data, true);
            request.finish(done ? BlkStatus::kOk : BlkStatus::kIoError, done ? request.data.bytes : 0);
            co_return;
        case BlkType::kOut: {
            const auto flags = request.stable ? block::WriteFlags::kFua : block::WriteFlags::kNone;
            done = co_await channel.write(request.offset, request.data, flags, true);
            break;
        }
        case BlkType::kFlush:
            done = co_await channel.flush();
            break;
        case BlkType::kDiscard:
        case BlkType::kWriteZeroes:
            co_await answer_ranges(request, channel);
            co_return;
        case BlkType::kGetId:
            answer_id(request);
            co_return;
    }
    request.finish(done ? BlkStatus::kOk : BlkStatus::kIoError);
}

Task<void> BlkService::answer_ranges(BlkRequest& request, block::Channel& channel) const {
    std::array<Range, BlkDevice::kMaxDiscardSegments> ranges;
    const size_t bytes = request.data.bytes;
    if (!device_.shape().writable || bytes == 0 || bytes % sizeof(Range) != 0 || bytes > sizeof ranges) {
        request.finish(BlkStatus::kIoError);
        co_return;
    }
    // The driver may change them while they are looked at: this copy counts.
    copy_from_iovec(request.data, 0, ranges.data(), bytes);
    const size_t count = bytes / sizeof(Range);
    const bool discard = request.type == BlkType::kDiscard;
    const uint32_t block_sectors = device_.shape().block_size / kSector;
    const uint64_t capacity = device_.capacity();
    for (size_t i = 0; i < count; ++i) {
        const Range& r = ranges[i];
        if ((r.flags & ~kUnmap) != 0 || (discard && r.flags != 0)) {
            request.finish(BlkStatus::kUnsupported);
            co_return;
        }
        if (r.sectors > BlkDevice::kMaxDiscardSectors || r.sector > capacity || r.sectors > capacity - r.sector ||
            r.sector % block_sectors != 0 || r.sectors % block_sectors != 0) {
            request.finish(BlkStatus::kIoError);
            co_return;
        }
    }
    for (size_t i = 0; i < count; ++i) {
        const uint64_t offset = ranges[i].sector * kSector, length = ranges[i].sectors * kSector;
        if (length == 0) continue;
        Result<> done;
        if (discard) {
            done = co_await channel.discard(offset, length);
            // It is advice: what cannot be done is done already.
            if (!done && done.error().kind() == ErrorKind::kUnsupported) done = Result<>();
        } else {
            auto flags = request.stable ? block::WriteFlags::kFua : block::WriteFlags::kNone;
            if (ranges[i].flags & kUnmap) flags = flags | block::WriteFlags::kMayUnmap;
            done = co_await channel.write_zeroes(offset, length, flags);
        }
        if (!done) {
            request.finish(BlkStatus::kIoError);
            co_return;
        }
    }
    request.finish(BlkStatus::kOk);
}

}  // namespace gantry::virtio
