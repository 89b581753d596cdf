// LUKS1 volumes: the header, unlocking, key slots, and what is left when a change of key slots is cut short.

#include <catch2/catch.hpp>
#include <cstring>
#include <functional>

#include "block/crypto/luks.h"
#include "block/crypto/luks_header.h"
#include "block/crypto/secrets.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/node_io.h"

namespace gantry::block::crypto {

namespace {

using test::Bytes;

LuksHeader sample() {
    LuksHeader h;
    h.cipher = {CipherAlg::kAes256, CipherMode::kXts, IvGenerator::kPlain64, {}};
    h.uuid = "27be69c4-a503-42a8-abbd-6ed62f98a6f4";
    h.digest_iterations = 1000;
    h.digest.fill(0x11);
    h.digest_salt.fill(0x22);
    h.slots[0].active = true;
    h.slots[0].iterations = 2000;
    h.slots[0].salt.fill(0x33);
    lay_out_luks(h);
    return h;
}

Bytes encoded(const LuksHeader& h) {
    const auto bytes = encode_luks_header(h);
    return {bytes.begin(), bytes.end()};
}
void put32(Bytes& bytes, size_t at, uint32_t v) {
    for (int i = 0; i < 4; i++) bytes[at + static_cast<size_t>(i)] = static_cast<uint8_t>(v >> (24 - 8 * i));
}
void put_text(Bytes& bytes, size_t at, std::string_view text, bool end = true) {
    std::memcpy(bytes.data() + at, text.data(), text.size());
    if (end) bytes[at + text.size()] = 0;
}

constexpr std::string_view kOld = "old passphrase", kNew = "new passphrase", kOther = "third";

/// A volume at an offset of a disk in memory, as it lies in an image.
struct Bench : test::GraphFixture {
    static constexpr uint64_t kAt = 65536;
    static constexpr LuksFormat kFormat{
        {CipherAlg::kAes128, CipherMode::kXts, IvGenerator::kPlain64, {}}, HashAlg::kSha256, 0};

