// SectorCipher: sectors of 512 bytes, encrypted in place.

#pragma once

#include <cstdint>
#include <memory>
#include <span>

#include "block/crypto/algorithms.h"

namespace gantry::block::crypto {

constexpr uint32_t kSectorBytes = 512;

/// Keyed and constant: any thread, several at once. Key material is wiped with it.
class SectorCipher {
  public:
    /// kInvalid when the key has the wrong length; kUnsupported for combinations that do not exist.
    static Result<std::unique_ptr<SectorCipher>> create(const CipherSpec& spec, std::span<const uint8_t> key);
    virtual ~SectorCipher() = default;

    /// `data`: whole sectors; the first one has the number `sector`.
    virtual void encrypt(uint64_t sector, std::span<uint8_t> data) const = 0;
    virtual void decrypt(uint64_t sector, std::span<uint8_t> data) const = 0;
};

/// CBC without sectors, whole blocks of 16 bytes in place: what wraps secrets.
Result<> decrypt_aes256_cbc(std::span<const uint8_t> key, std::span<const uint8_t> iv, std::span<uint8_t> data);

}  // namespace gantry::block::crypto
