// Encryption of an image as a whole: opening it, making it, changing who can open it (spec/qcow2.md section 10).

#pragma once

#include <memory>
#include <string>

#include "block/crypto/luks.h"
#include "block/crypto/secrets.h"
#include "block/formats/qcow2/cluster_cipher.h"
#include "block/formats/qcow2/image.h"
#include "block/node.h"

namespace gantry::block::qcow2 {

/// Values of Header::crypt_method.
constexpr uint32_t kCryptNone = 0, kCryptAes = 1, kCryptLuks = 2;

/// The cipher of an image, null when it is not encrypted. `options`: the driver's, with `encrypt` where it was given.
/// `locked`: without a passphrase the metadata may be looked at all the same. Main loop; takes as long as unlocking
/// takes. Errors: those of open_luks(), kInvalid (options do not fit the image), kNotFound (secret).
Task<Result<std::unique_ptr<ClusterCipher>>> open_encryption(Node& file, const Image& image,
                                                             const json::object& options,
                                                             const crypto::Secrets& secrets, bool locked,
                                                             std::string node);

/// What the creation option `encrypt` asks for.
struct NewEncryption {
    uint32_t crypt_method = kCryptNone;
    /// Bytes of the area that header and key material take: whole clusters of the image, counted, and named by the
    /// crypto extension {offset, area_bytes}.
    uint64_t area_bytes = 0;
    crypto::LuksFormat luks;
    crypto::SecretBytes passphrase;
};
/// From a validated QCryptoBlockCreateOptions. The legacy method is refused: it protects nothing.
Result<NewEncryption> new_encryption(const json::object& encrypt, const crypto::Secrets& secrets);
/// The same without a passphrase, for measuring.
Result<uint64_t> new_encryption_bytes(const json::object& encrypt);
/// Writes header and key material into [offset, offset + area_bytes) of `file`; stable when it returns. Main loop.
Task<Result<std::unique_ptr<ClusterCipher>>> write_encryption(NewEncryption wanted, Node& file, uint64_t offset);

/// Changes key slots as a validated QCryptoBlockAmendOptions says. Crash-safe at every write; takes as long as trying
/// passphrases takes. Main loop, drained. `cipher`: of the image, may be null.
Task<Result<>> amend_encryption(ClusterCipher* cipher, const Image& image, Node& file, json::object encrypt,
                                const crypto::Secrets& secrets, bool force, std::string node);

}  // namespace gantry::block::qcow2
