// Ring: a virtqueue in guest memory, split or packed (VIRTIO 1.2, sections 2.7 and 2.8), from the device's side.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "exports/virtio/dirty_log.h"
#include "exports/virtio/guest_memory.h"
#include "exports/virtio/inflight.h"

namespace gantry::virtio {

inline constexpr uint32_t kMaxQueueSize = 1024;       // descriptors of a ring that we serve
inline constexpr uint64_t kMaxChainBytes = 32 << 20;  // of one request; more is answered with an error by the handler
inline constexpr size_t kMaxChainParts = 4096;        // host ranges of one chain, split at borders of regions

/// What one chain of descriptors describes, in host addresses that were checked. Reused: take() clears it.
struct Chain {
    uint16_t id = 0;        // split: index of its head; packed: its buffer id
    uint16_t slots = 0;     // packed: descriptors of the ring that it takes up
    uint32_t readable = 0;  // parts[0 .. readable) are read by the device, the others written
    uint64_t readable_bytes = 0;
    uint64_t writable_bytes = 0;
    std::vector<iovec> parts;
};

/// A chain that is done; `length` bytes of its writable part were written.
struct Used {
    uint16_t id = 0;
    uint16_t slots = 0;
    uint32_t length = 0;
};

enum class Take : uint8_t { kNothing, kChain, kBroken };

struct RingShape {
    uint32_t size = 0;  // descriptors: 2..kMaxQueueSize; a power of two unless packed
    bool packed = false;
    bool event_idx = false;
    bool indirect = false;
};

/// The three areas of a ring, in the names of VIRTIO 1.2 (split: table, available ring, used ring).
struct RingPlace {
    std::byte* descriptors = nullptr;
    std::byte* driver = nullptr;
    std::byte* device = nullptr;
};

/// Bytes that an area needs, and the alignment of its guest address.
struct AreaNeeds {
    uint64_t descriptors, driver, device;
    uint32_t descriptors_align, driver_align, device_align;
};
AreaNeeds area_needs(const RingShape& shape);

/// Own loop only. Everything in guest memory is read once and may change at any time; what does not hold makes the ring
/// broken for good: take() gives nothing more, and publish() still works.
class Ring {
  public:
    /// `place`: whole areas, aligned, that stay mapped. `base`: where to go on, as in SET_VRING_BASE (split: index of
    /// the next available entry; packed: bits 0-14 next available, 15 its wrap counter, 16-30 next used, 31 its wrap
    /// counter). `inflight`: where unanswered chains are noted, null for nowhere; what it holds from a process before
    /// this one is taken first, in its order, and decides where to go on. kInvalid when it contradicts the ring.
    static Result<std::unique_ptr<Ring>> create(RingShape shape, RingPlace place, uint32_t base,
                                                std::unique_ptr<Inflight> inflight);
    virtual ~Ring() = default;

    /// A plain look, as cheap as can be: take() may have something (or has found something wrong).
    virtual bool has_more() const = 0;
    /// The next chain. Never one more than the ring has descriptors in flight.
    virtual Take take(Chain& chain, AddressSpace& space) = 0;
    /// Chains are done, in any order. True: the driver wants to be told.
    virtual bool publish(std::span<const Used> done) = 0;
    /// The driver need not tell when it adds chains.
    virtual void quiet() = 0;
    /// It must from now on. True: it has added some already.
    virtual bool listen() = 0;
    /// Where the next process would go on, in the form of `base`. Nothing is in flight.
    virtual uint32_t base() const = 0;
    /// The same memory is found elsewhere now. Nothing is between take() and publish() on another thread; chains may be
    /// in flight.
    virtual void move(RingPlace place) = 0;

    const RingShape& shape() const { return shape_; }
    bool is_broken() const { return !fault_.empty(); }
    /// Why, as a sentence without its subject: "the available index jumps from 3 to 900".
    const std::string& fault() const { return fault_; }
    /// Something else is wrong with it (memory that has gone).
    void break_off(std::string fault);

    /// Marks what is written to the ring itself: the device area (packed: the descriptors) lies at guest address
    /// `address` for the log. Null: not any more.
    void set_log(std::shared_ptr<DirtyLog> log, uint64_t address) {
        log_ = std::move(log);
        log_address_ = address;
    }

  protected:
    Ring(RingShape shape, RingPlace place) : shape_(shape), place_(place) {}
    void log_write(uint64_t offset, uint64_t length) {
        if (log_) [[unlikely]]
            log_->mark(log_address_ + offset, length);
    }

    RingShape shape_;
    RingPlace place_;
    std::string fault_;
    std::shared_ptr<DirtyLog> log_;
    uint64_t log_address_ = 0;
};

}  // namespace gantry::virtio
