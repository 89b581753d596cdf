#include "tests/support/virtio_driver.h"

#include <fmt/format.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "exports/virtio/chain_reader.h"
#include "exports/virtio/shared.h"

namespace gantry::test {

using namespace virtio;

namespace {

template <class... Args>
void require(bool holds, fmt::format_string<Args...> format, Args&&... args) {
    if (!holds) throw std::runtime_error(fmt::format(format, std::forward<Args>(args)...));
}

void put_descriptor(std::byte* at, uint64_t address, uint32_t length, uint16_t third, uint16_t fourth) {
    store<uint64_t>(at, address);
    store<uint32_t>(at + 8, length);
    store<uint16_t>(at + 12, third);
    store<uint16_t>(at + 14, fourth);
}

/// Section 2.7.10.1 of VIRTIO 1.2.
bool need_event(uint16_t event, uint16_t now, uint16_t before) {
    return static_cast<uint16_t>(now - event - 1) < static_cast<uint16_t>(now - before);
}

class SplitDriver final : public Driver {
  public:
    SplitDriver(Guest& guest, RingShape shape) : Driver(guest, shape) {
        for (uint32_t i = shape.size; i-- > 0;) free_.push_back(static_cast<uint16_t>(i));
    }
    std::unique_ptr<Driver> clone(Guest& copy) const override {
        auto other = std::make_unique<SplitDriver>(*this);
        other->guest_ = &copy;
        return other;
    }
    bool kick() override {
        const uint16_t before = shown_;
        store<uint16_t>(avail(2), added_, std::memory_order_release);
        shown_ = added_;
        std::atomic_thread_fence(std::memory_order_seq_cst);
        if (!shape_.event_idx) return added_ != before && !(load<uint16_t>(used(0)) & 1);
        return need_event(load<uint16_t>(used(4 + 8 * shape_.size)), added_, before);
    }
    void want_signal(uint16_t skip) override {
        if (shape_.event_idx)
            store<uint16_t>(avail(4 + 2 * shape_.size), static_cast<uint16_t>(reaped_ + skip));
        else
            store<uint16_t>(avail(0), 0);
        std::atomic_thread_fence(std::memory_order_seq_cst);
    }
    void want_no_signal() override {
        if (shape_.event_idx)
            store<uint16_t>(avail(4 + 2 * shape_.size), static_cast<uint16_t>(reaped_ + 0x8000));
        else
            store<uint16_t>(avail(0), 1);
    }

  private:
    std::byte* avail(uint64_t offset) const { return guest_->at(driver_ + offset, 2); }
    std::byte* used(uint64_t offset) const { return guest_->at(device_ + offset, 2); }
    size_t room() const override { return free_.size(); }

    std::optional<uint16_t> put(std::span<const Raw> ring) override {
        std::vector<uint16_t> slots(free_.end() - static_cast<ptrdiff_t>(ring.size()), free_.end());
        free_.resize(free_.size() - ring.size());
        for (size_t i = 0; i < ring.size(); i++) {
            const bool more = i + 1 < ring.size();
            put_descriptor(descriptor(slots[i]), ring[i].address, ring[i].length,
                           static_cast<uint16_t>(ring[i].flags | (more ? kDescNext : 0)), more ? slots[i + 1] : 0xdead);
        }
        const uint16_t head = slots[0];
        store<uint16_t>(avail(4 + 2 * (added_ % shape_.size)), head);
        ++added_;
        chains_[head].slots = std::move(slots);
        return head;
    }

    std::optional<Used> next_used() override {
        const auto index = load<uint16_t>(used(2), std::memory_order_acquire);
        require(static_cast<uint16_t>(index - reaped_) <= chains_.size(),
                "the used index is {}, {} were reaped and {} are outstanding", index, reaped_, chains_.size());
        if (index == reaped_) return std::nullopt;
        const uint64_t at = 4 + 8 * (reaped_ % shape_.size);
        const Used one{
            .id = static_cast<uint16_t>(load<uint32_t>(used(at))), .slots = 0, .length = load<uint32_t>(used(at + 4))};
        ++reaped_;
        const auto found = chains_.find(one.id);
        require(found != chains_.end(), "descriptor {} was used and is not outstanding", one.id);
        free_.insert(free_.end(), found->second.slots.begin(), found->second.slots.end());
        return one;
    }

