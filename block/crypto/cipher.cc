#include "block/crypto/cipher.h"

#include <nettle/aes.h>
#include <nettle/cast128.h>
#include <nettle/cbc.h>
#include <nettle/ctr.h>
#include <nettle/serpent.h>
#include <nettle/twofish.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "block/crypto/hash.h"
#include "block/crypto/secret_bytes.h"
#include "runtime/check.h"

namespace gantry::block::crypto {

namespace {

constexpr size_t kMaxBlock = 16;
/// Sectors whose tweaks are computed together: enough for the cipher to run at full width, small enough for the stack.
constexpr size_t kBatch = 8;

// Ciphers with their keys set for both directions. `encrypt` and `decrypt` take whole blocks, in place.

template <class Context, auto kSetEncrypt, auto kInvert, auto kEncrypt, auto kDecrypt, auto kCbcEncrypt>
class Aes {
  public:
    static constexpr size_t kBlock = AES_BLOCK_SIZE;
    explicit Aes(std::span<const uint8_t> key) {
        kSetEncrypt(&encrypt_, key.data());
        kInvert(&decrypt_, &encrypt_);
    }
    ~Aes() {
        wipe(&encrypt_, sizeof encrypt_);
        wipe(&decrypt_, sizeof decrypt_);
    }
    void encrypt(uint8_t* data, size_t bytes) const { kEncrypt(&encrypt_, bytes, data, data); }
    void decrypt(uint8_t* data, size_t bytes) const { kDecrypt(&decrypt_, bytes, data, data); }
    void chain_encrypt(uint8_t* iv, uint8_t* data, size_t bytes) const {
        kCbcEncrypt(&encrypt_, iv, bytes, data, data);
    }
    void chain_decrypt(uint8_t* iv, uint8_t* data, size_t bytes) const {
        nettle_cbc_decrypt(&decrypt_, reinterpret_cast<nettle_cipher_func*>(kDecrypt), kBlock, iv, bytes, data, data);
    }
    void ctr(uint8_t* iv, uint8_t* data, size_t bytes) const {
        nettle_ctr_crypt(&encrypt_, reinterpret_cast<nettle_cipher_func*>(kEncrypt), kBlock, iv, bytes, data, data);
    }

  private:
    Context encrypt_, decrypt_;
};
using Aes128 = Aes<aes128_ctx, nettle_aes128_set_encrypt_key, nettle_aes128_invert_key, nettle_aes128_encrypt,
                   nettle_aes128_decrypt, nettle_cbc_aes128_encrypt>;
using Aes192 = Aes<aes192_ctx, nettle_aes192_set_encrypt_key, nettle_aes192_invert_key, nettle_aes192_encrypt,
                   nettle_aes192_decrypt, nettle_cbc_aes192_encrypt>;
using Aes256 = Aes<aes256_ctx, nettle_aes256_set_encrypt_key, nettle_aes256_invert_key, nettle_aes256_encrypt,
                   nettle_aes256_decrypt, nettle_cbc_aes256_encrypt>;

template <class Context, size_t kBlockBytes, auto kSetKey, auto kEncrypt, auto kDecrypt>
class OneKey {
  public:
    static constexpr size_t kBlock = kBlockBytes;
    explicit OneKey(std::span<const uint8_t> key) { (void)kSetKey(&context_, key.size(), key.data()); }
    ~OneKey() { wipe(&context_, sizeof context_); }
    void encrypt(uint8_t* data, size_t bytes) const { kEncrypt(&context_, bytes, data, data); }
    void decrypt(uint8_t* data, size_t bytes) const { kDecrypt(&context_, bytes, data, data); }
    void chain_encrypt(uint8_t* iv, uint8_t* data, size_t bytes) const {
        nettle_cbc_encrypt(&context_, reinterpret_cast<nettle_cipher_func*>(kEncrypt), kBlock, iv, bytes, data, data);
    }
    void chain_decrypt(uint8_t* iv, uint8_t* data, size_t bytes) const {
        nettle_cbc_decrypt(&context_, reinterpret_cast<nettle_cipher_func*>(kDecrypt), kBlock, iv, bytes, data, data);
    }
    void ctr(uint8_t* iv, uint8_t* data, size_t bytes) const {
        nettle_ctr_crypt(&context_, reinterpret_cast<nettle_cipher_func*>(kEncrypt), kBlock, iv, bytes, data, data);
    }

