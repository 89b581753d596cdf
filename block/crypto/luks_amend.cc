// Changing key slots.

#include <algorithm>
#include <vector>

#include "block/crypto/hash.h"
#include "block/crypto/luks.h"
#include "block/crypto/luks_io.h"
#include "block/crypto/secrets.h"
#include "runtime/blocking_pool.h"
#include "schema/options.h"

namespace gantry::block::crypto {

namespace {

/// How often erased key material is overwritten with random bytes, each time down to the medium.
constexpr int kErasePasses = 3;

std::optional<uint32_t> free_slot(const LuksHeader& header) {
    for (uint32_t i = 0; i < kLuksSlots; i++) {
        if (!header.slots[i].active) return i;
    }
    return std::nullopt;
}

Task<Result<>> write_slot(LuksArea area, const LuksSlot& slot, uint32_t number) {
    const auto bytes = encode_luks_slot(slot);
    CO_CHECK(co_await write_area(area, luks_slot_offset(number), bytes, "key slot"));
    co_return co_await flush_area(area);
}

/// The slot is not in use. Key material first; then salt and iterations; the state, which lies in one sector, last.
Task<Result<>> fill_slot(LuksArea area, LuksVolume& volume, uint32_t number, std::span<const uint8_t> passphrase,
                         uint64_t iter_time_ms) {
    LuksSlot slot = volume.header.slots[number];
    slot.active = false;
    auto sealed = co_await run_blocking(
        [&] { return seal_slot(volume.header, slot, volume.master_key.span(), passphrase, iter_time_ms); });
    CO_TRY(const SecretBytes material, std::move(sealed));
    CO_CHECK(co_await write_area(area, uint64_t{slot.material_sector} * kSectorBytes, material.span(), "key material"));
    CO_CHECK(co_await flush_area(area));
    CO_CHECK(co_await write_slot(area, slot, number));
    slot.active = true;
    CO_CHECK(co_await write_slot(area, slot, number));
    volume.header.slots[number] = slot;
    co_return Result<>();
}

/// The header lets go of the key material before it is overwritten.
Task<Result<>> erase_slot(LuksArea area, LuksVolume& volume, uint32_t number) {
    LuksSlot slot = volume.header.slots[number];
    slot.active = false;
    slot.iterations = 0;
    slot.salt.fill(0);
    CO_CHECK(co_await write_slot(area, slot, number));
    volume.header.slots[number] = slot;
    SecretBytes noise(volume.header.material_bytes());
    for (int pass = 0; pass < kErasePasses; pass++) {
        random_bytes(noise.span());
        CO_CHECK(
            co_await write_area(area, uint64_t{slot.material_sector} * kSectorBytes, noise.span(), "key material"));
        CO_CHECK(co_await flush_area(area));
    }
    co_return Result<>();
}

/// At no moment fewer passphrases open the volume than before and after: while the slot is rewritten the new one is in
/// a spare slot, as far as there is one.
Task<Result<>> replace_slot(LuksArea area, LuksVolume& volume, uint32_t number, std::span<const uint8_t> passphrase,
                            uint64_t iter_time_ms) {
    const std::optional<uint32_t> spare = free_slot(volume.header);
    if (spare) CO_CHECK(co_await fill_slot(area, volume, *spare, passphrase, iter_time_ms));
    CO_CHECK(co_await erase_slot(area, volume, number));
    CO_CHECK(co_await fill_slot(area, volume, number, passphrase, iter_time_ms));
    if (spare) CO_CHECK(co_await erase_slot(area, volume, *spare));
    co_return Result<>();
}

Task<Result<>> activate(LuksArea area, LuksVolume& volume, LuksAmend change, bool force) {
    uint32_t number = 0;
    if (change.slot) {
        number = *change.slot;
        if (volume.header.slots[number].active) {
            if (!force) {
                co_return fail(ErrorKind::kBusy, "Refusing to overwrite active keyslot {} - please erase it first",
                               number);
            }
            co_return co_await replace_slot(area, volume, number, change.new_secret->span(), change.iter_time_ms);
        }
    } else {
        const std::optional<uint32_t> free = free_slot(volume.header);
        if (!free) co_return fail(ErrorKind::kNoSpace, "Can't add a keyslot - all keyslots are in use");
        number = *free;
    }
    co_return co_await fill_slot(area, volume, number, change.new_secret->span(), change.iter_time_ms);
}

Task<Result<>> deactivate_one(LuksArea area, LuksVolume& volume, LuksAmend change, bool force) {
    const uint32_t number = *change.slot;
    const bool active = volume.header.slots[number].active;
    if (change.old_secret) {
        bool matches = false;
        if (active) {
            CO_TRY(const auto key, co_await unlock_slot(area, volume.header, number, change.old_secret->span()));
            matches = key.has_value();
        }
        if (!matches) {
            co_return fail(ErrorKind::kPermission,
                           "Given keyslot {} doesn't contain the given old password for erase operation", number);
        }
    }
    if (!force && !active) {
        co_return fail(ErrorKind::kInvalid, "Given keyslot {} is already erased (inactive)", number);
    }
    if (!force && volume.header.active_slots() == 1) {
        co_return fail(ErrorKind::kPermission,
                       "Attempt to erase the only active keyslot {} which will erase all the data in the image "
                       "irreversibly - refusing operation",
                       number);
    }
    co_return co_await erase_slot(area, volume, number);
}

/// The active slots that `passphrase` opens.
Task<Result<std::vector<uint32_t>>> slots_of(LuksArea area, const LuksVolume& volume,
                                             std::span<const uint8_t> passphrase) {
    std::vector<uint32_t> matching;
    for (uint32_t i = 0; i < kLuksSlots; i++) {
        if (!volume.header.slots[i].active) continue;
        CO_TRY(const auto key, co_await unlock_slot(area, volume.header, i, passphrase));
        if (key) matching.push_back(i);
    }
    co_return matching;
}

Task<Result<>> deactivate_matching(LuksArea area, LuksVolume& volume, SecretBytes passphrase, bool force) {
    CO_TRY(const std::vector<uint32_t> matching, co_await slots_of(area, volume, passphrase.span()));
    if (matching.empty()) {
        co_return fail(ErrorKind::kPermission, "No keyslots match given (old) password for erase operation");
    }
    if (!force && matching.size() == volume.header.active_slots()) {
        co_return fail(ErrorKind::kPermission,
                       "All the active keyslots match the (old) password that was given and erasing them will erase "
                       "all the data in the image irreversibly - refusing operation");
    }
    for (const uint32_t number : matching) CO_CHECK(co_await erase_slot(area, volume, number));
    co_return Result<>();
}

}  // namespace

Result<LuksAmend> luks_amend(const json::object& options, const Secrets& secrets) {
    const schema::Options o(options);
    LuksAmend change;
    change.activate = o.str("state") == "active";
    if (change.activate) {
        if (!o.has("new-secret")) {
            return fail(ErrorKind::kInvalid, "'new-secret' is required to activate a keyslot");
        }
        if (o.has("old-secret")) {
            return fail(ErrorKind::kInvalid, "'old-secret' must not be given when activating keyslots");
        }
    } else {
        if (o.has("new-secret")) {
            return fail(ErrorKind::kInvalid, "'new-secret' must not be given when erasing keyslots");
        }
        if (o.has("iter-time")) {
            return fail(ErrorKind::kInvalid, "'iter-time' must not be given when erasing keyslots");
        }
        if (!o.has("keyslot") && !o.has("old-secret")) {
            return fail(ErrorKind::kInvalid,
                        "To erase keyslot(s), either explicit keyslot index or the password currently contained in "
                        "them must be given");
        }
    }
    if (o.has("keyslot")) {
        const int64_t slot = o.integer("keyslot");
        if (slot < 0 || slot >= kLuksSlots) {
            return fail(ErrorKind::kInvalid, "Invalid keyslot {} specified, must be between 0 and {}", slot,
                        kLuksSlots - 1);
        }
        change.slot = static_cast<uint32_t>(slot);
    }
    const int64_t iter_time = o.integer("iter-time", 2000);
    if (iter_time < 0) return fail(ErrorKind::kInvalid, "Parameter 'iter-time' expects a number of milliseconds");
    change.iter_time_ms = static_cast<uint64_t>(iter_time);
    if (o.has("new-secret")) {
        TRY(change.new_secret, secrets.lookup_text(o.str("new-secret")));
    }
    if (o.has("secret")) {
        TRY(change.secret, secrets.lookup_text(o.str("secret")));
    }
    if (o.has("old-secret")) {
        TRY(change.old_secret, secrets.lookup_text(o.str("old-secret")));
    }
    return change;
}

Task<Result<>> amend_luks(LuksArea area, LuksVolume& volume, LuksAmend change, bool force) {
    if (change.secret) {
        CO_TRY(const std::vector<uint32_t> opened, co_await slots_of(area, volume, change.secret->span()));
        if (opened.empty()) {
            co_return fail(ErrorKind::kPermission,
                           "Failed to retrieve the master key; the secret that was given opens no key slot");
        }
    }
    if (change.activate) co_return co_await activate(area, volume, std::move(change), force);
    if (change.slot) co_return co_await deactivate_one(area, volume, std::move(change), force);
    co_return co_await deactivate_matching(area, volume, std::move(*change.old_secret), force);
}

}  // namespace gantry::block::crypto
