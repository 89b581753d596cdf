// Guest and driver: the other side of virtqueues, for tests of the device's side.

#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "exports/virtio/guest_memory.h"
#include "exports/virtio/ring.h"
#include "runtime/unique_fd.h"

namespace gantry::test {

/// The memory of a guest: some memfds at guest addresses. What fails throws std::runtime_error.
class Guest {
  public:
    struct Part {
        uint64_t guest;
        uint64_t size;
    };
    /// Two parts side by side and one far away, 1 MiB each.
    static std::vector<Part> usual_parts() {
        return {{0x100000, 1 << 20}, {0x200000, 1 << 20}, {uint64_t{1} << 32, 1 << 20}};
    }
    /// Where the first of the usual parts ends and the second begins.
    static constexpr uint64_t kBorder = 0x200000;
    /// What user addresses are more than guest addresses.
    static constexpr uint64_t kUser = 0x7f00'0000'0000;

    explicit Guest(std::vector<Part> parts = usual_parts());
    /// The same bytes in memory of its own.
    Guest(const Guest& other);

    const std::shared_ptr<const virtio::GuestMemory>& memory() const { return memory_; }
    virtio::AddressSpace space() const { return virtio::AddressSpace(memory_, nullptr); }
    const std::vector<Part>& parts() const { return parts_; }
    int fd(size_t part) const { return fds_.at(part).get(); }
    /// Zeroes everywhere, and nothing is allocated.
    void clear();
    /// A guest address in the last part (in one before when that is full); never freed.
    uint64_t alloc(uint64_t size, uint64_t align = 16);
    /// Where [address, address + length) is; it lies in one part.
    std::byte* at(uint64_t address, uint64_t length = 1) const;
    void write(uint64_t address, std::span<const std::byte> data) const;
    void write(uint64_t address, std::string_view text) const { write(address, std::as_bytes(std::span(text))); }
    std::string read(uint64_t address, uint64_t length) const;

  private:
    void map();
    std::vector<Part> parts_;
    std::vector<uint64_t> taken_;  // bytes from the beginning of each part
    std::vector<UniqueFd> fds_;
    std::shared_ptr<const virtio::GuestMemory> memory_;
};

/// One buffer of a chain.
struct Piece {
    uint64_t address;
    uint32_t length;
    bool writable;
};

/// A driver and its ring. What the device does wrong throws std::runtime_error.
class Driver {
  public:
    /// Puts an empty ring into the guest's memory.
    static std::unique_ptr<Driver> create(Guest& guest, virtio::RingShape shape);
    virtual ~Driver() = default;
    /// The same state, looking at the copy of its guest.
    virtual std::unique_ptr<Driver> clone(Guest& copy) const = 0;

    const virtio::RingShape& shape() const { return shape_; }
    // Guest addresses of the areas.
    uint64_t descriptors() const { return descriptors_; }
    uint64_t driver_area() const { return driver_; }
    uint64_t device_area() const { return device_; }
    virtio::RingPlace place() const;
    /// What SET_VRING_BASE says for a ring that begins.
    uint32_t first_base() const { return shape_.packed ? 0x80008000U : 0; }

    enum class Form : uint8_t { kDirect, kIndirect, kMixed };  // kMixed: the first piece direct, the others indirect
    /// Makes a chain available; its id, or nothing when the ring is full. The device sees it after kick(), in a packed
    /// ring at once.
    std::optional<uint16_t> add(std::span<const Piece> chain, Form form = Form::kDirect);
    /// Shows what was added. True: the device wants to be told.
    virtual bool kick() = 0;
    /// What was used meanwhile, in the order of the ring.
    std::vector<virtio::Used> reap();
    size_t outstanding() const { return chains_.size(); }
    bool is_outstanding(uint16_t id) const { return chains_.contains(id); }
    /// It wants to be told of the next used chain; of the one after `skip` more.
    virtual void want_signal(uint16_t skip = 0) = 0;
    /// It does not want to be told (with EVENT_IDX: until very much later).
    virtual void want_no_signal() = 0;

  protected:
    struct Raw {
        uint64_t address;
        uint32_t length;
        uint16_t flags;
    };
    /// For indirect chains, used again and again.
    struct Table {
        uint64_t address;
        size_t entries;
    };
    struct Outstanding {
        std::vector<uint16_t> slots;
        std::optional<Table> table;
    };
    Driver(Guest& guest, virtio::RingShape shape);
    virtual std::optional<uint16_t> put(std::span<const Raw> ring) = 0;
    virtual size_t room() const = 0;
    virtual std::optional<virtio::Used> next_used() = 0;
    std::byte* descriptor(size_t index) const { return guest_->at(descriptors_ + 16 * index, 16); }

    Guest* guest_;
    virtio::RingShape shape_;
    uint64_t descriptors_, driver_, device_;
    std::map<uint16_t, Outstanding> chains_;  // by id
    std::vector<Table> free_tables_;
};

}  // namespace gantry::test
