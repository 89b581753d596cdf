#include "exports/virtio/blk_device.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace gantry::virtio {

namespace {

constexpr uint64_t kSector = 512;
constexpr uint32_t kWceOffset = 32;
/// Of a request besides its data: header and status.
constexpr uint32_t kOverhead = 2;

/// A field of struct virtio_blk_config (VIRTIO 1.2, section 5.2.4), little-endian.
template <class T>
void put(BlkDevice::Config& config, size_t offset, T value) {
    static_assert(std::endian::native == std::endian::little);
    std::memcpy(config.data() + offset, &value, sizeof value);
}

}  // namespace

BlkDevice::BlkDevice(BlkShape shape, uint64_t bytes) : shape_(std::move(shape)), write_cache_(shape_.write_cache) {
    set_size(bytes);
}

uint64_t BlkDevice::features() const {
    uint64_t all = kBlkSegMax | kBlkBlockSize | kBlkFlush | kBlkTopology | kBlkConfigWce | kBlkMultiQueue |
                   kRingIndirect | kRingEventIdx | kRingPacked | kVersion1;
    all |= shape_.writable ? kBlkDiscard | kBlkWriteZeroes : kBlkReadOnly;
    return all;
}

Result<> BlkDevice::check_features(uint64_t chosen, uint64_t transport) const {
    if (const uint64_t strange = chosen & ~(features() | transport)) {
        return fail(ErrorKind::kInvalid, "the driver has chosen features that were not offered ({:#x})", strange);
    }
    if (chosen != 0 && !(chosen & kVersion1)) {
        return fail(ErrorKind::kInvalid,
                    "the driver has not chosen VIRTIO_F_VERSION_1 (it has chosen {:#x}); legacy "
                    "drivers are not served",
                    chosen);
    }
    return {};
}

void BlkDevice::choose_features(uint64_t chosen) {
    const uint64_t before = chosen_.exchange(chosen, std::memory_order_relaxed);
    // Who cannot flush must not need to. Who can, and chooses again (to switch the log of written pages), keeps what
    // was set meanwhile.
    if ((before ^ chosen) & (kBlkFlush | kVersion1)) {
        write_cache_.store(shape_.write_cache && (chosen == 0 || (chosen & kBlkFlush)), std::memory_order_relaxed);
    }
}

BlkDevice::Config BlkDevice::config() const {
    Config config{};
    const auto& s = shape_;
    const uint32_t block_sectors = s.block_size / kSector;
    put<uint64_t>(config, 0, capacity());
    put<uint32_t>(config, 12, s.queue_size > kOverhead ? s.queue_size - kOverhead : 1);  // seg_max
    put<uint32_t>(config, 20, s.block_size);
    const uint32_t physical = std::max(s.physical_block_size, s.block_size);
    put<uint8_t>(config, 24, static_cast<uint8_t>(std::countr_zero(physical / s.block_size)));
    put<uint16_t>(config, 26, static_cast<uint16_t>(std::min<uint32_t>(physical / s.block_size, UINT16_MAX)));
    put<uint32_t>(config, 28, s.optimal_io_size / s.block_size);
    put<uint8_t>(config, kWceOffset, write_cache() ? 1 : 0);
    put<uint16_t>(config, 34, s.queues);
    if (s.writable) {
        put<uint32_t>(config, 36, kMaxDiscardSectors);
        put<uint32_t>(config, 40, kMaxDiscardSegments);
        put<uint32_t>(config, 44, block_sectors);
        put<uint32_t>(config, 48, kMaxDiscardSectors);
        put<uint32_t>(config, 52, kMaxDiscardSegments);
        put<uint8_t>(config, 56, 1);  // write zeroes may deallocate
    }
    return config;
}

Result<> BlkDevice::write_config(uint32_t offset, std::span<const std::byte> data) {
    if (offset != kWceOffset || data.size() != 1) {
        return fail(ErrorKind::kInvalid,
                    "the driver writes {} byte(s) at {} of the configuration; only the write cache mode (1 byte at {}) "
                    "can be written",
                    data.size(), offset, kWceOffset);
    }
    if (!(chosen_features() & kBlkConfigWce))
        return fail(ErrorKind::kInvalid, "the driver sets the write cache mode without having chosen to");
    const auto value = static_cast<uint8_t>(data[0]);
    if (value > 1) return fail(ErrorKind::kInvalid, "the driver sets the write cache mode to {}, not 0 or 1", value);
    write_cache_.store(value == 1 && shape_.write_cache, std::memory_order_relaxed);
    return {};
}

void BlkDevice::set_size(uint64_t bytes) {
    const uint64_t whole = bytes - bytes % shape_.block_size;
    capacity_.store(whole / kSector, std::memory_order_relaxed);
}

}  // namespace gantry::virtio
