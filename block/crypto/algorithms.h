// Names and sizes of ciphers, modes, hashes and generators of initialisation vectors.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "runtime/error.h"

namespace gantry::block::crypto {

enum class CipherAlg : uint8_t {
    kAes128,
    kAes192,
    kAes256,
    kCast5_128,
    kSerpent128,
    kSerpent192,
    kSerpent256,
    kTwofish128,
    kTwofish192,
    kTwofish256,
};
enum class CipherMode : uint8_t { kEcb, kCbc, kXts, kCtr };
enum class IvGenerator : uint8_t { kPlain, kPlain64, kEssiv };
enum class HashAlg : uint8_t { kMd5, kSha1, kSha224, kSha256, kSha384, kSha512, kRipemd160 };

/// As the QMP schema spells them: "aes-256", "xts", "plain64", "sha256".
std::string_view name_of(CipherAlg alg);
std::string_view name_of(CipherMode mode);
std::string_view name_of(IvGenerator generator);
std::string_view name_of(HashAlg hash);
/// Errors: kUnsupported, "Algorithm 'x' not supported" and the like.
Result<CipherAlg> cipher_named(std::string_view name);
Result<CipherMode> mode_named(std::string_view name);
Result<IvGenerator> iv_generator_named(std::string_view name);
Result<HashAlg> hash_named(std::string_view name);

/// What a header says may be anything: the first 32 characters, the unprintable ones replaced.
std::string printable(std::string_view text);

/// "aes", "serpent", "twofish", "cast5": what a LUKS header calls the cipher; the key's length tells the rest.
std::string_view family_of(CipherAlg alg);
/// The cipher of a family with keys of `key_bytes`; none: nullopt.
std::optional<CipherAlg> cipher_of_family(std::string_view family, size_t key_bytes);
uint32_t cipher_key_bytes(CipherAlg alg);
uint32_t cipher_block_bytes(CipherAlg alg);

/// How sectors are encrypted.
struct CipherSpec {
    CipherAlg alg = CipherAlg::kAes256;
    CipherMode mode = CipherMode::kXts;
    IvGenerator ivgen = IvGenerator::kPlain64;
    std::optional<HashAlg> ivgen_hash;  // of essiv

    /// Key bytes: two keys for xts.
    uint32_t key_bytes() const { return cipher_key_bytes(alg) * (mode == CipherMode::kXts ? 2 : 1); }
    /// Combinations that do not exist: xts of a cipher with short blocks, essiv without a cipher of the hash's size.
    Result<> validate() const;
    bool operator==(const CipherSpec&) const = default;
};

}  // namespace gantry::block::crypto
