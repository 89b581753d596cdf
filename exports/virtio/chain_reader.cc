#include "exports/virtio/chain_reader.h"

#include <atomic>
#include <cstring>

namespace gantry::virtio {

const RawDescriptor* ChainReader::table(AddressSpace& space, uint64_t address, uint32_t length, uint16_t flags,
                                        bool allowed, uint32_t& count) {
    const auto fault = [this]<class... Args>(fmt::format_string<Args...> format, Args... args) {
        broken(format, args...);
        return nullptr;
    };
    if (!allowed) return fault("an indirect descriptor, although the driver has not chosen that feature");
    if (flags & kDescNext) return fault("an indirect descriptor is followed by another one");
    if (length == 0 || length % kDescBytes != 0)
        return fault("an indirect table has {} bytes, which is no multiple of {}", length, kDescBytes);
    if (length > kMaxQueueSize * kDescBytes)
        return fault("an indirect table has {} descriptors; {} are possible", length / kDescBytes, kMaxQueueSize);
    pieces_.clear();
    if (!space.translate(address, length, pieces_, kMaxChainParts))
        return fault("an indirect table of {} bytes at address {:#x} is not in the guest's memory", length, address);
    if (!table_) table_ = std::make_unique_for_overwrite<RawDescriptor[]>(kMaxQueueSize);
    auto* to = reinterpret_cast<std::byte*>(table_.get());
    for (const iovec& piece : pieces_) {
        std::memcpy(to, piece.iov_base, piece.iov_len);
        to += piece.iov_len;
    }
    // From here on the copy is read, and never the guest's memory again.
    std::atomic_signal_fence(std::memory_order_seq_cst);
    count = length / kDescBytes;
    return table_.get();
}

bool ChainReader::broken_empty(uint64_t address) {
    return broken("a descriptor at address {:#x} has no bytes", address);
}

bool ChainReader::broken_order(uint64_t address) {
    return broken("the descriptor for address {:#x} is readable and comes after a writable one", address);
}

bool ChainReader::broken_memory(const Chain& chain, uint64_t address, uint32_t length) {
    if (chain.parts.size() >= kMaxChainParts)
        return broken("a chain falls into more than {} pieces of the guest's memory", kMaxChainParts);
    return broken("a descriptor names {} bytes at address {:#x}, which are not in the guest's memory", length, address);
}

}  // namespace gantry::virtio
