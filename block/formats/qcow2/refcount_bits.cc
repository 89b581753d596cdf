#include "block/formats/qcow2/refcount_bits.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refcounts.h"
#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

/// One width. Lanes of 8 bits and more are big-endian numbers, narrower ones fill a byte from its least significant bit
/// on; both lie in a word so that a whole word can be asked "is one of you zero".
template <uint32_t kOrder>
struct Width {
    static constexpr uint64_t kBits = uint64_t{1} << kOrder;
    static constexpr uint64_t kPerWord = 64 / kBits;
    static constexpr uint64_t kLane = kBits == 64 ? ~uint64_t{0} : (uint64_t{1} << (kBits & 63)) - 1;
    static constexpr uint64_t kLow = ~uint64_t{0} / kLane;  // 1 in each lane
    static constexpr uint64_t kHigh = kLow << (kBits - 1);  // the top bit of each lane

    static uint64_t get(const uint8_t* block, uint64_t index) {
        if constexpr (kOrder == 6) return load_be64(block + index * 8);
        if constexpr (kOrder == 5) return load_be32(block + index * 4);
        if constexpr (kOrder == 4) return load_be16(block + index * 2);
        if constexpr (kOrder == 3) return block[index];
        if constexpr (kOrder < 3) {
            constexpr uint64_t kPerByte = 8 / kBits;
            return (block[index / kPerByte] >> (index % kPerByte * kBits)) & kLane;
        }
    }

    static void set(uint8_t* block, uint64_t index, uint64_t count) {
        if constexpr (kOrder == 6) {
            store_be64(block + index * 8, count);
        } else if constexpr (kOrder == 5) {
            store_be32(block + index * 4, static_cast<uint32_t>(count));
        } else if constexpr (kOrder == 4) {
            store_be16(block + index * 2, static_cast<uint16_t>(count));
        } else if constexpr (kOrder == 3) {
            block[index] = static_cast<uint8_t>(count);
        } else {
            constexpr uint64_t kPerByte = 8 / kBits;
            const uint64_t shift = index % kPerByte * kBits;
            uint8_t& byte = block[index / kPerByte];
            byte = static_cast<uint8_t>((byte & ~(kLane << shift)) | (count << shift));
        }
    }

    static uint64_t word(const uint8_t* block, uint64_t index) {
        uint64_t v;
        std::memcpy(&v, block + index / kPerWord * 8, sizeof v);
        return v;
    }
    static bool has_zero_lane(uint64_t v) { return ((v - kLow) & ~v & kHigh) != 0; }

    /// First index in [from, to) that `lane` accepts; words that `skip` accepts are not looked into.
    template <class Lane, class Skip>
    static uint64_t find(const uint8_t* block, uint64_t from, uint64_t to, Lane lane, Skip skip) {
        for (uint64_t i = from; i < to;) {
            if (i % kPerWord == 0 && skip(word(block, i))) {
                i += kPerWord;
                continue;
            }
            const uint64_t end = std::min(to, (i / kPerWord + 1) * kPerWord);
            for (; i < end; i++) {
                if (lane(get(block, i))) return i;
            }
        }
        return to;
    }

    static uint64_t find_zero(const uint8_t* block, uint64_t from, uint64_t to) {
        return find(
            block, from, to, [](uint64_t count) { return count == 0; }, [](uint64_t v) { return !has_zero_lane(v); });
    }
    static uint64_t find_nonzero(const uint8_t* block, uint64_t from, uint64_t to) {
        return find(block, from, to, [](uint64_t count) { return count != 0; }, [](uint64_t v) { return v == 0; });
    }

    static uint64_t end(const uint8_t* block, uint64_t entries) {
        uint64_t i = entries;
        while (i >= kPerWord && word(block, i - kPerWord) == 0) i -= kPerWord;
        while (i > 0 && get(block, i - 1) == 0) i--;
        return i;
    }

    static CountFault check(const uint8_t* block, uint64_t first, uint64_t count, int64_t delta, uint64_t& at) {
        const uint64_t least = delta < 0 ? uint64_t{0} - static_cast<uint64_t>(delta) : 0;
        const uint64_t limit = max_refcount(kOrder);
        if (delta > 0 && static_cast<uint64_t>(delta) > limit) {
            at = first;
            return CountFault::kOverflow;
        }
        const uint64_t most = delta > 0 ? limit - static_cast<uint64_t>(delta) : ~uint64_t{0};
        for (uint64_t i = first; i < first + count; i++) {
            const uint64_t now = get(block, i);
            if (now >= least && now <= most) continue;
            at = i;
            return now < least ? CountFault::kNegative : CountFault::kOverflow;
        }
        return CountFault::kNone;
    }

    static void add(uint8_t* block, uint64_t first, uint64_t count, int64_t delta) {
        for (uint64_t i = first; i < first + count; i++) {
            set(block, i, get(block, i) + static_cast<uint64_t>(delta));
        }
    }
};

/// Calls `f` with the Width of `order`.
template <class F>
decltype(auto) with_width(uint32_t order, F f) {
    switch (order) {
        case 0:
            return f(Width<0>());
        case 1:
            return f(Width<1>());
        case 2:
            return f(Width<2>());
        case 3:
            return f(Width<3>());
        case 4:
            return f(Width<4>());
        case 5:
            return f(Width<5>());
        default:
            break;
    }
    GANTRY_CHECK(order == 6, "a refcount order above 6 is refused at open");
    return f(Width<6>());
}

}  // namespace

uint64_t max_refcount(uint32_t refcount_order) {
    return refcount_order == 6 ? static_cast<uint64_t>(INT64_MAX)
                               : (uint64_t{1} << (uint64_t{1} << refcount_order)) - 1;
}

uint64_t refcount_in_block(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t index) {
    return with_width(refcount_order, [&](auto width) { return width.get(block.data(), index); });
}

void set_refcount_in_block(std::span<uint8_t> block, uint32_t refcount_order, uint64_t index, uint64_t count) {
    with_width(refcount_order, [&](auto width) { width.set(block.data(), index, count); });
}

CountFault check_add(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t first, uint64_t count,
                     int64_t delta, uint64_t& at) {
    return with_width(refcount_order, [&](auto width) { return width.check(block.data(), first, count, delta, at); });
}

void add_to_counts(std::span<uint8_t> block, uint32_t refcount_order, uint64_t first, uint64_t count, int64_t delta) {
    with_width(refcount_order, [&](auto width) { width.add(block.data(), first, count, delta); });
}

uint64_t find_zero_count(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t from, uint64_t to) {
    return with_width(refcount_order, [&](auto width) { return width.find_zero(block.data(), from, to); });
}

uint64_t find_nonzero_count(std::span<const uint8_t> block, uint32_t refcount_order, uint64_t from, uint64_t to) {
    return with_width(refcount_order, [&](auto width) { return width.find_nonzero(block.data(), from, to); });
}

uint64_t end_of_counts(std::span<const uint8_t> block, uint32_t refcount_order) {
    return with_width(refcount_order,
                      [&](auto width) { return width.end(block.data(), block.size() * 8 >> refcount_order); });
}

}  // namespace gantry::block::qcow2
