#include "exports/virtio/guest_memory.h"

#include <algorithm>

namespace gantry::virtio {

namespace {

/// Rings and their fields are used in place: aligned for the guest has to mean aligned for us.
constexpr uint64_t kAlign = 16;

Result<> check_region(const Region& r) {
    uint64_t end;
    if (r.size == 0) return fail(ErrorKind::kInvalid, "the memory region at guest address {:#x} has no bytes", r.guest);
    if (__builtin_add_overflow(r.guest, r.size, &end) || __builtin_add_overflow(r.user, r.size, &end))
        return fail(ErrorKind::kInvalid, "the memory region at guest address {:#x} with {:#x} bytes ends beyond 2^64",
                    r.guest, r.size);
    const auto host = reinterpret_cast<uintptr_t>(r.host);
    const auto base = r.mapping ? reinterpret_cast<uintptr_t>(r.mapping->data()) : 0;
    if (!r.mapping || host < base || host - base > r.mapping->size() || r.size > r.mapping->size() - (host - base))
        return fail(ErrorKind::kInvalid, "the memory region at guest address {:#x} lies outside of what is mapped",
                    r.guest);
    if ((host - r.guest) % kAlign != 0 || (r.user - r.guest) % kAlign != 0)
        return fail(ErrorKind::kInvalid,
                    "the memory region at guest address {:#x} is not aligned with its file as guests expect (multiples "
                    "of {} bytes)",
                    r.guest, kAlign);
    return {};
}

}  // namespace

Result<std::shared_ptr<const GuestMemory>> GuestMemory::create(std::vector<Region> regions) {
    for (const Region& r : regions) CHECK_OK(check_region(r));
    std::vector<const Region*> by_user;
    for (const Region& r : regions)
        if (r.user != 0) by_user.push_back(&r);
    std::ranges::sort(by_user, {}, &Region::user);
    for (size_t i = 1; i < by_user.size(); i++)
        if (by_user[i]->user - by_user[i - 1]->user < by_user[i - 1]->size)
            return fail(ErrorKind::kInvalid, "the memory regions at user addresses {:#x} and {:#x} overlap",
                        by_user[i - 1]->user, by_user[i]->user);
    by_user.clear();
    std::ranges::sort(regions, {}, &Region::guest);
    for (size_t i = 1; i < regions.size(); i++)
        if (regions[i].guest - regions[i - 1].guest < regions[i - 1].size)
            return fail(ErrorKind::kInvalid, "the memory regions at guest addresses {:#x} and {:#x} overlap",
                        regions[i - 1].guest, regions[i].guest);
    return std::shared_ptr<const GuestMemory>(new GuestMemory(std::move(regions)));
}

GuestMemory::GuestMemory(std::vector<Region> regions) : regions_(std::move(regions)) {}

const Region* GuestMemory::find(uint64_t address) const {
    const auto after = std::ranges::upper_bound(regions_, address, {}, &Region::guest);
    if (after == regions_.begin()) return nullptr;
    const Region& r = *(after - 1);
    return address - r.guest < r.size ? &r : nullptr;
}

bool GuestMemory::translate(uint64_t address, uint64_t length, std::vector<iovec>& parts, size_t max_parts) const {
    while (length != 0) {
        const Region* const r = find(address);
        if (!r || parts.size() >= max_parts) return false;
        const uint64_t inside = address - r->guest;
        const uint64_t here = std::min(length, r->size - inside);
        parts.push_back({r->host + inside, here});
        length -= here;
        address += here;  // regions end before 2^64
    }
    return true;
}

std::byte* GuestMemory::at_guest(uint64_t address, uint64_t length) const {
    const Region* const r = find(address);
    return r && length <= r->size - (address - r->guest) ? r->host + (address - r->guest) : nullptr;
}

std::byte* GuestMemory::at_user(uint64_t address, uint64_t length) const {
    for (const Region& r : regions_) {
        const uint64_t inside = address - r.user;
        if (r.user != 0 && address >= r.user && inside < r.size && length <= r.size - inside) return r.host + inside;
    }
    return nullptr;
}

bool GuestMemory::guest_address(const void* host, uint64_t& address) const {
    const auto at = reinterpret_cast<uintptr_t>(host);
    for (const Region& r : regions_) {
        const auto begin = reinterpret_cast<uintptr_t>(r.host);
        if (at < begin || at - begin >= r.size) continue;
        address = r.guest + (at - begin);
        return true;
    }
    return false;
}

bool GuestMemory::broken() const {
    return std::ranges::any_of(regions_, [](const Region& r) { return r.mapping->broken(); });
}

bool AddressSpace::translate_more(uint64_t address, uint64_t length, std::vector<iovec>& parts, size_t max_parts) {
    while (length != 0) {
        if (parts.size() >= max_parts) return false;
        const Region* r = memory_->find(address);
        if (!r && source_) {
            auto more = source_->extend(*memory_, address);
            if (!more) return false;
            change(std::move(more));
            r = memory_->find(address);
        }
        if (!r) return false;
        last_ = r;
        const uint64_t inside = address - r->guest;
        const uint64_t here = std::min(length, r->size - inside);
        parts.push_back({r->host + inside, here});
        length -= here;
        address += here;  // regions end before 2^64
    }
    return true;
}

}  // namespace gantry::virtio