  private:
    Context context_;
};
using Serpent =
    OneKey<serpent_ctx, SERPENT_BLOCK_SIZE, nettle_serpent_set_key, nettle_serpent_encrypt, nettle_serpent_decrypt>;
using Twofish =
    OneKey<twofish_ctx, TWOFISH_BLOCK_SIZE, nettle_twofish_set_key, nettle_twofish_encrypt, nettle_twofish_decrypt>;
using Cast5 =
    OneKey<cast128_ctx, CAST128_BLOCK_SIZE, nettle_cast5_set_key, nettle_cast128_encrypt, nettle_cast128_decrypt>;

/// The vector of each sector.
template <class Cipher>
class Ivs {
  public:
    Ivs(const CipherSpec& spec, std::span<const uint8_t> key) : generator_(spec.ivgen) {
        if (spec.ivgen != IvGenerator::kEssiv) return;
        SecretBytes salt(digest_bytes(*spec.ivgen_hash));
        digest(*spec.ivgen_hash, {key}, salt.span());
        // The cipher is of the same family; its key is as long as the digest.
        if constexpr (std::is_same_v<Cipher, Aes128> || std::is_same_v<Cipher, Aes192> ||
                      std::is_same_v<Cipher, Aes256>) {
            if (salt.size() == 16) essiv128_ = std::make_unique<Aes128>(salt.span());
            if (salt.size() == 24) essiv192_ = std::make_unique<Aes192>(salt.span());
            if (salt.size() == 32) essiv256_ = std::make_unique<Aes256>(salt.span());
        } else {
            essiv_ = std::make_unique<Cipher>(salt.span());
        }
    }

    /// `ivs`: a block for each sector from `sector` on.
    void make(uint64_t sector, uint8_t* ivs, size_t count) const {
        const size_t block = Cipher::kBlock;
        std::memset(ivs, 0, block * count);
        for (size_t i = 0; i < count; i++) {
            uint64_t number = sector + i;
            if (generator_ == IvGenerator::kPlain) number &= 0xffffffff;
            for (size_t b = 0; b < 8; b++) ivs[i * block + b] = static_cast<uint8_t>(number >> (8 * b));
        }
        if (essiv128_) essiv128_->encrypt(ivs, block * count);
        if (essiv192_) essiv192_->encrypt(ivs, block * count);
        if (essiv256_) essiv256_->encrypt(ivs, block * count);
        if (essiv_) essiv_->encrypt(ivs, block * count);
    }

  private:
    IvGenerator generator_;
    std::unique_ptr<Aes128> essiv128_;
    std::unique_ptr<Aes192> essiv192_;
    std::unique_ptr<Aes256> essiv256_;
    std::unique_ptr<Cipher> essiv_;
};

template <class Cipher>
class EcbSectors final : public SectorCipher {
  public:
    EcbSectors(const CipherSpec&, std::span<const uint8_t> key) : cipher_(key) {}
    void encrypt(uint64_t, std::span<uint8_t> data) const override { cipher_.encrypt(data.data(), data.size()); }
    void decrypt(uint64_t, std::span<uint8_t> data) const override { cipher_.decrypt(data.data(), data.size()); }

  private:
    Cipher cipher_;
};

/// CBC and CTR: one vector for each sector.
template <class Cipher>
class ChainedSectors final : public SectorCipher {
  public:
    ChainedSectors(const CipherSpec& spec, std::span<const uint8_t> key)
        : cipher_(key), ivs_(spec, key), counter_(spec.mode == CipherMode::kCtr) {}
    void encrypt(uint64_t sector, std::span<uint8_t> data) const override {
        each(sector, data, [this](uint8_t* iv, uint8_t* at) {
            counter_ ? cipher_.ctr(iv, at, kSectorBytes) : cipher_.chain_encrypt(iv, at, kSectorBytes);
        });
    }
    void decrypt(uint64_t sector, std::span<uint8_t> data) const override {
        each(sector, data, [this](uint8_t* iv, uint8_t* at) {
            counter_ ? cipher_.ctr(iv, at, kSectorBytes) : cipher_.chain_decrypt(iv, at, kSectorBytes);
        });
    }

  private:
    template <class Fn>
    void each(uint64_t sector, std::span<uint8_t> data, Fn fn) const {
        CHECK(data.size() % kSectorBytes == 0, "whole sectors");
        uint8_t iv[kMaxBlock];
        for (size_t at = 0; at < data.size(); at += kSectorBytes, sector++) {
            ivs_.make(sector, iv, 1);
            fn(iv, data.data() + at);
        }
    }
    Cipher cipher_;
    Ivs<Cipher> ivs_;
    bool counter_;
};

/// XTS (IEEE 1619): the library's own takes one sector and one block of tweak at a time; here a batch of sectors has
/// its tweaks computed first, so that the block cipher gets kilobytes at once and runs at its full width.
template <class Cipher>
class XtsSectors final : public SectorCipher {
  public:
    XtsSectors(const CipherSpec& spec, std::span<const uint8_t> key)
        : data_(key.first(key.size() / 2)), tweak_(key.last(key.size() / 2)), ivs_(spec, key) {}
    void encrypt(uint64_t sector, std::span<uint8_t> data) const override {
        each(sector, data, [this](uint8_t* at, size_t bytes) { data_.encrypt(at, bytes); });
    }
    void decrypt(uint64_t sector, std::span<uint8_t> data) const override {
        each(sector, data, [this](uint8_t* at, size_t bytes) { data_.decrypt(at, bytes); });
    }

