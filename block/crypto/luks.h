// LUKS1 volumes: open with a passphrase, create, change key slots.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>

#include "block/crypto/cipher.h"
#include "block/crypto/luks_header.h"
#include "block/crypto/secret_bytes.h"
#include "runtime/error.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::block {
class Node;
}

namespace gantry::block::crypto {

class Secrets;

/// Where header and key material lie: [offset, offset + length) of a node. Sectors of the header count from `offset`.
struct LuksArea {
    Node* node = nullptr;
    uint64_t offset = 0;
    uint64_t length = 0;
};

/// An unlocked volume. The cipher may be used by any thread; the rest is the main loop's.
struct LuksVolume {
    LuksHeader header;
    SecretBytes master_key;
    std::unique_ptr<SectorCipher> cipher;
};

/// What a new volume is to be.
struct LuksFormat {
    CipherSpec cipher;
    HashAlg hash = HashAlg::kSha256;
    uint64_t iter_time_ms = 2000;
};

/// One change of key slots, as QCryptoBlockAmendOptionsLUKS describes it.
struct LuksAmend {
    bool activate = false;
    std::optional<SecretBytes> new_secret, old_secret;
    std::optional<SecretBytes> secret;  // must open the volume as it is
    std::optional<uint32_t> slot;
    uint64_t iter_time_ms = 2000;
};

/// From a validated QCryptoBlockCreateOptionsLUKS; kInvalid / kUnsupported for combinations that do not exist.
Result<LuksFormat> luks_format(const json::object& options);
/// Bytes of header and key material: the least LuksArea::length for create_luks.
uint64_t luks_area_bytes(const LuksFormat& format);
/// From a validated QCryptoBlockAmendOptionsLUKS, with the reference's refusals. `force`: also what destroys the last
/// key or an active slot; amend_luks() checks that again.
Result<LuksAmend> luks_amend(const json::object& options, const Secrets& secrets);

/// The header alone: what it says needs no passphrase.
Task<Result<LuksHeader>> load_luks_header(LuksArea area);
/// Main loop; computation runs on the blocking pool. Tries every active slot. Errors: those of the header, kPermission
/// ("Invalid password, cannot unlock any keyslot"), kIo.
Task<Result<LuksVolume>> open_luks(LuksArea area, SecretBytes passphrase);
/// A new volume with a random key, `passphrase` in slot 0. The area is written whole (so that it exists in the file)
/// and flushed before this returns; the header last, so that a crash leaves no volume or a complete one.
Task<Result<LuksVolume>> create_luks(LuksArea area, LuksFormat format, SecretBytes passphrase);
/// Crash-safe at every write: key material is stable before the header names it, and overwritten only once the header
/// does not any more. A slot that is replaced (`force`) keeps the new passphrase in a spare slot meanwhile. On success
/// `volume.header` is what is stored.
Task<Result<>> amend_luks(LuksArea area, LuksVolume& volume, LuksAmend change, bool force);

/// QCryptoBlockInfoLUKS.
json::object luks_info(const LuksHeader& header);

}  // namespace gantry::block::crypto
