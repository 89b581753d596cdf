// Sector ciphers, key derivation and the anti-forensic splitter: known answers, and what must hold for all of them.

#include <nettle/xts.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <numeric>
#include <random>

#include "block/crypto/anti_forensic.h"
#include "block/crypto/cipher.h"
#include "block/crypto/hash.h"
#include "runtime/error.h"

namespace gantry::block::crypto {

namespace {

using Bytes = std::vector<uint8_t>;

std::string hex(std::span<const uint8_t> bytes) {
    std::string out;
    for (const uint8_t b : bytes) out += fmt::format("{:02x}", b);
    return out;
}
Bytes from_hex(std::string_view text) {
    Bytes out;
    for (size_t i = 0; i + 1 < text.size(); i += 2) {
        out.push_back(static_cast<uint8_t>(std::stoi(std::string(text.substr(i, 2)), nullptr, 16)));
    }
    return out;
}
Bytes counting(size_t size, unsigned factor = 1) {
    Bytes out(size);
    for (size_t i = 0; i < size; i++) out[i] = static_cast<uint8_t>(i * factor);
    return out;
}
std::string sha256_of(std::span<const uint8_t> bytes) {
    uint8_t out[32];
    digest(HashAlg::kSha256, {bytes}, out);
    return hex(out);
}
std::unique_ptr<SectorCipher> make(CipherSpec spec, std::span<const uint8_t> key) {
    auto cipher = SectorCipher::create(spec, key);
    if (!cipher) throw std::runtime_error(cipher.error().message());
    return std::move(*cipher);
}
std::span<const uint8_t> bytes_of(std::string_view text) {
    return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::vector<CipherSpec> every_spec() {
    std::vector<CipherSpec> out;
    for (int alg = 0; alg <= static_cast<int>(CipherAlg::kTwofish256); alg++) {
        for (const CipherMode mode : {CipherMode::kEcb, CipherMode::kCbc, CipherMode::kXts, CipherMode::kCtr}) {
            for (const IvGenerator iv : {IvGenerator::kPlain, IvGenerator::kPlain64, IvGenerator::kEssiv}) {
                CipherSpec spec{static_cast<CipherAlg>(alg), mode, iv, {}};
                if (iv == IvGenerator::kEssiv) spec.ivgen_hash = HashAlg::kSha256;
                if (spec.validate()) out.push_back(spec);
            }
        }
    }
    return out;
}

std::string describe(const CipherSpec& spec) {
    return fmt::format("{}-{}-{}", name_of(spec.alg), name_of(spec.mode), name_of(spec.ivgen));
}

}  // namespace

TEST_CASE("crypto: AES gives the known answers of a sector", "[crypto][cipher]") {
    struct Row {
        CipherAlg alg;
        CipherMode mode;
        Bytes key;
        uint64_t sector;
        std::string_view head, tail, sha256;
    };
    const Row rows[] = {
        // IEEE 1619, vector 4.
        {CipherAlg::kAes128, CipherMode::kXts,
         from_hex("2718281828459045235360287471352631415926535897932384626433832795"), 0,
         "27a7479befa1d476489f308cd4cfa6e2", "0a282df920147beabe421ee5319d0568",
         "ebee4d64dd2395bb2d6a2d37a0a48ecb2bf4913cfc99d27c2214f2f4144715ea"},
        // The others: another library's.
        {CipherAlg::kAes256, CipherMode::kXts, counting(64, 3), 0x123456789a, "b817fef2462dc39a2bd7f2e4eaac068f",
         "3eb0eb52bd625770ca015f2c75375739", "b2a6dec4e508b9601458a6abab376d5f3ed9558ddf9c3d191e2c53b9c547f5f4"},
        {CipherAlg::kAes256, CipherMode::kCbc, counting(32, 3), 0x123456789a, "70cbab7c8aa3be05f43668ed5ee2003e",
         "6b10a31f4696d7b2f9a439fe74b4c454", "0ec44e38d570ed96eda740f647728040e29865e91c79f156639d42d747ed54bf"},
        {CipherAlg::kAes128, CipherMode::kCbc, counting(16, 3), 7, "12110bcf32f39a9fcab9e66758496113",
         "1ee1550965cd56d9101371fd50da00b8", "5009b9726a2548659534a8dc3f04e8229c96511b88f775a8c861abeb83974234"},
    };
    for (const Row& row : rows) {
        const auto cipher = make({row.alg, row.mode, IvGenerator::kPlain64, {}}, row.key);
        Bytes data = counting(512);
        cipher->encrypt(row.sector, data);
        INFO(name_of(row.alg) << " " << name_of(row.mode));
        CHECK(hex(std::span(data).first(16)) == row.head);
        CHECK(hex(std::span(data).last(16)) == row.tail);
        CHECK(sha256_of(data) == row.sha256);
        cipher->decrypt(row.sector, data);
        CHECK(data == counting(512));
    }
}

TEST_CASE("crypto: XTS over many sectors is the library's own, sector by sector", "[crypto][cipher]") {
    const Bytes key = counting(64, 7);
    const auto cipher = make({}, key);
    xts_aes256_key own{};
    xts_aes256_set_encrypt_key(&own, key.data());
    for (const size_t sectors : {1u, 2u, 7u, 8u, 9u, 33u}) {
        const uint64_t first = 0xfffffffffffffff0 + sectors;
        Bytes data = counting(sectors * kSectorBytes, 11);
        Bytes wanted = data;
        for (size_t i = 0; i < sectors; i++) {
            uint8_t tweak[16] = {};
            const uint64_t sector = first + i;
            std::memcpy(tweak, &sector, 8);
            uint8_t* at = wanted.data() + i * kSectorBytes;
            xts_aes256_encrypt_message(&own, tweak, kSectorBytes, at, at);
        }
        cipher->encrypt(first, data);
        INFO(sectors << " sectors");
        CHECK(data == wanted);
    }
}

TEST_CASE("crypto: every cipher, mode and vector gives back what was put in, alone or in runs", "[crypto][cipher]") {
    std::mt19937_64 random(11);
    const auto specs = every_spec();
    REQUIRE(specs.size() > 90);
    for (const CipherSpec& spec : specs) {
        INFO(describe(spec));
        Bytes key(spec.key_bytes());
        std::ranges::generate(key, [&] { return static_cast<uint8_t>(random()); });
        const auto cipher = make(spec, key);
        const uint64_t first = random();
        Bytes data(19 * kSectorBytes);
        std::ranges::generate(data, [&] { return static_cast<uint8_t>(random()); });
        const Bytes plain = data;
        cipher->encrypt(first, data);
        CHECK(data != plain);
        Bytes one_by_one = plain;
        for (size_t i = 0; i < 19; i++) {
            cipher->encrypt(first + i, std::span(one_by_one).subspan(i * kSectorBytes, kSectorBytes));
        }
        CHECK(data == one_by_one);
        cipher->decrypt(first, std::span(data).first(5 * kSectorBytes));
        cipher->decrypt(first + 5, std::span(data).subspan(5 * kSectorBytes));
        CHECK(data == plain);
    }
}

TEST_CASE("crypto: plain cuts sector numbers at 32 bits, plain64 does not", "[crypto][cipher]") {
    const Bytes key = counting(64);
    const auto encrypted = [&](IvGenerator iv, uint64_t sector) {
        Bytes data = counting(512);
        make({CipherAlg::kAes256, CipherMode::kXts, iv, {}}, key)->encrypt(sector, data);
        return data;
    };
    const uint64_t high = (uint64_t{1} << 32) + 5;
    CHECK(encrypted(IvGenerator::kPlain, high) == encrypted(IvGenerator::kPlain, 5));
    CHECK(encrypted(IvGenerator::kPlain64, high) != encrypted(IvGenerator::kPlain64, 5));
    CHECK(encrypted(IvGenerator::kPlain64, 5) == encrypted(IvGenerator::kPlain, 5));
}

TEST_CASE("crypto: combinations that do not exist are refused in the reference's words", "[crypto][cipher]") {
    const auto refused = [](CipherSpec spec) {
        auto valid = spec.validate();
        return valid ? std::string() : valid.error().message();
    };
    const auto essiv = [&](CipherAlg alg, HashAlg hash) {
        return refused({alg, CipherMode::kCbc, IvGenerator::kEssiv, hash});
    };
    CHECK(refused({CipherAlg::kCast5_128, CipherMode::kXts, IvGenerator::kPlain64, {}})
              .starts_with("Unsupported cipher mode xts"));
    CHECK(essiv(CipherAlg::kCast5_128, HashAlg::kSha256) == "Cipher cast5-128 not supported with essiv");
    CHECK(essiv(CipherAlg::kAes256, HashAlg::kSha1).starts_with("No AES cipher with key size 20 available"));
    CHECK(essiv(CipherAlg::kAes256, HashAlg::kSha512).starts_with("No AES cipher with key size 64 available"));
    CHECK(essiv(CipherAlg::kSerpent128, HashAlg::kSha384).starts_with("No Serpent cipher with key size 48 available"));
    CHECK(essiv(CipherAlg::kAes128, HashAlg::kMd5).empty());
    CHECK(refused({CipherAlg::kAes128, CipherMode::kCbc, IvGenerator::kEssiv, {}}) ==
          "Missing IV generator hash specification");
    for (const size_t wrong : {0u, 16u, 32u, 63u, 65u}) {
        auto cipher = SectorCipher::create({}, counting(wrong));
        REQUIRE_FALSE(cipher);
        CHECK(cipher.error().message() ==
              fmt::format("Algorithm 'aes' with key size {} bytes not supported; xts needs 64", wrong));
    }
    CHECK(cipher_named("des").error().message() == "Algorithm 'des' not supported");
    CHECK(hash_named("sm3\n").error().message() == "Hash algorithm 'sm3?' not supported");
}

TEST_CASE("crypto: PBKDF2 gives the known answers of every hash", "[crypto][kdf]") {
    struct Row {
        HashAlg hash;
        std::string passphrase;
        uint32_t iterations;
        std::string_view key;
    };
    const Row rows[] = {
        {HashAlg::kSha1, "password", 1, "0c60c80f961f0e71f3a9b524af6012062fe037a6"},  // RFC 6070
        {HashAlg::kSha1, "password", 4096, "4b007901b765489abead49d926f721d065a429c1"},
        {HashAlg::kSha256, "passwd", 1,  // RFC 7914
         "55ac046e56e3089fec1691c22544b605f94185216dde0465e68b9d57c20dacbc49ca9cccf179b645991664b39d77ef317c71b845b1e30"
         "bd509112041d3a19783"},
        {HashAlg::kSha512, "password", 3,
         "b6b07cb2cebf4ad84468391a543824fccffe0e0769dbe6bddf10a65673c4b648e612d44918f9ce9a19a1294cf5140628084ba994c3b21"
         "a4ef4741220b811c633cfc0641fccbcc4164f1bbfcb1f33f595ae9aa4a33ddcce570157775980362c0ee28aa340"},
        {HashAlg::kMd5, "p", 5, "d503337f7709350365519b0dc6e56fdf9dacfd86"},
        {HashAlg::kSha224, "", 2, "a0c09a7692accf2a54436ecef00381912fc2bdaee5fcf7bfaa7bc8362327"},
        {HashAlg::kSha384, std::string(200, 'x'), 2,
         "dc5cfad36f6719c62eebc43655be193b50bd985d59f050ad6e9fc58fa6fa0d194265656727d8818b55face464d407d79113980123aeac"
         "c86afd61574ea5d88ca"},
        {HashAlg::kRipemd160, "pw", 3, "872082fba2e5e614e84d9290769acc835cdf6bf33bfa77845b62947255cd4aec"},
    };
    for (const Row& row : rows) {
        INFO(name_of(row.hash));
        Bytes key(row.key.size() / 2);
        derive_key(row.hash, bytes_of(row.passphrase), bytes_of("salt"), row.iterations, key);
        CHECK(hex(key) == row.key);
    }
}

TEST_CASE("crypto: iterations follow the time that was asked for", "[crypto][kdf]") {
    const uint64_t short_time = derive_iterations(HashAlg::kSha256, 32, 10);
    const uint64_t long_time = derive_iterations(HashAlg::kSha256, 32, 1000);
    CHECK(short_time > 0);
    CHECK(long_time > short_time * 20);  // a hundred times, on a machine that does other things, too
    CHECK(derive_iterations(HashAlg::kSha256, 32, 0) == 1);
    CHECK(derive_iterations(HashAlg::kSha256, 32, UINT64_MAX) > uint64_t{1} << 40);
}

TEST_CASE("crypto: the splitter's key comes back from all stripes and from nothing less", "[crypto][kdf]") {
    Bytes material(64 * 3);
    for (size_t i = 0; i < material.size(); i++) material[i] = static_cast<uint8_t>(i * 7 + i / 256);
    Bytes key(64);
    af_merge(HashAlg::kSha256, material, 3, key);
    CHECK(
        hex(key) ==
        "7bccc6b04211c84f6239481c866372e5e638371f454653b89ae73229a833f1f4e172ce20c6fb619ac7b4fdb3f87c197311766b53f5204"
        "a8846f6cd7ea50f1e6c");
    material.resize(32 * 5);
    key.resize(32);
    af_merge(HashAlg::kSha1, material, 5, key);  // pieces of 20 bytes: the last one is cut
    CHECK(hex(key) == "27fa8600ea0c14668eea72326b95cbcca385ce87bac88dfbb15abffc89891f90");

    for (const HashAlg hash : {HashAlg::kSha1, HashAlg::kSha256, HashAlg::kSha512, HashAlg::kRipemd160}) {
        const Bytes secret = counting(48, 5);
        Bytes split(48 * 400);
        af_split(hash, secret, 400, split);
        Bytes back(48);
        af_merge(hash, split, 400, back);
        CHECK(back == secret);
        split[17 * 48 + 3] ^= 1;
        af_merge(hash, split, 400, back);
        CHECK(back != secret);
    }
}

TEST_CASE("crypto: random bytes differ, secrets compare by contents", "[crypto]") {
    Bytes a(64), b(64);
    random_bytes(a);
    random_bytes(b);
    CHECK(a != b);
    CHECK_FALSE(equal_secrets(a, b));
    CHECK(equal_secrets(a, Bytes(a)));
    CHECK_FALSE(equal_secrets(a, std::span(a).first(63)));
}

TEST_CASE("crypto: aes-256-xts runs at more than a gigabyte a second", "[speed][.]") {
    const auto cipher = make({}, counting(64));
    Bytes data(65536);
    const auto begin = std::chrono::steady_clock::now();
    constexpr int kRounds = 4000;
    for (int i = 0; i < kRounds; i++) cipher->encrypt(static_cast<uint64_t>(i), data);
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    const double rate = 65536.0 * kRounds / seconds / 1e9;
    WARN("aes-256-xts, 64 KiB at a time: " << rate << " GB/s");
    CHECK(rate > 1.0);
}

}  // namespace gantry::block::crypto
