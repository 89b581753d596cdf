// The anti-forensic splitter of LUKS: a key spread over many stripes, all of which are needed to get it back.

#pragma once

#include <cstdint>
#include <span>

#include "block/crypto/hash.h"

namespace gantry::block::crypto {

/// `out` holds `stripes` times the key's length.
void af_split(HashAlg hash, std::span<const uint8_t> key, uint32_t stripes, std::span<uint8_t> out);
/// The reverse; `material` holds `stripes` times the length of `key`.
void af_merge(HashAlg hash, std::span<const uint8_t> material, uint32_t stripes, std::span<uint8_t> key);

}  // namespace gantry::block::crypto
