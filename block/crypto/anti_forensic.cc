#include "block/crypto/anti_forensic.h"

#include <algorithm>

#include "runtime/check.h"

namespace gantry::block::crypto {

namespace {

/// Every piece of a digest's length becomes the digest of its number and itself.
void diffuse(HashAlg hash, std::span<uint8_t> block) {
    const size_t piece = digest_bytes(hash);
    uint8_t out[kMaxDigestBytes];
    uint32_t number = 0;
    for (size_t at = 0; at < block.size(); at += piece, number++) {
        const auto part = block.subspan(at, std::min(piece, block.size() - at));
        const uint8_t be[4] = {static_cast<uint8_t>(number >> 24), static_cast<uint8_t>(number >> 16),
                               static_cast<uint8_t>(number >> 8), static_cast<uint8_t>(number)};
        digest(hash, {std::span(be), part}, std::span(out, part.size()));
        std::copy_n(out, part.size(), part.data());
    }
    wipe(out, sizeof out);
}

void add(std::span<uint8_t> to, std::span<const uint8_t> from) {
    for (size_t i = 0; i < to.size(); i++) to[i] = static_cast<uint8_t>(to[i] ^ from[i]);
}

}  // namespace

void af_split(HashAlg hash, std::span<const uint8_t> key, uint32_t stripes, std::span<uint8_t> out) {
    CHECK(stripes > 0 && out.size() == key.size() * stripes, "room for every stripe");
    const auto last = out.last(key.size());
    random_bytes(out.first(out.size() - key.size()));
    SecretBytes sum(key.size());
    for (uint32_t i = 0; i + 1 < stripes; i++) {
        add(sum.span(), out.subspan(size_t{i} * key.size(), key.size()));
        diffuse(hash, sum.span());
    }
    std::ranges::copy(key, last.begin());
    add(last, sum.span());
}

void af_merge(HashAlg hash, std::span<const uint8_t> material, uint32_t stripes, std::span<uint8_t> key) {
    CHECK(stripes > 0 && material.size() == key.size() * stripes, "every stripe");
    std::ranges::fill(key, uint8_t{0});
    for (uint32_t i = 0; i + 1 < stripes; i++) {
        add(key, material.subspan(size_t{i} * key.size(), key.size()));
        diffuse(hash, key);
    }
    add(key, material.last(key.size()));
}

}  // namespace gantry::block::crypto
