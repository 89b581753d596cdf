#include "block/crypto/luks.h"

#include <algorithm>

#include "block/crypto/anti_forensic.h"
#include "block/crypto/hash.h"
#include "block/crypto/luks_io.h"
#include "runtime/blocking_pool.h"
#include "schema/options.h"

namespace gantry::block::crypto {

namespace {

std::string random_uuid() {
    std::array<uint8_t, 16> b{};
    random_bytes(b);
    b[6] = static_cast<uint8_t>((b[6] & 0x0f) | 0x40);  // version 4: random
    b[8] = static_cast<uint8_t>((b[8] & 0x3f) | 0x80);
    std::string out;
    for (size_t i = 0; i < b.size(); i++) {
        if (i == 4 || i == 6 || i == 8 || i == 10) out += '-';
        out += fmt::format("{:02x}", b[i]);
    }
    return out;
}

void check_digest(const LuksHeader& header, std::span<const uint8_t> key, std::span<uint8_t> out) {
    derive_key(header.hash, key, header.digest_salt, header.digest_iterations, out);
}

/// The master key if `passphrase` opens the slot. `material` is decrypted in place. Computes.
Result<std::optional<SecretBytes>> try_slot(const LuksHeader& header, const LuksSlot& slot, SecretBytes material,
                                            std::span<const uint8_t> passphrase) {
    SecretBytes slot_key(header.key_bytes);
    derive_key(header.hash, passphrase, slot.salt, slot.iterations, slot_key.span());
    TRY(const auto cipher, SectorCipher::create(header.cipher, slot_key.span()));
    cipher->decrypt(0, material.span());
    SecretBytes key(header.key_bytes);
    af_merge(header.hash, material.span().first(size_t{header.key_bytes} * slot.stripes), slot.stripes, key.span());
    std::array<uint8_t, kLuksDigestBytes> digest{};
    check_digest(header, key.span(), digest);
    if (!equal_secrets(digest, header.digest)) return std::optional<SecretBytes>();
    return std::optional(std::move(key));
}

}  // namespace

Result<uint32_t> iterations_for(HashAlg hash, size_t bytes, uint64_t milliseconds) {
    const uint64_t found = derive_iterations(hash, bytes, milliseconds);
    if (found > kLuksMaxIterations) {
        return fail(ErrorKind::kTooLarge,
                    "iter-time {} ms is too long: {} iterations of {} on this machine, and more than {} are not used",
                    milliseconds, found, name_of(hash), kLuksMaxIterations);
    }
    return std::max(static_cast<uint32_t>(found), kLuksMinIterations);
}

Result<SecretBytes> seal_slot(const LuksHeader& header, LuksSlot& slot, std::span<const uint8_t> master_key,
                              std::span<const uint8_t> passphrase, uint64_t iter_time_ms) {
    TRY(slot.iterations, iterations_for(header.hash, header.key_bytes, iter_time_ms));
    random_bytes(slot.salt);
    slot.stripes = kLuksStripes;
    SecretBytes slot_key(header.key_bytes);
    derive_key(header.hash, passphrase, slot.salt, slot.iterations, slot_key.span());
    TRY(const auto cipher, SectorCipher::create(header.cipher, slot_key.span()));
    SecretBytes material(header.material_bytes());
    af_split(header.hash, master_key, slot.stripes, material.span().first(size_t{header.key_bytes} * slot.stripes));
    cipher->encrypt(0, material.span());
    return material;
}

Task<Result<std::optional<SecretBytes>>> unlock_slot(LuksArea area, const LuksHeader& header, uint32_t number,
                                                     std::span<const uint8_t> passphrase) {
    const LuksSlot& slot = header.slots[number];
    SecretBytes material(header.material_bytes());
    CO_CHECK(co_await read_area(area, uint64_t{slot.material_sector} * kSectorBytes, material.span(), "key material"));
    auto opened = co_await run_blocking([&] { return try_slot(header, slot, std::move(material), passphrase); });
    co_return opened;
}

Result<LuksFormat> luks_format(const json::object& options) {
    const schema::Options o(options);
    LuksFormat format;
    if (o.has("cipher-alg")) {
        TRY(format.cipher.alg, cipher_named(o.str("cipher-alg")));
    }
    if (o.has("cipher-mode")) {
        TRY(format.cipher.mode, mode_named(o.str("cipher-mode")));
    }
    if (o.has("ivgen-alg")) {
        TRY(format.cipher.ivgen, iv_generator_named(o.str("ivgen-alg")));
    }
    if (o.has("ivgen-hash-alg")) {
        TRY(format.cipher.ivgen_hash, hash_named(o.str("ivgen-hash-alg")));
    }
    if (o.has("hash-alg")) {
        TRY(format.hash, hash_named(o.str("hash-alg")));
    }
    if (format.cipher.ivgen == IvGenerator::kEssiv) {
        if (!format.cipher.ivgen_hash) format.cipher.ivgen_hash = HashAlg::kSha256;
    } else {
        format.cipher.ivgen_hash.reset();
    }
    CHECK_OK(format.cipher.validate());
    const int64_t iter_time = o.integer("iter-time", 2000);
    if (iter_time < 0) return fail(ErrorKind::kInvalid, "Parameter 'iter-time' expects a number of milliseconds");
    format.iter_time_ms = static_cast<uint64_t>(iter_time);
    return format;
}

uint64_t luks_area_bytes(const LuksFormat& format) {
    LuksHeader header;
    header.cipher = format.cipher;
    lay_out_luks(header);
    return uint64_t{header.payload_sector} * kSectorBytes;
}

Task<Result<LuksHeader>> load_luks_header(LuksArea area) {
    std::array<uint8_t, kLuksHeaderBytes> head{};
    CO_CHECK(co_await read_area(area, 0, head, "LUKS header"));
    co_return decode_luks_header(head);
}

Task<Result<LuksVolume>> open_luks(LuksArea area, SecretBytes passphrase) {
    LuksVolume volume;
    CO_TRY(volume.header, co_await load_luks_header(area));
    for (uint32_t i = 0; i < kLuksSlots; i++) {
        if (!volume.header.slots[i].active) continue;
        CO_TRY(auto key, co_await unlock_slot(area, volume.header, i, passphrase.span()));
        if (!key) continue;
        volume.master_key = std::move(*key);
        CO_TRY(volume.cipher, SectorCipher::create(volume.header.cipher, volume.master_key.span()));
        co_return std::move(volume);
    }
    co_return fail(ErrorKind::kPermission, "Invalid password, cannot unlock any keyslot; {} of {} are in use",
                   volume.header.active_slots(), kLuksSlots);
}

Task<Result<LuksVolume>> create_luks(LuksArea area, LuksFormat format, SecretBytes passphrase) {
    const uint64_t bytes = luks_area_bytes(format);
    if (area.length < bytes) {
        co_return fail(ErrorKind::kInvalid, "A LUKS header and its key slots need {} bytes; there are {}", bytes,
                       area.length);
    }
    LuksVolume volume;
    LuksHeader& h = volume.header;
    h.cipher = format.cipher;
    h.hash = format.hash;
    h.uuid = random_uuid();
    lay_out_luks(h);
    volume.master_key = SecretBytes(h.key_bytes);
    random_bytes(volume.master_key.span());
    random_bytes(h.digest_salt);
    CO_TRY(volume.cipher, SectorCipher::create(h.cipher, volume.master_key.span()));

    SecretBytes material;
    Result<> sealed = co_await run_blocking([&]() -> Result<> {
        // An eighth of the time goes into the check of the key, as others do it.
        TRY(h.digest_iterations, iterations_for(h.hash, kLuksDigestBytes, format.iter_time_ms / 8));
        check_digest(h, volume.master_key.span(), h.digest);
        TRY(material, seal_slot(h, h.slots[0], volume.master_key.span(), passphrase.span(), format.iter_time_ms));
        return {};
    });
    CO_CHECK(std::move(sealed));
    h.slots[0].active = true;

    CO_CHECK(co_await zero_area(area));
    CO_CHECK(co_await write_area(area, uint64_t{h.slots[0].material_sector} * kSectorBytes, material.span(),
                                 "key material"));
    CO_CHECK(co_await flush_area(area));
    const auto head = encode_luks_header(h);
    CO_CHECK(co_await write_area(area, 0, head, "LUKS header"));
    CO_CHECK(co_await flush_area(area));
    co_return std::move(volume);
}

json::object luks_info(const LuksHeader& h) {
    json::array slots;
    for (const LuksSlot& s : h.slots) {
        json::object slot{{"active", s.active}};
        if (s.active) {
            slot["iters"] = s.iterations;
            slot["stripes"] = s.stripes;
        }
        slot["key-offset"] = uint64_t{s.material_sector} * kSectorBytes;
        slots.push_back(std::move(slot));
    }
    json::object out{{"cipher-alg", name_of(h.cipher.alg)},
                     {"cipher-mode", name_of(h.cipher.mode)},
                     {"ivgen-alg", name_of(h.cipher.ivgen)}};
    if (h.cipher.ivgen == IvGenerator::kEssiv && h.cipher.ivgen_hash) {
        out["ivgen-hash-alg"] = name_of(*h.cipher.ivgen_hash);
    }
    out["hash-alg"] = name_of(h.hash);
    out["payload-offset"] = uint64_t{h.payload_sector} * kSectorBytes;
    out["master-key-iters"] = h.digest_iterations;
    out["uuid"] = h.uuid;
    out["slots"] = std::move(slots);
    return out;
}

}  // namespace gantry::block::crypto
