// Hashes, keys from passphrases, random bytes.

#pragma once

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>

#include "block/crypto/algorithms.h"
#include "block/crypto/secret_bytes.h"

namespace gantry::block::crypto {

constexpr size_t kMaxDigestBytes = 64;

uint32_t digest_bytes(HashAlg hash);
/// The digest of `parts` one after the other; `out` may be shorter than the digest, never longer.
void digest(HashAlg hash, std::initializer_list<std::span<const uint8_t>> parts, std::span<uint8_t> out);

/// PBKDF2 with HMAC (RFC 8018). Computes for as long as `iterations` ask: callers bound them and run it on the pool.
void derive_key(HashAlg hash, std::span<const uint8_t> passphrase, std::span<const uint8_t> salt, uint32_t iterations,
                std::span<uint8_t> out);
/// How many iterations of derive_key for `out_bytes` take `milliseconds` of processor time here; at least 1. Computes
/// for some 40 ms. May exceed what any header can hold: the caller bounds it.
uint64_t derive_iterations(HashAlg hash, size_t out_bytes, uint64_t milliseconds);

/// From the kernel; never fails.
void random_bytes(std::span<uint8_t> out);
/// Without a branch on the contents.
bool equal_secrets(std::span<const uint8_t> a, std::span<const uint8_t> b);

}  // namespace gantry::block::crypto