  private:
    static constexpr size_t kBlocks = kSectorBytes / 16;
    struct Tweak {
        uint64_t low, high;
        /// Multiplied by x in GF(2^128).
        void step() {
            const uint64_t carry = (high >> 63) * 0x87;
            high = (high << 1) | (low >> 63);
            low = (low << 1) ^ carry;
        }
    };

    static void mix(uint8_t* data, const Tweak* tweaks, size_t bytes) {
        const auto* mask = reinterpret_cast<const uint8_t*>(tweaks);
        for (size_t i = 0; i < bytes; i += 8) {
            uint64_t a, b;
            std::memcpy(&a, data + i, 8);
            std::memcpy(&b, mask + i, 8);
            a ^= b;
            std::memcpy(data + i, &a, 8);
        }
    }

    template <class Fn>
    void each(uint64_t sector, std::span<uint8_t> data, Fn fn) const {
        CHECK(data.size() % kSectorBytes == 0, "whole sectors");
        Tweak tweaks[kBatch * kBlocks];
        Tweak first[kBatch];
        for (size_t at = 0; at < data.size();) {
            const size_t bytes = std::min(data.size() - at, kBatch * kSectorBytes);
            const size_t count = bytes / kSectorBytes;
            ivs_.make(sector, reinterpret_cast<uint8_t*>(first), count);
            tweak_.encrypt(reinterpret_cast<uint8_t*>(first), count * sizeof(Tweak));
            for (size_t i = 0; i < count; i++) {
                Tweak tweak = first[i];
                for (size_t b = 0; b < kBlocks; b++, tweak.step()) tweaks[i * kBlocks + b] = tweak;
            }
            mix(data.data() + at, tweaks, bytes);
            fn(data.data() + at, bytes);
            mix(data.data() + at, tweaks, bytes);
            at += bytes;
            sector += count;
        }
        wipe(first, sizeof first);
        wipe(tweaks, sizeof tweaks);
    }

    Cipher data_, tweak_;
    Ivs<Cipher> ivs_;
};

template <class Cipher>
std::unique_ptr<SectorCipher> of_mode(const CipherSpec& spec, std::span<const uint8_t> key) {
    if (spec.mode == CipherMode::kEcb) return std::make_unique<EcbSectors<Cipher>>(spec, key);
    if constexpr (Cipher::kBlock == 16) {
        if (spec.mode == CipherMode::kXts) return std::make_unique<XtsSectors<Cipher>>(spec, key);
    }
    return std::make_unique<ChainedSectors<Cipher>>(spec, key);
}

}  // namespace

Result<std::unique_ptr<SectorCipher>> SectorCipher::create(const CipherSpec& spec, std::span<const uint8_t> key) {
    static_assert(std::endian::native == std::endian::little, "tweaks are computed as little-endian words");
    CHECK_OK(spec.validate());
    if (key.size() != spec.key_bytes()) {
        return fail(ErrorKind::kInvalid, "Algorithm '{}' with key size {} bytes not supported; {} needs {}",
                    family_of(spec.alg), key.size(), name_of(spec.mode), spec.key_bytes());
    }
    switch (spec.alg) {
        case CipherAlg::kAes128:
            return of_mode<Aes128>(spec, key);
        case CipherAlg::kAes192:
            return of_mode<Aes192>(spec, key);
        case CipherAlg::kAes256:
            return of_mode<Aes256>(spec, key);
        case CipherAlg::kCast5_128:
            return of_mode<Cast5>(spec, key);
        case CipherAlg::kSerpent128:
        case CipherAlg::kSerpent192:
        case CipherAlg::kSerpent256:
            return of_mode<Serpent>(spec, key);
        case CipherAlg::kTwofish128:
        case CipherAlg::kTwofish192:
        case CipherAlg::kTwofish256:
            return of_mode<Twofish>(spec, key);
    }
    return fail(ErrorKind::kUnsupported, "Algorithm not supported");
}

Result<> decrypt_aes256_cbc(std::span<const uint8_t> key, std::span<const uint8_t> iv, std::span<uint8_t> data) {
    if (key.size() != AES256_KEY_SIZE) {
        return fail(ErrorKind::kInvalid, "Key should be {} bytes in length", AES256_KEY_SIZE);
    }
    if (iv.size() != AES_BLOCK_SIZE) {
        return fail(ErrorKind::kInvalid, "IV should be {} bytes in length not {}", AES_BLOCK_SIZE, iv.size());
    }
    if (data.size() % AES_BLOCK_SIZE != 0) {
        return fail(ErrorKind::kInvalid, "Length {} must be a multiple of block size {}", data.size(), AES_BLOCK_SIZE);
    }
    const Aes256 cipher(key);
    uint8_t chain[AES_BLOCK_SIZE];
    std::ranges::copy(iv, chain);
    cipher.chain_decrypt(chain, data.data(), data.size());
    return {};
}

}  // namespace gantry::block::crypto
