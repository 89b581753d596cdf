#include "exports/virtio/ring.h"

#include <bit>

#include "exports/virtio/packed_ring.h"
#include "exports/virtio/split_ring.h"

namespace gantry::virtio {

AreaNeeds area_needs(const RingShape& shape) {
    const uint64_t n = shape.size;
    if (shape.packed) return {16 * n, 4, 4, 16, 4, 4};
    // The fields of EVENT_IDX are there whether it was chosen or not (VIRTIO 1.2, section 2.7).
    return {16 * n, 6 + 2 * n, 6 + 8 * n, 16, 2, 4};
}

Result<std::unique_ptr<Ring>> Ring::create(RingShape shape, RingPlace place, uint32_t base,
                                           std::unique_ptr<Inflight> inflight) {
    if (shape.size < 2 || shape.size > kMaxQueueSize)
        return fail(ErrorKind::kInvalid, "a ring of {} descriptors; 2 to {} are possible", shape.size, kMaxQueueSize);
    if (!shape.packed && !std::has_single_bit(shape.size))
        return fail(ErrorKind::kInvalid, "a split ring of {} descriptors; its size must be a power of two", shape.size);
    const AreaNeeds needs = area_needs(shape);
    const auto misplaced = [](const std::byte* at, uint32_t align) {
        return !at || reinterpret_cast<uintptr_t>(at) % align != 0;
    };
    if (misplaced(place.descriptors, needs.descriptors_align) || misplaced(place.driver, needs.driver_align) ||
        misplaced(place.device, needs.device_align))
        return fail(ErrorKind::kInvalid, "an area of the ring is not aligned (descriptors {}, driver {}, device {})",
                    needs.descriptors_align, needs.driver_align, needs.device_align);
    if (inflight && (!inflight->region || inflight->queue_size < shape.size))
        return fail(ErrorKind::kInvalid, "the inflight region has room for {} descriptors, and the ring has {}",
                    inflight->queue_size, shape.size);
    return shape.packed ? make_packed_ring(shape, place, base, std::move(inflight))
                        : make_split_ring(shape, place, base, std::move(inflight));
}

void Ring::break_off(std::string fault) {
    if (fault_.empty()) fault_ = std::move(fault);
}

}  // namespace gantry::virtio