    Bench() {
        if (const std::string error = add("{'driver': 'memory', 'node-name': 'm', 'size': 4194304}"); !error.empty())
            throw std::runtime_error(error);
    }
    test::MemoryDisk& disk() { return dynamic_cast<test::MemoryNode&>(node("m")).disk(); }
    LuksArea area() { return {&node("m"), kAt, luks_area_bytes(kFormat)}; }
    void make(LuksFormat format = kFormat) {
        LuksArea where = area();
        where.length = luks_area_bytes(format);
        auto made = run(create_luks(where, format, SecretBytes(kOld)));
        if (!made) throw std::runtime_error(made.error().message());
        volume = std::move(*made);
    }
    Result<LuksVolume> open(std::string_view passphrase) { return run(open_luks(area(), SecretBytes(passphrase))); }
    bool opens(std::string_view passphrase) { return open(passphrase).has_value(); }
    std::string amend(LuksAmend change, bool force = false) {
        change.iter_time_ms = 0;
        return test::error_of(run(amend_luks(area(), volume, std::move(change), force)));
    }
    LuksVolume volume;
};

LuksAmend putting(std::string_view passphrase, std::optional<uint32_t> slot = {}) {
    LuksAmend change;
    change.activate = true;
    change.new_secret = SecretBytes(passphrase);
    change.slot = slot;
    return change;
}
LuksAmend erasing(std::optional<std::string_view> passphrase, std::optional<uint32_t> slot = {}) {
    LuksAmend change;
    if (passphrase) change.old_secret = SecretBytes(*passphrase);
    change.slot = slot;
    return change;
}

}  // namespace

TEST_CASE("luks: a header is decoded as it was encoded", "[crypto][luks]") {
    LuksHeader h = sample();
    h.cipher = {CipherAlg::kSerpent256, CipherMode::kCbc, IvGenerator::kEssiv, HashAlg::kSha256};
    h.hash = HashAlg::kSha512;
    lay_out_luks(h);
    const Bytes bytes = encoded(h);
    const auto back = decode_luks_header(bytes);
    REQUIRE(back);
    CHECK(back->cipher == h.cipher);
    CHECK(back->hash == h.hash);
    CHECK(back->mode_text() == "cbc-essiv:sha256");
    CHECK(back->uuid == h.uuid);
    CHECK(back->active_slots() == 1);
    CHECK(encoded(*back) == bytes);
    const auto slot = encode_luks_slot(h.slots[0]);
    CHECK(std::equal(slot.begin(), slot.end(), bytes.begin() + luks_slot_offset(0)));
}

TEST_CASE("luks: key slots lie where others put them", "[crypto][luks]") {
    struct Row {
        CipherAlg alg;
        uint32_t second, payload;
    };
    for (const Row& row :
         {Row{CipherAlg::kAes128, 264, 2056}, Row{CipherAlg::kAes192, 384, 3016}, Row{CipherAlg::kAes256, 512, 4040}}) {
        LuksHeader h;
        h.cipher.alg = row.alg;
        lay_out_luks(h);
        CHECK(h.slots[0].material_sector == 8);
        CHECK(h.slots[1].material_sector == row.second);
        CHECK(h.payload_sector == row.payload);
    }
    CHECK(luks_area_bytes({}) == 0x1f9000);
}

TEST_CASE("luks: headers that must be refused", "[crypto][luks][malformed]") {
    using Change = std::function<void(Bytes&)>;
    const auto word = [](size_t at, uint32_t v) { return [=](Bytes& b) { put32(b, at, v); }; };
    const auto text = [](size_t at, std::string_view t, bool end = true) {
        return [=](Bytes& b) { put_text(b, at, t, end); };
    };
    constexpr size_t kSlot0 = 208, kSlot1 = 256, kSlot7 = 544;
    const std::string long_name(32, 'a');
    struct Row {
        Change change;
        std::string_view error;
    };
    const Row rows[] = {
        {[](Bytes& b) { b[0] = 'X'; }, "Volume is not in LUKS format"},
        {[](Bytes& b) { b.resize(591); }, "Volume is not in LUKS format"},
        {[](Bytes& b) { b.clear(); }, "Volume is not in LUKS format"},
        {[](Bytes& b) { b[7] = 2; }, "LUKS version 2 is not supported"},
        {text(8, "foo"), "Algorithm 'foo' with key size 64 bytes not supported"},
        {text(8, "f\x01o"), "Algorithm 'f?o' with key size 64 bytes not supported"},
        {text(8, "cast5"), "Algorithm 'cast5' with key size 64 bytes not supported"},
        {text(8, long_name, false), "LUKS header cipher name is not NUL terminated"},
        {text(40, long_name, false), "LUKS header cipher mode is not NUL terminated"},
        {text(72, long_name, false), "LUKS header hash spec is not NUL terminated"},
        {text(40, "xts"), "Unexpected cipher mode string format 'xts'"},
        {text(40, ""), "Unexpected cipher mode string format ''"},
        {text(40, "gcm-plain64"), "Cipher mode 'gcm' not supported"},
        {text(40, "xts-random"), "IV generator 'random' not supported"},
        {text(40, "xts-essiv:foo"), "Hash algorithm 'foo' not supported"},
        {text(40, "xts-essiv"), "Missing IV generator hash specification"},
        {text(40, "xts-essiv:sha1"), "No AES cipher with key size 20 available"},
        {text(72, "foo"), "Hash algorithm 'foo' not supported"},
        {word(104, 0), "LUKS payload is overlapping with the header"},
        {word(104, 100), "Keyslot 0 is overlapping with the encrypted payload"},
        {word(108, 0), "Algorithm 'aes' with key size 0 bytes not supported"},
        {word(108, 65), "Algorithm 'aes' with key size 65 bytes not supported"},
        {word(108, 0x7fffffff), "Algorithm 'aes' with key size 2147483647 bytes not supported"},
        {word(108, 48 + 1), "Algorithm 'aes' with key size 49 bytes not supported"},
        {word(164, 0), "LUKS key iteration count is zero"},
        {word(164, 100'000'001), "The LUKS header asks for 100000001 iterations to check a key"},
        {word(kSlot0, 1), "Keyslot 0 state (active/disable) is corrupted"},
        {word(kSlot0 + 4, 0), "Keyslot 0 iteration count is zero"},
        {word(kSlot0 + 4, 0xffffffff), "Keyslot 0 asks for 4294967295 iterations"},
        {word(kSlot0 + 40, 0), "Keyslot 0 is overlapping with the LUKS header"},
        {word(kSlot0 + 40, 0xfffffff0), "Keyslot 0 is overlapping with the encrypted payload"},
        {word(kSlot0 + 44, 0), "Keyslot 0 is corrupted (stripes 0 != 4000)"},
        {word(kSlot0 + 44, 0x7fffffff), "Keyslot 0 is corrupted (stripes 2147483647 != 4000)"},
        {word(kSlot1 + 40, 9), "Keyslots 0 and 1 are overlapping in the header"},
        {word(kSlot1 + 44, 1), "Keyslot 1 is corrupted (stripes 1 != 4000)"},
        {word(kSlot7 + 40, 4000), "Keyslot 7 is overlapping with the encrypted payload"},
    };
    for (const Row& row : rows) {
        Bytes bytes = encoded(sample());
        row.change(bytes);
        const auto header = decode_luks_header(bytes);
        INFO(row.error);
        REQUIRE_FALSE(header);
        INFO(header.error().message());
        CHECK(header.error().message().starts_with(row.error));
    }
    // Allowed oddities: a hash beside plain64, a slot that is not in use without iterations, any UUID.
    for (const Change& change : {Change(text(40, "xts-plain64:sha256")), Change(word(kSlot1 + 4, 0)),
                                 Change(text(168, long_name, false)), Change(word(104, 0xffffffff))}) {
        Bytes bytes = encoded(sample());
        change(bytes);
        CHECK(decode_luks_header(bytes));
    }
}

TEST_CASE("luks: headers with random damage are decoded or refused", "[crypto][luks][malformed][once]") {
    uint64_t state = 88172645463325252;
    const auto random = [&] {
        state ^= state << 13;
        state ^= state >> 7;
        return state ^= state << 17;
    };
    unsigned good = 0;
    for (int round = 0; round < 20000; round++) {
        Bytes bytes = encoded(sample());
        for (uint64_t n = random() % 4; n > 0; n--) bytes[random() % bytes.size()] = static_cast<uint8_t>(random());
        if (const auto header = decode_luks_header(bytes)) {
            good++;
            CHECK(header->material_bytes() <= 64 * kLuksStripes + 512);
            CHECK(SectorCipher::create(header->cipher, Bytes(header->key_bytes)));
        }
    }
    CHECK(good > 1000);
    CHECK(good < 20000);
}

TEST_CASE("luks: the passphrase opens what was made, another does not", "[crypto][luks][once]") {
    Bench b;
    const CipherAlg algs[] = {CipherAlg::kAes128, CipherAlg::kAes192, CipherAlg::kTwofish256, CipherAlg::kCast5_128};
    for (const CipherAlg alg : algs) {
        for (const HashAlg hash : {HashAlg::kSha256, HashAlg::kRipemd160}) {
            LuksFormat format = Bench::kFormat;
            // 192-bit keys with cbc: the key material ends within a sector.
            format.cipher = {
                alg, alg == CipherAlg::kAes128 ? CipherMode::kXts : CipherMode::kCbc, IvGenerator::kPlain64, {}};
            format.hash = hash;
            b.make(format);
            const LuksArea area{&b.node("m"), Bench::kAt, luks_area_bytes(format)};
            auto opened = b.run(open_luks(area, SecretBytes(kOld)));
            INFO(name_of(alg) << " " << name_of(hash));
            REQUIRE(opened);
            CHECK(opened->master_key.text() == b.volume.master_key.text());
            CHECK(opened->header.uuid == b.volume.header.uuid);
            Bytes data = test::pattern(4096, 9);
            b.volume.cipher->encrypt(77, data);
            opened->cipher->decrypt(77, data);
            CHECK(data == test::pattern(4096, 9));
            auto wrong = b.run(open_luks(area, SecretBytes(std::string_view("old passphras"))));
            REQUIRE_FALSE(wrong);
            CHECK(wrong.error().message().starts_with("Invalid password, cannot unlock any keyslot"));
            CHECK(wrong.error().kind() == ErrorKind::kPermission);
        }
    }
}

TEST_CASE("luks: key material outside of its area is refused before it is read", "[crypto][luks][malformed]") {
    Bench b;
    b.make();
    LuksArea cut = b.area();
    cut.length = 8192;
    auto opened = b.run(open_luks(cut, SecretBytes(kOld)));
    REQUIRE_FALSE(opened);
    CHECK(opened.error().message().starts_with("Request for data outside of extension header; key material"));
    cut.length = 100;
    opened = b.run(open_luks(cut, SecretBytes(kOld)));
    REQUIRE_FALSE(opened);
    CHECK(opened.error().message().starts_with("Request for data outside of extension header; LUKS header"));
    auto made = b.run(create_luks(cut, Bench::kFormat, SecretBytes(kOld)));
    REQUIRE_FALSE(made);
    CHECK(made.error().message().starts_with("A LUKS header and its key slots need"));
}

TEST_CASE("luks: nothing of the keys is left in the clear", "[crypto][luks]") {
    Bench b;
    b.make();
    const auto stored = b.disk().bytes(Bench::kAt, luks_area_bytes(Bench::kFormat));
    const std::string_view all(reinterpret_cast<const char*>(stored.data()), stored.size());
    CHECK(all.find(b.volume.master_key.text()) == std::string_view::npos);
    CHECK(all.find(kOld) == std::string_view::npos);
    // Slots that are not in use hold nothing.
    const size_t second = b.volume.header.slots[1].material_sector * size_t{kSectorBytes};
    CHECK(all.find_first_not_of('\0', second) == std::string_view::npos);
}

TEST_CASE("luks: passphrases are added and erased", "[crypto][luks][amend][once]") {
    Bench b;
    b.make();
    const Bytes before(b.volume.master_key.data(), b.volume.master_key.data() + b.volume.master_key.size());
    CHECK(b.amend(putting(kNew)).empty());
    CHECK(b.volume.header.slots[1].active);
    CHECK(b.amend(putting(kOther, 7)).empty());
    for (const auto& passphrase : {kOld, kNew, kOther}) {
        auto opened = b.open(passphrase);
        REQUIRE(opened);
        CHECK(Bytes(opened->master_key.data(), opened->master_key.data() + opened->master_key.size()) == before);
        CHECK(opened->header.active_slots() == 3);
    }
    const uint64_t material = b.volume.header.slots[1].material_sector * uint64_t{kSectorBytes};
    const auto sealed = b.disk().bytes(Bench::kAt + material, b.volume.header.material_bytes());
    CHECK(b.amend(erasing(kNew)).empty());
    CHECK_FALSE(b.opens(kNew));
    CHECK(b.opens(kOld));
    const auto erased = b.disk().bytes(Bench::kAt + material, b.volume.header.material_bytes());
    size_t same = 0;
    for (size_t i = 0; i < sealed.size(); i++) same += sealed[i] == erased[i];
    CHECK(same < sealed.size() / 100);
    CHECK(b.amend(erasing({}, 7)).empty());
    CHECK_FALSE(b.opens(kOther));
    CHECK(b.opens(kOld));
}

TEST_CASE("luks: a passphrase in several slots leaves them all", "[crypto][luks][amend][once]") {
    Bench b;
    b.make();
    REQUIRE(b.amend(putting(kOld, 3)).empty());
    REQUIRE(b.amend(putting(kNew, 5)).empty());
    CHECK(b.amend(erasing(kOld)).empty());
    CHECK_FALSE(b.opens(kOld));
    CHECK(b.opens(kNew));
    CHECK(b.volume.header.active_slots() == 1);
}

TEST_CASE("luks: what would lock everybody out needs force", "[crypto][luks][amend][once]") {
    Bench b;
    b.make();
    CHECK(b.amend(erasing({}, 0)).starts_with("Attempt to erase the only active keyslot 0 which will erase all"));
    CHECK(b.amend(erasing(kOld)).starts_with("All the active keyslots match the (old) password"));
    CHECK(b.amend(erasing(kNew)) == "No keyslots match given (old) password for erase operation");
    CHECK(b.amend(erasing(kNew, 0)) == "Given keyslot 0 doesn't contain the given old password for erase operation");
    CHECK(b.amend(erasing({}, 3)) == "Given keyslot 3 is already erased (inactive)");
    CHECK(b.amend(putting(kNew, 0)) == "Refusing to overwrite active keyslot 0 - please erase it first");
    LuksAmend other = putting(kNew);
    other.secret = SecretBytes(kOther);
    CHECK(b.amend(std::move(other)).starts_with("Failed to retrieve the master key"));
    CHECK(b.volume.header.active_slots() == 1);
    CHECK(b.opens(kOld));

    CHECK(b.amend(putting(kNew, 0), true).empty());
    CHECK(b.opens(kNew));
    CHECK_FALSE(b.opens(kOld));
    CHECK(b.volume.header.active_slots() == 1);
    for (uint32_t i = 1; i < kLuksSlots; i++) REQUIRE(b.amend(putting(kOther)).empty());
    CHECK(b.amend(putting(kOther)) == "Can't add a keyslot - all keyslots are in use");
    CHECK(b.amend(putting(kOld, 4), true).empty());  // none to spare
    CHECK(b.opens(kOld));
    CHECK(b.amend(erasing({}, 0), true).empty());
    CHECK(b.amend(erasing(kOther), true).empty());
    CHECK(b.amend(erasing(kOld), true).empty());
    CHECK_FALSE(b.opens(kOld));
    CHECK(b.volume.header.active_slots() == 0);
}

TEST_CASE("luks: a change of key slots that is cut short never locks anybody out",
          "[crypto][luks][amend][crash][once]") {
    struct Row {
        const char* what;
        std::function<LuksAmend()> change;
        bool force;
        std::vector<std::string_view> always;  // open at every moment
        std::string_view before, after;        // one of the two opens at every moment; empty: not looked at
    };
    const Row rows[] = {
        {"add", [] { return putting(kNew, 6); }, false, {kOld, kOther}, {}, {}},
        {"erase", [] { return erasing(kOther); }, false, {kOld}, {}, {}},
        {"replace", [] { return putting(kNew, 1); }, true, {kOld}, kOther, kNew},
    };
    Bench b;
    b.make();
    REQUIRE(b.amend(putting(kOther, 1)).empty());
    const auto size = static_cast<size_t>(b.disk().size());
    const auto image = b.disk().bytes(0, size);
    for (const Row& row : rows) {
        for (int writes = 0;; writes++) {
            b.disk().write(0, image.data(), size);
            auto opened = b.open(kOld);
            REQUIRE(opened);
            b.volume = std::move(*opened);
            int left = writes;
            b.disk().set_fault([&](test::MemoryDisk::Op op, uint64_t, uint64_t) {
                if (op != test::MemoryDisk::Op::kWrite) return 0;
                return left-- > 0 ? 0 : EIO;
            });
            const std::string error = b.amend(row.change(), row.force);
            b.disk().set_fault({});
            INFO(row.what << " after " << writes << " writes: " << error);
            REQUIRE(writes < 40);
            for (const auto& passphrase : row.always) CHECK(b.opens(passphrase));
            if (!row.after.empty()) CHECK((b.opens(row.before) || b.opens(row.after)));
            if (!error.empty()) continue;
            if (!row.after.empty()) {
                CHECK(b.opens(row.after));
                CHECK_FALSE(b.opens(row.before));
            }
            CHECK(writes >= 3);
            break;
        }
    }
}

TEST_CASE("luks: options of creation and of key slots", "[crypto][luks]") {
    const auto format = [](std::string text) { return luks_format(test::options_of(std::move(text))); };
    CHECK(format("{}")->cipher == CipherSpec{});
    CHECK(format("{'ivgen-alg': 'essiv'}")->cipher.ivgen_hash == HashAlg::kSha256);
    CHECK_FALSE(format("{'ivgen-hash-alg': 'sha1'}")->cipher.ivgen_hash);  // means nothing without essiv
    CHECK(format("{'ivgen-alg': 'essiv', 'ivgen-hash-alg': 'sha1'}").error().message().starts_with("No AES cipher"));
    CHECK(format("{'cipher-alg': 'cast5-128'}").error().message().starts_with("Unsupported cipher mode xts"));
    CHECK_FALSE(format("{'iter-time': -1}"));

    test::TestRuntime rt;
    Secrets secrets;
    REQUIRE(rt.run(secrets.add(test::options_of("{'qom-type': 'secret', 'id': 's', 'data': 'x'}"))));
    const auto amend = [&](std::string text) {
        auto change = luks_amend(test::options_of(std::move(text)), secrets);
        return change ? std::string() : change.error().message();
    };
    CHECK(amend("{'state': 'active', 'new-secret': 's', 'keyslot': 7}").empty());
    CHECK(amend("{'state': 'inactive', 'old-secret': 's'}").empty());
    CHECK(amend("{'state': 'active'}") == "'new-secret' is required to activate a keyslot");
    CHECK(amend("{'state': 'active', 'new-secret': 's', 'old-secret': 's'}") ==
          "'old-secret' must not be given when activating keyslots");
    CHECK(amend("{'state': 'active', 'new-secret': 'n'}") == "No secret with id 'n'");
    CHECK(amend("{'state': 'inactive'}").starts_with("To erase keyslot(s), either explicit keyslot index"));
    CHECK(amend("{'state': 'inactive', 'keyslot': 0, 'new-secret': 's'}") ==
          "'new-secret' must not be given when erasing keyslots");
    CHECK(amend("{'state': 'inactive', 'keyslot': 0, 'iter-time': 20}") ==
          "'iter-time' must not be given when erasing keyslots");
    for (const char* slot : {"8", "-1", "9223372036854775807"}) {
        CHECK(amend(std::string("{'state': 'inactive', 'keyslot': ") + slot + "}") ==
              std::string("Invalid keyslot ") + slot + " specified, must be between 0 and 7");
    }
}

TEST_CASE("luks: an iter-time that nobody could wait for is refused before anything is written", "[crypto][luks]") {
    Bench b;
    LuksFormat format = Bench::kFormat;
    format.iter_time_ms = 1'000'000'000;
    auto made = b.run(create_luks(b.area(), format, SecretBytes(kOld)));
    REQUIRE_FALSE(made);
    CHECK(made.error().kind() == ErrorKind::kTooLarge);
    CHECK(b.disk().count(test::MemoryDisk::Op::kWrite) == 0);
    CHECK(b.disk().count(test::MemoryDisk::Op::kZeroes) == 0);
}

}  // namespace gantry::block::crypto
