// GuestMemory: the memory of a client, as far as it lets a device see it.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/error.h"

namespace gantry::virtio {

/// Part of a file that the client shares, mapped for reading and writing; unmapped with the last reference. The client
/// may cut the file short at any time: whoever touches what is gone finds zeroes (sigbus.cc), and broken() says so.
class Mapping {
  public:
    /// `offset` need not be a multiple of a page. kInvalid when the file is shorter than offset + size, errno of mmap.
    /// The descriptor stays the caller's and may be closed.
    static Result<std::shared_ptr<Mapping>> create(int fd, uint64_t offset, uint64_t size, bool writable = true);
    ~Mapping();
    Mapping(const Mapping&) = delete;

    std::byte* data() const { return data_; }
    uint64_t size() const { return size_; }
    /// Any thread.
    bool broken() const;

  private:
    Mapping() = default;
    std::byte* data_ = nullptr;
    uint64_t size_ = 0;
    void* base_ = nullptr;  // page aligned, as is length_
    size_t length_ = 0;
    size_t slot_ = 0;  // in the table of the signal handler
};

/// One range of guest addresses. `user` is where the client itself has mapped it (0 for vduse).
struct Region {
    uint64_t guest = 0;
    uint64_t size = 0;
    uint64_t user = 0;
    std::shared_ptr<Mapping> mapping;
    std::byte* host = nullptr;  // of `guest`, inside the mapping
};

/// A table of regions; never changes. Any thread.
class GuestMemory {
  public:
    /// kInvalid: an empty region, one that ends beyond 2^64, one outside of its mapping, one whose addresses differ in
    /// their last 4 bits (fields of rings would not be aligned), two that overlap (guest or user side).
    static Result<std::shared_ptr<const GuestMemory>> create(std::vector<Region> regions);

    std::span<const Region> regions() const { return regions_; }  // ascending by guest address
    /// Appends the host ranges of guest addresses [address, address + length), split at borders of regions; at most
    /// `max_parts` in `parts` altogether. False, with `parts` undefined, when some of it is not here. length > 0.
    bool translate(uint64_t address, uint64_t length, std::vector<iovec>& parts, size_t max_parts) const;
    /// The same for what must lie in one region; null when it does not.
    std::byte* at_guest(uint64_t address, uint64_t length) const;
    std::byte* at_user(uint64_t address, uint64_t length) const;
    /// The guest address of a host address that translate() gave; nothing when it is not from here.
    bool guest_address(const void* host, uint64_t& address) const;
    /// The region that a guest address belongs to; null for none.
    const Region* find(uint64_t address) const;
    /// A mapping has lost part of its file.
    bool broken() const;

  private:
    explicit GuestMemory(std::vector<Region> regions);
    std::vector<Region> regions_;
};

/// Where a queue gets memory that its table lacks (vduse maps what is asked for). Any loop.
class MemorySource {
  public:
    virtual ~MemorySource() = default;
    /// A table with everything of `known` and `address`; null when the client has nothing there. What was handed out
    /// before stays mapped until every queue has been paused.
    virtual std::shared_ptr<const GuestMemory> extend(const GuestMemory& known, uint64_t address) = 0;
};

/// One queue's look at guest memory. Own loop only.
class AddressSpace {
  public:
    AddressSpace() = default;
    AddressSpace(std::shared_ptr<const GuestMemory> memory, MemorySource* source)
        : memory_(std::move(memory)), source_(source) {}

    const GuestMemory& memory() const { return *memory_; }
    /// As GuestMemory::translate; what is missing is asked for.
    bool translate(uint64_t address, uint64_t length, std::vector<iovec>& parts, size_t max_parts) {
        // Mostly the same region as before.
        if (last_ && address - last_->guest < last_->size && length <= last_->size - (address - last_->guest) &&
            parts.size() < max_parts) [[likely]] {
            parts.push_back({last_->host + (address - last_->guest), length});
            return true;
        }
        return translate_more(address, length, parts, max_parts);
    }
    bool broken() const { return memory_->broken(); }
    /// Another table; nothing that the one before gave is in use.
    void change(std::shared_ptr<const GuestMemory> memory) {
        last_ = nullptr;
        memory_ = std::move(memory);
    }

  private:
    bool translate_more(uint64_t address, uint64_t length, std::vector<iovec>& parts, size_t max_parts);
    std::shared_ptr<const GuestMemory> memory_;
    MemorySource* source_ = nullptr;
    const Region* last_ = nullptr;  // of *memory_
};

}  // namespace gantry::virtio
