// ChainReader: from descriptors to host addresses, for both kinds of rings.

#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "exports/virtio/guest_memory.h"
#include "exports/virtio/ring.h"

namespace gantry::virtio {

inline constexpr uint16_t kDescNext = 1, kDescWrite = 2, kDescIndirect = 4;  // flags of both kinds
inline constexpr uint64_t kDescBytes = 16;

/// A copy of a descriptor of a split ring or of a table beside either (VIRTIO 1.2, sections 2.7.5 and 2.8.13). In the
/// tables of packed rings `flags` and `next` are the other way round: buffer id, flags.
struct RawDescriptor {
    uint64_t address;
    uint32_t length;
    uint16_t flags;
    uint16_t next;
};
static_assert(sizeof(RawDescriptor) == kDescBytes);

/// Fills chains; what is wrong goes to `fault`. Own loop only.
class ChainReader {
  public:
    explicit ChainReader(std::string& fault) : fault_(fault) {}

    static void clear(Chain& chain) {
        chain.slots = 0;
        chain.readable = 0;
        chain.readable_bytes = chain.writable_bytes = 0;
        chain.parts.clear();
    }

    /// One buffer of the chain: sections 2.7.4.2 and 2.8 of VIRTIO 1.2 (readable ones come first), and no empty ones.
    bool add(Chain& chain, AddressSpace& space, uint64_t address, uint32_t length, bool writable) {
        if (length == 0) [[unlikely]]
            return broken_empty(address);
        if (writable) {
            chain.writable_bytes += length;
        } else {
            if (chain.writable_bytes != 0) [[unlikely]]
                return broken_order(address);
            chain.readable_bytes += length;
        }
        if (!space.translate(address, length, chain.parts, kMaxChainParts)) [[unlikely]]
            return broken_memory(chain, address, length);
        if (!writable) chain.readable = static_cast<uint32_t>(chain.parts.size());
        return true;
    }

    /// Copies a table that an indirect descriptor with `flags` describes. Null: it makes no sense. Stays until the next
    /// call. `count` entries, 1..kMaxQueueSize: as a driver sizes requests by the configuration of the device and may
    /// use a smaller ring, the ring's size is no bound.
    const RawDescriptor* table(AddressSpace& space, uint64_t address, uint32_t length, uint16_t flags, bool allowed,
                               uint32_t& count);

    /// Sets `fault` unless there is one.
    template <class... Args>
    [[gnu::cold, gnu::noinline]] bool broken(fmt::format_string<Args...> format, Args... args) {
        if (fault_.empty()) fault_ = fmt::vformat(format, fmt::make_format_args(args...));
        return false;
    }

  private:
    [[gnu::cold]] bool broken_empty(uint64_t address);
    [[gnu::cold]] bool broken_order(uint64_t address);
    [[gnu::cold]] bool broken_memory(const Chain& chain, uint64_t address, uint32_t length);

    std::string& fault_;
    std::unique_ptr<RawDescriptor[]> table_;  // made with the first one
    std::vector<iovec> pieces_;
};

}  // namespace gantry::virtio
