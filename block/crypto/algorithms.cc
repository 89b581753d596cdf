#include "block/crypto/algorithms.h"

#include <algorithm>
#include <array>

#include "block/crypto/hash.h"

namespace gantry::block::crypto {

namespace {

struct CipherRow {
    std::string_view name, family;
    uint32_t key_bytes, block_bytes;
};
constexpr std::array<CipherRow, 10> kCiphers = {{
    {"aes-128", "aes", 16, 16},
    {"aes-192", "aes", 24, 16},
    {"aes-256", "aes", 32, 16},
    {"cast5-128", "cast5", 16, 8},
    {"serpent-128", "serpent", 16, 16},
    {"serpent-192", "serpent", 24, 16},
    {"serpent-256", "serpent", 32, 16},
    {"twofish-128", "twofish", 16, 16},
    {"twofish-192", "twofish", 24, 16},
    {"twofish-256", "twofish", 32, 16},
}};
constexpr std::array<std::string_view, 4> kModes = {"ecb", "cbc", "xts", "ctr"};
constexpr std::array<std::string_view, 3> kGenerators = {"plain", "plain64", "essiv"};
constexpr std::array<std::string_view, 7> kHashes = {"md5",    "sha1",   "sha224",   "sha256",
                                                     "sha384", "sha512", "ripemd160"};

const CipherRow& row(CipherAlg alg) { return kCiphers[static_cast<size_t>(alg)]; }

template <class Enum, size_t N>
std::optional<Enum> find(const std::array<std::string_view, N>& names, std::string_view name) {
    const auto it = std::ranges::find(names, name);
    if (it == names.end()) return std::nullopt;
    return static_cast<Enum>(it - names.begin());
}

}  // namespace

std::string_view name_of(CipherAlg alg) { return row(alg).name; }
std::string_view name_of(CipherMode mode) { return kModes[static_cast<size_t>(mode)]; }
std::string_view name_of(IvGenerator generator) { return kGenerators[static_cast<size_t>(generator)]; }
std::string_view name_of(HashAlg hash) { return kHashes[static_cast<size_t>(hash)]; }

Result<CipherAlg> cipher_named(std::string_view name) {
    const auto it = std::ranges::find(kCiphers, name, &CipherRow::name);
    if (it == kCiphers.end()) return fail(ErrorKind::kUnsupported, "Algorithm '{}' not supported", printable(name));
    return static_cast<CipherAlg>(it - kCiphers.begin());
}
Result<CipherMode> mode_named(std::string_view name) {
    if (const auto mode = find<CipherMode>(kModes, name)) return *mode;
    return fail(ErrorKind::kUnsupported, "Cipher mode '{}' not supported", printable(name));
}
Result<IvGenerator> iv_generator_named(std::string_view name) {
    if (const auto generator = find<IvGenerator>(kGenerators, name)) return *generator;
    return fail(ErrorKind::kUnsupported, "IV generator '{}' not supported", printable(name));
}
Result<HashAlg> hash_named(std::string_view name) {
    if (const auto hash = find<HashAlg>(kHashes, name)) return *hash;
    return fail(ErrorKind::kUnsupported, "Hash algorithm '{}' not supported", printable(name));
}

std::string printable(std::string_view text) {
    std::string out;
    for (const char c : text.substr(0, 32)) out += c > ' ' && c < 0x7f ? c : '?';
    return out;
}

std::string_view family_of(CipherAlg alg) { return row(alg).family; }
std::optional<CipherAlg> cipher_of_family(std::string_view family, size_t key_bytes) {
    for (size_t i = 0; i < kCiphers.size(); i++) {
        if (kCiphers[i].family == family && kCiphers[i].key_bytes == key_bytes) return static_cast<CipherAlg>(i);
    }
    return std::nullopt;
}
uint32_t cipher_key_bytes(CipherAlg alg) { return row(alg).key_bytes; }
uint32_t cipher_block_bytes(CipherAlg alg) { return row(alg).block_bytes; }

Result<> CipherSpec::validate() const {
    if (mode == CipherMode::kXts && cipher_block_bytes(alg) != 16) {
        return fail(ErrorKind::kUnsupported, "Unsupported cipher mode xts; {} has blocks of {} bytes, xts needs 16",
                    name_of(alg), cipher_block_bytes(alg));
    }
    if (ivgen != IvGenerator::kEssiv) return {};
    if (!ivgen_hash) return fail(ErrorKind::kInvalid, "Missing IV generator hash specification");
    if (cipher_block_bytes(alg) != 16) {
        return fail(ErrorKind::kUnsupported, "Cipher {} not supported with essiv", name_of(alg));
    }
    if (!cipher_of_family(family_of(alg), digest_bytes(*ivgen_hash))) {
        std::string family(family_of(alg));
        if (family == "aes") {
            family = "AES";
        } else {
            family[0] = static_cast<char>(family[0] - 'a' + 'A');
        }
        return fail(ErrorKind::kUnsupported, "No {} cipher with key size {} available; essiv uses the hash {} as a key",
                    family, digest_bytes(*ivgen_hash), name_of(*ivgen_hash));
    }
    return {};
}

}  // namespace gantry::block::crypto
