#include "block/crypto/luks_header.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>

#include "block/crypto/cipher.h"

namespace gantry::block::crypto {

namespace {

constexpr std::array<uint8_t, 6> kMagic = {'L', 'U', 'K', 'S', 0xba, 0xbe};
constexpr uint32_t kSlotOn = 0x00ac71f3;
constexpr uint32_t kSlotOff = 0x0000dead;
constexpr size_t kNameBytes = 32;
constexpr size_t kUuidBytes = 40;
constexpr uint32_t kMaxKeyBytes = 64;

// Where the fields are (spec/formats.md "luks").
constexpr size_t kAtVersion = 6, kAtCipher = 8, kAtMode = 40, kAtHash = 72, kAtPayload = 104, kAtKeyBytes = 108,
                 kAtDigest = 112, kAtDigestSalt = 132, kAtDigestIterations = 164, kAtUuid = 168;

template <class T>
T load(const uint8_t* p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return std::byteswap(v);
}
template <class T>
void store(uint8_t* p, T v) {
    v = std::byteswap(v);
    std::memcpy(p, &v, sizeof v);
}

Result<std::string> name_at(std::span<const uint8_t> head, size_t at, std::string_view what) {
    const auto field = head.subspan(at, kNameBytes);
    const auto end = std::ranges::find(field, uint8_t{0});
    if (end == field.end()) {
        return fail(ErrorKind::kCorrupt, "LUKS header {} is not NUL terminated; {} bytes at offset {}", what,
                    kNameBytes, at);
    }
    return std::string(field.begin(), end);
}

uint64_t material_sectors(uint64_t key_bytes, uint64_t stripes) {
    return (key_bytes * stripes + kSectorBytes - 1) / kSectorBytes;
}

Result<LuksSlot> decode_slot(const uint8_t* p, uint32_t number, const LuksHeader& header) {
    const auto state = load<uint32_t>(p);
    LuksSlot slot;
    slot.iterations = load<uint32_t>(p + 4);
    std::copy_n(p + 8, kLuksSaltBytes, slot.salt.begin());
    slot.material_sector = load<uint32_t>(p + 40);
    slot.stripes = load<uint32_t>(p + 44);
    if (slot.stripes != kLuksStripes) {
        return fail(ErrorKind::kCorrupt, "Keyslot {} is corrupted (stripes {} != {})", number, slot.stripes,
                    kLuksStripes);
    }
    if (uint64_t{slot.material_sector} * kSectorBytes < kLuksHeaderBytes) {
        return fail(ErrorKind::kCorrupt,
                    "Keyslot {} is overlapping with the LUKS header; its key material begins at sector {}", number,
                    slot.material_sector);
    }
    if (state != kSlotOn && state != kSlotOff) {
        return fail(ErrorKind::kCorrupt, "Keyslot {} state (active/disable) is corrupted; it is {:#x}", number, state);
    }
    slot.active = state == kSlotOn;
    if (slot.active && slot.iterations == 0) {
        return fail(ErrorKind::kCorrupt, "Keyslot {} iteration count is zero", number);
    }
    if (slot.active && slot.iterations > kLuksMaxIterations) {
        return fail(ErrorKind::kTooLarge,
                    "Keyslot {} asks for {} iterations of key derivation; more than {} are refused, because they would "
                    "keep this machine busy for minutes",
                    number, slot.iterations, kLuksMaxIterations);
    }
    const uint64_t end = slot.material_sector + material_sectors(header.key_bytes, slot.stripes);
    if (end > header.payload_sector) {
        return fail(ErrorKind::kCorrupt,
                    "Keyslot {} is overlapping with the encrypted payload; its key material ends at sector {}, the "
                    "payload begins at {}",
                    number, end, header.payload_sector);
    }
    return slot;
}

Result<> check_overlaps(const LuksHeader& header) {
    const uint64_t length = material_sectors(header.key_bytes, kLuksStripes);
    for (uint32_t a = 0; a < kLuksSlots; a++) {
        for (uint32_t b = a + 1; b < kLuksSlots; b++) {
            const uint64_t begin_a = header.slots[a].material_sector, begin_b = header.slots[b].material_sector;
            if (begin_a < begin_b + length && begin_b < begin_a + length) {
                return fail(ErrorKind::kCorrupt,
                            "Keyslots {} and {} are overlapping in the header; sectors {} and {}, {} each", a, b,
                            begin_a, begin_b, length);
            }
        }
    }
    return {};
}

/// "xts-plain64", "cbc-essiv:sha256".
Result<CipherSpec> parse_cipher(std::string_view family, std::string_view mode, uint32_t key_bytes) {
    CipherSpec spec;
    const size_t dash = mode.find('-');
    if (dash == std::string_view::npos) {
        return fail(ErrorKind::kUnsupported, "Unexpected cipher mode string format '{}'", printable(mode));
    }
    TRY(spec.mode, mode_named(mode.substr(0, dash)));
    const std::string_view generator = mode.substr(dash + 1);
    const size_t colon = generator.find(':');
    TRY(spec.ivgen, iv_generator_named(generator.substr(0, colon)));
    if (colon != std::string_view::npos) {
        TRY(spec.ivgen_hash, hash_named(generator.substr(colon + 1)));
    }
    const uint32_t divisor = spec.mode == CipherMode::kXts ? 2 : 1;
    const auto alg = key_bytes % divisor == 0 ? cipher_of_family(family, key_bytes / divisor) : std::nullopt;
    if (!alg) {
        return fail(ErrorKind::kUnsupported, "Algorithm '{}' with key size {} bytes not supported", printable(family),
                    key_bytes);
    }
    spec.alg = *alg;
    CHECK_OK(spec.validate());
    return spec;
}

}  // namespace

uint32_t LuksHeader::material_bytes() const {
    return static_cast<uint32_t>(material_sectors(key_bytes, kLuksStripes) * kSectorBytes);
}

std::string LuksHeader::mode_text() const {
    std::string out = fmt::format("{}-{}", name_of(cipher.mode), name_of(cipher.ivgen));
    if (cipher.ivgen_hash) out += fmt::format(":{}", name_of(*cipher.ivgen_hash));
    return out;
}

unsigned LuksHeader::active_slots() const {
    return static_cast<unsigned>(std::ranges::count_if(slots, &LuksSlot::active));
}

Result<LuksHeader> decode_luks_header(std::span<const uint8_t> head) {
    if (head.size() < kLuksHeaderBytes || !std::equal(kMagic.begin(), kMagic.end(), head.begin())) {
        return fail(ErrorKind::kInvalid, "Volume is not in LUKS format");
    }
    const uint8_t* p = head.data();
    if (const auto version = load<uint16_t>(p + kAtVersion); version != 1) {
        return fail(ErrorKind::kUnsupported, "LUKS version {} is not supported", version);
    }
    TRY(const std::string family, name_at(head, kAtCipher, "cipher name"));
    TRY(const std::string mode, name_at(head, kAtMode, "cipher mode"));
    TRY(const std::string hash, name_at(head, kAtHash, "hash spec"));

    LuksHeader header;
    header.payload_sector = load<uint32_t>(p + kAtPayload);
    header.key_bytes = load<uint32_t>(p + kAtKeyBytes);
    std::copy_n(p + kAtDigest, kLuksDigestBytes, header.digest.begin());
    std::copy_n(p + kAtDigestSalt, kLuksSaltBytes, header.digest_salt.begin());
    header.digest_iterations = load<uint32_t>(p + kAtDigestIterations);
    for (size_t i = 0; i + 1 < kUuidBytes && p[kAtUuid + i] > ' ' && p[kAtUuid + i] < 0x7f; i++) {
        header.uuid += static_cast<char>(p[kAtUuid + i]);
    }

    if (uint64_t{header.payload_sector} * kSectorBytes < kLuksHeaderBytes) {
        return fail(ErrorKind::kCorrupt, "LUKS payload is overlapping with the header; it begins at sector {}",
                    header.payload_sector);
    }
    if (header.digest_iterations == 0) return fail(ErrorKind::kCorrupt, "LUKS key iteration count is zero");
    if (header.digest_iterations > kLuksMaxIterations) {
        return fail(ErrorKind::kTooLarge,
                    "The LUKS header asks for {} iterations to check a key; more than {} are refused, because they "
                    "would keep this machine busy for minutes",
                    header.digest_iterations, kLuksMaxIterations);
    }
    if (header.key_bytes == 0 || header.key_bytes > kMaxKeyBytes) {
        return fail(ErrorKind::kUnsupported, "Algorithm '{}' with key size {} bytes not supported", printable(family),
                    header.key_bytes);
    }
    for (uint32_t i = 0; i < kLuksSlots; i++) {
        TRY(header.slots[i], decode_slot(p + luks_slot_offset(i), i, header));
    }
    CHECK_OK(check_overlaps(header));
    TRY(header.cipher, parse_cipher(family, mode, header.key_bytes));
    TRY(header.hash, hash_named(hash));
    return header;
}

std::array<uint8_t, kLuksSlotBytes> encode_luks_slot(const LuksSlot& slot) {
    std::array<uint8_t, kLuksSlotBytes> out{};
    store(out.data(), slot.active ? kSlotOn : kSlotOff);
    store(out.data() + 4, slot.iterations);
    std::ranges::copy(slot.salt, out.begin() + 8);
    store(out.data() + 40, slot.material_sector);
    store(out.data() + 44, slot.stripes);
    return out;
}

std::array<uint8_t, kLuksHeaderBytes> encode_luks_header(const LuksHeader& header) {
    std::array<uint8_t, kLuksHeaderBytes> out{};
    const auto put = [&](size_t at, std::string_view text, size_t room) {
        std::copy_n(text.begin(), std::min(text.size(), room - 1), out.begin() + static_cast<ptrdiff_t>(at));
    };
    std::ranges::copy(kMagic, out.begin());
    store(out.data() + kAtVersion, uint16_t{1});
    put(kAtCipher, family_of(header.cipher.alg), kNameBytes);
    put(kAtMode, header.mode_text(), kNameBytes);
    put(kAtHash, name_of(header.hash), kNameBytes);
    store(out.data() + kAtPayload, header.payload_sector);
    store(out.data() + kAtKeyBytes, header.key_bytes);
    std::ranges::copy(header.digest, out.begin() + kAtDigest);
    std::ranges::copy(header.digest_salt, out.begin() + kAtDigestSalt);
    store(out.data() + kAtDigestIterations, header.digest_iterations);
    put(kAtUuid, header.uuid, kUuidBytes);
    for (uint32_t i = 0; i < kLuksSlots; i++) {
        std::ranges::copy(encode_luks_slot(header.slots[i]), out.begin() + luks_slot_offset(i));
    }
    return out;
}

void lay_out_luks(LuksHeader& header) {
    constexpr uint32_t kUnit = kLuksAlignment / kSectorBytes;
    header.key_bytes = header.cipher.key_bytes();
    const auto sectors = static_cast<uint32_t>(material_sectors(header.key_bytes, kLuksStripes));
    const uint32_t spacing = (sectors + kUnit - 1) / kUnit * kUnit;
    for (uint32_t i = 0; i < kLuksSlots; i++) header.slots[i].material_sector = kUnit + i * spacing;
    header.payload_sector = kUnit + kLuksSlots * spacing;
}

}  // namespace gantry::block::crypto
