// A packed virtqueue (VIRTIO 1.2, section 2.8).

#pragma once

#include "exports/virtio/ring.h"

namespace gantry::virtio {

/// For Ring::create, which has checked the arguments.
Result<std::unique_ptr<Ring>> make_packed_ring(RingShape shape, RingPlace place, uint32_t base,
                                               std::unique_ptr<Inflight> inflight);

}  // namespace gantry::virtio