    std::vector<uint16_t> free_;
    uint16_t added_ = 0, shown_ = 0, reaped_ = 0;
};

class PackedDriver final : public Driver {
  public:
    PackedDriver(Guest& guest, RingShape shape) : Driver(guest, shape), room_(shape.size) {
        for (uint32_t i = shape.size; i-- > 0;) free_ids_.push_back(static_cast<uint16_t>(i));
    }
    std::unique_ptr<Driver> clone(Guest& copy) const override {
        auto other = std::make_unique<PackedDriver>(*this);
        other->guest_ = &copy;
        return other;
    }
    bool kick() override {
        const uint16_t slots = std::exchange(unshown_, 0);
        std::atomic_thread_fence(std::memory_order_seq_cst);
        const auto events = load<uint32_t>(guest_->at(device_, 4));
        const auto flags = static_cast<uint16_t>(events >> 16);
        if (flags != 2) return slots != 0 && flags == 0;
        int event = events & 0x7fff;
        if ((events >> 15 & 1) != static_cast<uint32_t>(wrap_)) event -= static_cast<int>(shape_.size);
        return need_event(static_cast<uint16_t>(event), next_, static_cast<uint16_t>(next_ - slots));
    }
    void want_signal(uint16_t skip) override {
        uint32_t at = reaped_ + skip;
        bool wrap = reaped_wrap_;
        if (at >= shape_.size) {
            at -= shape_.size;
            wrap = !wrap;
        }
        store<uint32_t>(guest_->at(driver_, 4), shape_.event_idx ? 2U << 16 | (wrap ? 0x8000U : 0) | at : 0);
        std::atomic_thread_fence(std::memory_order_seq_cst);
    }
    void want_no_signal() override { store<uint32_t>(guest_->at(driver_, 4), 1U << 16); }

  private:
    static constexpr uint16_t kAvail = 1 << 7, kUsed = 1 << 15;
    size_t room() const override { return room_; }

    std::optional<uint16_t> put(std::span<const Raw> ring) override {
        const uint16_t id = free_ids_.back();
        free_ids_.pop_back();
        std::byte* const head = descriptor(next_);
        uint16_t head_flags = 0;
        for (size_t i = 0; i < ring.size(); i++) {
            const auto flags =
                static_cast<uint16_t>(ring[i].flags | (i + 1 < ring.size() ? kDescNext : 0) | (wrap_ ? kAvail : kUsed));
            if (i == 0) head_flags = flags;
            const uint16_t before = load<uint16_t>(descriptor(next_) + 14);
            put_descriptor(descriptor(next_), ring[i].address, ring[i].length,
                           i + 1 < ring.size() ? static_cast<uint16_t>(id ^ 0x5555) : id, i == 0 ? before : flags);
            chains_[id].slots.push_back(next_);
            if (++next_ == shape_.size) {
                next_ = 0;
                wrap_ = !wrap_;
            }
        }
        store<uint16_t>(head + 14, head_flags, std::memory_order_release);
        room_ -= ring.size();
        unshown_ = static_cast<uint16_t>(unshown_ + ring.size());
        return id;
    }

    std::optional<Used> next_used() override {
        const std::byte* const at = descriptor(reaped_);
        const auto flags = load<uint16_t>(at + 14, std::memory_order_acquire);
        if (((flags & kAvail) != 0) != reaped_wrap_ || ((flags & kUsed) != 0) != reaped_wrap_) return std::nullopt;
        Used one{.id = load<uint16_t>(at + 12), .slots = 0, .length = load<uint32_t>(at + 8)};
        const auto found = chains_.find(one.id);
        require(found != chains_.end(), "buffer {} was used at slot {} and is not outstanding", one.id, reaped_);
        one.slots = static_cast<uint16_t>(found->second.slots.size());
        reaped_ = static_cast<uint16_t>(reaped_ + one.slots);
        if (reaped_ >= shape_.size) {
            reaped_ = static_cast<uint16_t>(reaped_ - shape_.size);
            reaped_wrap_ = !reaped_wrap_;
        }
        room_ += one.slots;
        free_ids_.insert(free_ids_.begin() + static_cast<ptrdiff_t>(free_ids_.size() / 2), one.id);
        return one;
    }

