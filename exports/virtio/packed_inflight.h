// Unanswered chains of a packed ring, in the layout of the vhost-user specification, "Inflight I/O tracking".

#pragma once

#include <cstdint>

namespace gantry::virtio {

class PackedInflight {
  public:
    static constexpr uint64_t kHeaderBytes = 32, kEntryBytes = 32;
};

}  // namespace gantry::virtio
