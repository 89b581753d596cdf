// The LUKS1 header: decode, validate, encode (spec/formats.md "luks"). Pure; no I/O.

#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <string>

#include "block/crypto/algorithms.h"

namespace gantry::block::crypto {

constexpr uint32_t kLuksHeaderBytes = 592;
constexpr uint32_t kLuksSlots = 8;
constexpr uint32_t kLuksSlotBytes = 48;
constexpr uint32_t kLuksStripes = 4000;
constexpr uint32_t kLuksSaltBytes = 32;
constexpr uint32_t kLuksDigestBytes = 20;
/// Key material and payload begin at multiples of this.
constexpr uint32_t kLuksAlignment = 4096;
/// More would let an image keep us busy for minutes at each key slot.
constexpr uint32_t kLuksMaxIterations = 100'000'000;
constexpr uint32_t kLuksMinIterations = 1000;

struct LuksSlot {
    bool active = false;
    uint32_t iterations = 0;
    std::array<uint8_t, kLuksSaltBytes> salt{};
    uint32_t material_sector = 0;
    uint32_t stripes = kLuksStripes;
};

struct LuksHeader {
    CipherSpec cipher;
    HashAlg hash = HashAlg::kSha256;
    uint32_t payload_sector = 0;
    uint32_t key_bytes = 0;
    std::array<uint8_t, kLuksDigestBytes> digest{};
    std::array<uint8_t, kLuksSaltBytes> digest_salt{};
    uint32_t digest_iterations = 0;
    std::string uuid;  // printable characters only, at most 39
    std::array<LuksSlot, kLuksSlots> slots;

    /// Of one slot's key material, whole sectors.
    uint32_t material_bytes() const;
    /// "xts-plain64", "cbc-essiv:sha256".
    std::string mode_text() const;
    unsigned active_slots() const;
};

/// `head`: the first bytes of the volume, at least kLuksHeaderBytes unless the volume is shorter. Everything that the
/// fields must satisfy has been checked afterwards; nothing is said about the length of what holds it. Errors: kInvalid
/// (no LUKS), kUnsupported (version, algorithms), kCorrupt, kTooLarge (iterations).
Result<LuksHeader> decode_luks_header(std::span<const uint8_t> head);
std::array<uint8_t, kLuksHeaderBytes> encode_luks_header(const LuksHeader& header);

/// The part of the header that describes one slot, and where it begins.
std::array<uint8_t, kLuksSlotBytes> encode_luks_slot(const LuksSlot& slot);
constexpr uint32_t luks_slot_offset(uint32_t slot) { return 208 + slot * kLuksSlotBytes; }

/// Places of the key slots and of the payload for the header's key length.
void lay_out_luks(LuksHeader& header);

}  // namespace gantry::block::crypto
