#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace gantry::bench::vhost {

/// One descriptor of a request.
struct Piece {
    uint64_t guest_address;
    uint32_t bytes;
    bool device_writes;
};

struct RingShape {
    uint32_t size = 0;
    bool packed = false;
    bool event_idx = false;
    bool indirect = false;
};

/// Where a ring lies in the memory that is shared with the server. Packed: `available` is the driver's event
/// suppression structure, `used` the device's.
struct RingPlace {
    std::byte* descriptors;
    std::byte* available;
    std::byte* used;
    std::byte* tables;  // of indirect descriptors, one for each slot
    uint64_t tables_guest_address;
};

/// Bytes of each area, tables apart, with room to spare.
constexpr size_t ring_area_bytes(const RingShape& shape) { return (size_t{16} * shape.size + 4095) & ~size_t{4095}; }

/// The driver's side of a virtqueue (VIRTIO 1.2, sections 2.7 and 2.8) whose requests are fixed slots: slot i always
/// has the same descriptors. One thread. The server's fields may hold anything.
class Ring {
  public:
    struct Done {
        uint32_t slot;
        uint32_t length;
    };

    static std::unique_ptr<Ring> create(const RingShape& shape, const RingPlace& place);
    virtual ~Ring() = default;

    /// Says what slot `slot` is made of; slots in order, all of one length.
    virtual void define(uint32_t slot, std::span<const Piece> pieces) = 0;
    /// Makes a slot available at the next publish().
    virtual void add(uint32_t slot) = 0;
    /// True: the server wants to be kicked.
    virtual bool publish() = 0;
    virtual bool has_done() const = 0;
    /// The next completion; has_done() was true. A slot that does not exist is the caller's to refuse.
    virtual Done reap() = 0;
    /// Whether the server shall call for the next completion. After true: look at has_done() again.
    virtual void want_call(bool want) = 0;
    /// What SET_VRING_BASE says for a fresh ring.
    virtual uint32_t first_base() const = 0;
};

}  // namespace gantry::bench::vhost
