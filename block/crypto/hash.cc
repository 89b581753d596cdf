#include "block/crypto/hash.h"

#include <nettle/hmac.h>
#include <nettle/nettle-meta.h>
#include <nettle/pbkdf2.h>
#include <sys/random.h>
#include <time.h>

#include <algorithm>
#include <cerrno>

#include "runtime/check.h"

namespace gantry::block::crypto {

namespace {

const nettle_hash& nettle_of(HashAlg hash) {
    switch (hash) {
        case HashAlg::kMd5:
            return nettle_md5;
        case HashAlg::kSha1:
            return nettle_sha1;
        case HashAlg::kSha224:
            return nettle_sha224;
        case HashAlg::kSha256:
            return nettle_sha256;
        case HashAlg::kSha384:
            return nettle_sha384;
        case HashAlg::kSha512:
            return nettle_sha512;
        case HashAlg::kRipemd160:
            return nettle_ripemd160;
    }
    CHECK(false, "every hash has an implementation");
    std::abort();
}

/// State of any of the hashes.
struct alignas(16) HashState {
    uint8_t bytes[512];
    ~HashState() { wipe(bytes, sizeof bytes); }
};

/// HMAC in the shape that PBKDF2 of the library calls.
struct Hmac {
    const nettle_hash& hash;
    HashState outer, inner, state;

    Hmac(const nettle_hash& h, std::span<const uint8_t> key) : hash(h) {
        CHECK(h.context_size <= sizeof(HashState), "room for the state of every hash");
        nettle_hmac_set_key(&outer, &inner, &state, &hash, key.size(), key.data());
    }
    static void update(void* self, size_t length, const uint8_t* data) {
        auto* hmac = static_cast<Hmac*>(self);
        hmac->hash.update(&hmac->state, length, data);
    }
    static void finish(void* self, size_t length, uint8_t* out) {
        auto* hmac = static_cast<Hmac*>(self);
        nettle_hmac_digest(&hmac->outer, &hmac->inner, &hmac->state, &hmac->hash, length, out);
    }
};

uint64_t cpu_time_ns() {
    timespec now{};
    ::clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

}  // namespace

uint32_t digest_bytes(HashAlg hash) { return nettle_of(hash).digest_size; }

void digest(HashAlg hash, std::initializer_list<std::span<const uint8_t>> parts, std::span<uint8_t> out) {
    const nettle_hash& h = nettle_of(hash);
    CHECK(h.context_size <= sizeof(HashState) && out.size() <= h.digest_size, "a digest, or its beginning");
    HashState state;
    h.init(&state);
    for (const auto& part : parts) h.update(&state, part.size(), part.data());
    h.digest(&state, out.size(), out.data());
}

void derive_key(HashAlg hash, std::span<const uint8_t> passphrase, std::span<const uint8_t> salt, uint32_t iterations,
                std::span<uint8_t> out) {
    const nettle_hash& h = nettle_of(hash);
    Hmac hmac(h, passphrase);
    nettle_pbkdf2(&hmac, Hmac::update, Hmac::finish, h.digest_size, iterations, salt.size(), salt.data(), out.size(),
                  out.data());
}

uint64_t derive_iterations(HashAlg hash, size_t out_bytes, uint64_t milliseconds) {
    constexpr uint64_t kEnoughNs = 20'000'000;
    SecretBytes out(out_bytes);
    const SecretBytes salt(32);
    // Doubled until the clock tells the difference between work and noise.
    for (uint32_t iterations = 1 << 10;; iterations *= 2) {
        const uint64_t begin = cpu_time_ns();
        derive_key(hash, std::span<const uint8_t>(), salt.span(), iterations, out.span());
        const uint64_t taken = cpu_time_ns() - begin;
        if (taken < kEnoughNs && iterations < (1u << 30)) continue;
        const auto wanted =
            static_cast<__uint128_t>(iterations) * milliseconds * 1'000'000 / std::max<uint64_t>(taken, 1);
        return static_cast<uint64_t>(std::clamp<__uint128_t>(wanted, 1, UINT64_MAX));
    }
}

void random_bytes(std::span<uint8_t> out) {
    while (!out.empty()) {
        const ssize_t got = ::getrandom(out.data(), out.size(), 0);
        CHECK(got > 0 || errno == EINTR, "the kernel gives random bytes");
        if (got > 0) out = out.subspan(static_cast<size_t>(got));
    }
}

bool equal_secrets(std::span<const uint8_t> a, std::span<const uint8_t> b) {
    if (a.size() != b.size()) return false;
    uint8_t difference = 0;
    for (size_t i = 0; i < a.size(); i++) difference = static_cast<uint8_t>(difference | (a[i] ^ b[i]));
    return difference == 0;
}

}  // namespace gantry::block::crypto
