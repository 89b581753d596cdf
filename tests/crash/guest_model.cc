#include "tests/crash/guest_model.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

namespace gantry::test {

GuestModel::GuestModel(uint64_t sectors, const std::vector<bool>& initial)
    : sectors_(sectors), sizes_{{sectors, 0, 0}} {
    for (uint64_t s = 0; s < sectors; s++) {
        const bool filled = s < initial.size() && initial[s];
        sectors_[s].push_back({filled ? 1u : 0u, 0, 0});
    }
}

void GuestModel::fill(uint8_t* to, uint64_t sector, uint32_t version) {
    if (version == 0) {
        std::memset(to, 0, kSector);
        return;
    }
    for (uint64_t i = 0; i < kSector / 8; i++) {
        const uint64_t word = (uint64_t{version} << 32 | static_cast<uint32_t>(sector)) ^ (i << 56);
        std::memcpy(to + i * 8, &word, 8);
    }
}

std::optional<uint32_t> GuestModel::decode(const uint8_t* from, uint64_t sector) {
    uint64_t word = 0;
    std::memcpy(&word, from, 8);
    const auto version = static_cast<uint32_t>(word >> 32);
    uint8_t expected[kSector];
    fill(expected, sector, version);
    if (std::memcmp(expected, from, kSector) != 0) return std::nullopt;
    return version;
}

void GuestModel::begin(uint64_t sector, uint32_t version, Stamp begun) {
    sectors_[sector].push_back({version, begun, kRunning});
}
void GuestModel::end(uint64_t sector, Stamp ended) { sectors_[sector].back().ended = ended; }

void GuestModel::settle(uint64_t sector, uint32_t version, Stamp ended) {
    auto& list = sectors_[sector];
    if (version == list.back().version) {
        list.back().ended = ended;
    } else {
        list.pop_back();
    }
}

void GuestModel::resize_begins(uint64_t sectors, Stamp begun) {
    const uint64_t old = sizes_.back().sectors;
    sizes_.push_back({sectors, begun, kRunning});
    if (sectors > sectors_.size()) {
        sectors_.resize(sectors, {Change{0, 0, 0}});
    }
    for (uint64_t s = sectors; s < old; s++) begin(s, 0, begun);
}
void GuestModel::resize_ended(Stamp ended) {
    const uint64_t now = sizes_.back().sectors;
    sizes_.back().ended = ended;
    for (uint64_t s = now; s < sectors_.size(); s++) {
        if (sectors_[s].back().ended == kRunning) sectors_[s].back().ended = ended;
    }
}

std::vector<uint32_t> GuestModel::versions() const {
    std::vector<uint32_t> all;
    for (uint64_t s = 0; s < sectors(); s++) all.push_back(current(s));
    return all;
}

Stamp GuestModel::flushed_until(Stamp t) const {
    Stamp until = 0;
    for (const Flush& f : flushes_) {
        if (f.ended <= t) until = std::max(until, f.begun);
    }
    return until;
}

std::string GuestModel::judge(uint64_t sector, std::optional<uint32_t> version, Stamp t, Kept kept) const {
    const Stamp until = kept == Kept::kAcknowledged ? t : flushed_until(t);
    const auto& list = sectors_[sector];
    size_t committed = 0;
    for (size_t i = 0; i < list.size(); i++) {
        if (list[i].ended <= until) committed = i;
    }
    std::string allowed;
    for (size_t i = committed; i < list.size() && list[i].begun <= t; i++) {
        if (version && *version == list[i].version) return {};
        allowed += fmt::format(" {}", list[i].version);
    }
    return fmt::format("sector {} holds {} after a cut at {}, allowed are:{} (flushed until {})", sector,
                       version ? fmt::format("version {}", *version) : "garbage", t, allowed, until);
}

bool GuestModel::size_allowed(uint64_t sectors, Stamp t) const {
    size_t committed = 0;
    for (size_t i = 0; i < sizes_.size(); i++) {
        if (sizes_[i].ended <= t) committed = i;
    }
    for (size_t i = committed; i < sizes_.size() && sizes_[i].begun <= t; i++) {
        if (sizes_[i].sectors == sectors) return true;
    }
    return false;
}

bool GuestModel::changed_before(uint64_t sector, Stamp t) const {
    const auto& list = sectors_[sector];
    for (size_t i = 1; i < list.size(); i++) {
        // A discard of zeroes may have been ignored.
        if (list[i].ended <= t && list[i].version != list[i - 1].version) return true;
    }
    return false;
}

}  // namespace gantry::test
