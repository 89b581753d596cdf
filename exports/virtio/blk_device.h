// BlkDevice: what a driver learns of a virtio-blk device: features and configuration (VIRTIO 1.2, section 5.2).

#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "runtime/error.h"

namespace gantry::virtio {

// Feature bits.
inline constexpr uint64_t bit(unsigned n) { return uint64_t{1} << n; }
inline constexpr uint64_t kBlkSegMax = bit(2), kBlkReadOnly = bit(5), kBlkBlockSize = bit(6), kBlkFlush = bit(9),
                          kBlkTopology = bit(10), kBlkConfigWce = bit(11), kBlkMultiQueue = bit(12),
                          kBlkDiscard = bit(13), kBlkWriteZeroes = bit(14);
inline constexpr uint64_t kRingIndirect = bit(28), kRingEventIdx = bit(29), kVersion1 = bit(32),
                          kAccessPlatform = bit(33), kRingPacked = bit(34);

struct BlkShape {
    uint32_t block_size = 512;  // logical; a power of two, 512..65536
    uint16_t queues = 1;        // as the configuration says; 1..
    uint16_t queue_size = 256;  // most descriptors of a ring; a power of two
    std::string serial;         // at most 20 bytes
    bool writable = false;
    bool write_cache = true;             // false: every write is stable when it is answered, whatever the driver says
    uint32_t physical_block_size = 512;  // of the node below, as are the next; bytes, multiples of block_size or less
    uint32_t optimal_io_size = 0;        // 0: nothing to say
};

/// Any thread; one that changes, any that look.
class BlkDevice {
  public:
    static constexpr size_t kConfigSize = 96;
    using Config = std::array<std::byte, kConfigSize>;
    static constexpr uint32_t kMaxDiscardSectors = 1 << 22;  // 2 GiB
    static constexpr uint32_t kMaxDiscardSegments = 16;
    static constexpr uint32_t kIdBytes = 20;

    BlkDevice(BlkShape shape, uint64_t bytes);

    const BlkShape& shape() const { return shape_; }
    /// Of the device and its rings, without what a transport adds. kBlkConfigWce is for the transport to take away.
    uint64_t features() const;
    /// What a driver has chosen. kInvalid for bits that were not offered besides `transport`, or without VERSION_1.
    Result<> check_features(uint64_t chosen, uint64_t transport = 0) const;
    /// Checked ones; 0: a device that nobody drives (reset), whose write cache is as at first.
    void choose_features(uint64_t chosen);
    uint64_t chosen_features() const { return chosen_.load(std::memory_order_relaxed); }

    /// As the driver reads it, at present.
    Config config() const;
    /// The driver writes [offset, offset + data.size()). kInvalid for all but `wce` (offset 32, one byte, 0 or 1, with
    /// kBlkConfigWce chosen). Holds for requests taken afterwards.
    Result<> write_config(uint32_t offset, std::span<const std::byte> data);
    /// The node has another size now; what is no whole block at the end is not seen.
    void set_size(uint64_t bytes);
    uint64_t capacity() const { return capacity_.load(std::memory_order_relaxed); }  // in sectors of 512 bytes
    /// Whether answered writes may still be in caches: else each is flushed (FUA).
    bool write_cache() const { return write_cache_.load(std::memory_order_relaxed); }

  private:
    const BlkShape shape_;
    std::atomic<uint64_t> capacity_;
    std::atomic<uint64_t> chosen_{0};
    std::atomic<bool> write_cache_;
};

}  // namespace gantry::virtio