    std::vector<uint16_t> free_ids_;
    size_t room_;
    uint16_t next_ = 0, reaped_ = 0, unshown_ = 0;
    bool wrap_ = true, reaped_wrap_ = true;
};

}  // namespace

Guest::Guest(std::vector<Part> parts) : parts_(std::move(parts)), taken_(parts_.size()) { map(); }

Guest::Guest(const Guest& other) : parts_(other.parts_), taken_(other.taken_) {
    map();
    for (const Part& part : parts_) std::memcpy(at(part.guest, part.size), other.at(part.guest, part.size), part.size);
}

void Guest::map() {
    std::vector<Region> regions;
    for (const Part& part : parts_) {
        UniqueFd fd(::memfd_create("guest", MFD_CLOEXEC));
        require(fd && ::ftruncate(fd.get(), static_cast<off_t>(part.size)) == 0, "no memory for a guest");
        auto mapping = Mapping::create(fd.get(), 0, part.size);
        require(mapping.has_value(), "the memory of a guest cannot be mapped");
        regions.push_back({part.guest, part.size, part.guest + kUser, *mapping, (*mapping)->data()});
        fds_.push_back(std::move(fd));
    }
    auto memory = GuestMemory::create(std::move(regions));
    require(memory.has_value(), "the parts of a guest's memory do not fit together");
    memory_ = std::move(*memory);
}

void Guest::clear() {
    for (const Part& part : parts_) std::memset(at(part.guest, part.size), 0, part.size);
    std::ranges::fill(taken_, 0);
}

uint64_t Guest::alloc(uint64_t size, uint64_t align) {
    for (size_t i = parts_.size(); i-- > 0;) {
        const uint64_t from = (parts_[i].guest + taken_[i] + align - 1) / align * align;
        if (from + size > parts_[i].guest + parts_[i].size) continue;
        taken_[i] = from + size - parts_[i].guest;
        return from;
    }
    throw std::runtime_error("the guest's memory is full");
}

std::byte* Guest::at(uint64_t address, uint64_t length) const {
    std::byte* const at = memory_->at_guest(address, length);
    require(at != nullptr, "the guest has nothing at {:#x}", address);
    return at;
}

void Guest::write(uint64_t address, std::span<const std::byte> data) const {
    std::vector<iovec> parts;
    if (data.empty()) return;
    require(memory_->translate(address, data.size(), parts, 64), "the guest has nothing at {:#x}", address);
    for (const iovec& part : parts) {
        std::memcpy(part.iov_base, data.data(), part.iov_len);
        data = data.subspan(part.iov_len);
    }
}

std::string Guest::read(uint64_t address, uint64_t length) const {
    std::vector<iovec> parts;
    if (length == 0) return {};
    require(memory_->translate(address, length, parts, 64), "the guest has nothing at {:#x}", address);
    std::string text;
    for (const iovec& part : parts) text.append(static_cast<const char*>(part.iov_base), part.iov_len);
    return text;
}

Driver::Driver(Guest& guest, RingShape shape) : guest_(&guest), shape_(shape) {
    const AreaNeeds needs = area_needs(shape);
    descriptors_ = guest.alloc(needs.descriptors, needs.descriptors_align);
    driver_ = guest.alloc(needs.driver, needs.driver_align);
    device_ = guest.alloc(needs.device, needs.device_align);
    std::memset(guest.at(descriptors_, needs.descriptors), 0, needs.descriptors);
    std::memset(guest.at(driver_, needs.driver), 0, needs.driver);
    std::memset(guest.at(device_, needs.device), 0, needs.device);
}

std::unique_ptr<Driver> Driver::create(Guest& guest, RingShape shape) {
    if (shape.packed) return std::make_unique<PackedDriver>(guest, shape);
    return std::make_unique<SplitDriver>(guest, shape);
}

RingPlace Driver::place() const { return {guest_->at(descriptors_), guest_->at(driver_), guest_->at(device_)}; }

std::optional<uint16_t> Driver::add(std::span<const Piece> chain, Form form) {
    const size_t direct = form == Form::kDirect ? chain.size() : form == Form::kMixed ? 1 : 0;
    if (room() < direct + (direct < chain.size())) return std::nullopt;
    std::vector<Raw> ring;
    for (const Piece& piece : chain.first(direct))
        ring.push_back({piece.address, piece.length, piece.writable ? kDescWrite : uint16_t{0}});
    std::optional<Table> table;
    if (direct < chain.size()) {
        const size_t entries = chain.size() - direct;
        const auto fits = std::ranges::find_if(free_tables_, [&](const Table& t) { return t.entries >= entries; });
        if (fits != free_tables_.end()) {
            table = *fits;
            free_tables_.erase(fits);
        } else {
            table = Table{guest_->alloc(16 * entries), entries};
        }
        for (size_t i = 0; i < entries; i++) {
            const Piece& piece = chain[direct + i];
            const bool more = i + 1 < entries;
            const uint16_t write = piece.writable ? kDescWrite : uint16_t{0};
            std::byte* const at = guest_->at(table->address + 16 * i, 16);
            if (shape_.packed) {  // in order; neither buffer id nor NEXT mean anything
                put_descriptor(at, piece.address, piece.length, static_cast<uint16_t>(0xbeef + i), write);
            } else {
                put_descriptor(at, piece.address, piece.length, static_cast<uint16_t>(write | (more ? kDescNext : 0)),
                               static_cast<uint16_t>(i + 1));
            }
        }
        ring.push_back({table->address, static_cast<uint32_t>(16 * entries), kDescIndirect});
    }
    const std::optional<uint16_t> id = put(ring);
    if (table) chains_[*id].table = table;
    return id;
}

std::vector<Used> Driver::reap() {
    std::vector<Used> all;
    while (const std::optional<Used> one = next_used()) {
        const auto found = chains_.find(one->id);
        if (found->second.table) free_tables_.push_back(*found->second.table);
        chains_.erase(found);
        all.push_back(*one);
    }
    return all;
}

}  // namespace gantry::test
