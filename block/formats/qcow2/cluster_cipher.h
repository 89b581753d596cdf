// ClusterCipher: the encryption of guest data in an image (spec/qcow2.md section 10).

#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "block/crypto/luks.h"
#include "runtime/error.h"
#include "runtime/iovec.h"
#include "schema/value.h"

namespace gantry::block::qcow2 {

/// In place, whole sectors of 512 bytes. Computation only; any thread, several at once.
class ClusterCipher {
  public:
    virtual ~ClusterCipher() = default;
    /// `guest` and `host`: offsets of the first byte; the method decides which of them numbers the sectors.
    virtual Result<> encrypt(uint64_t guest, uint64_t host, const IoVec& iov) = 0;
    virtual Result<> decrypt(uint64_t guest, uint64_t host, const IoVec& iov) = 0;

    /// ImageInfoSpecificQCow2Encryption. Main loop.
    virtual json::object info() const = 0;
    /// Null unless it is an unlocked LUKS volume. Main loop.
    virtual crypto::LuksVolume* luks() { return nullptr; }
};

/// Method 2: sectors are numbered by their place in the file.
std::unique_ptr<ClusterCipher> luks_cipher(crypto::LuksVolume volume);
/// Method 1: AES-128-CBC under the passphrase itself; sectors are numbered by their place on the guest's disk. Any
/// passphrase "works": a wrong one gives noise.
Result<std::unique_ptr<ClusterCipher>> legacy_cipher(const crypto::SecretBytes& passphrase);
/// Neither reads nor writes (kPermission); tells what `info` says.
std::unique_ptr<ClusterCipher> locked_cipher(std::string node, json::object info);

}  // namespace gantry::block::qcow2
