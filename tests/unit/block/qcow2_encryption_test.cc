// Encrypted qcow2 images: what is refused at open, the two methods, requests in odd pieces.

#include <boost/json/parse.hpp>
#include <catch2/catch.hpp>

#include "block/crypto/secrets.h"
#include "block/formats/qcow2/encryption.h"
#include "block/image_control.h"
#include "tests/support/node_io.h"
#include "tests/unit/block/qcow2_fixture.h"

namespace gantry::test {

namespace {

using namespace block::qcow2;
namespace crypto = block::crypto;

constexpr std::string_view kPassphrase = "a passphrase beyond 16 bytes";
constexpr uint64_t kLuksAt = 65536;

crypto::LuksFormat quick() {
    crypto::LuksFormat format;
    format.cipher.alg = crypto::CipherAlg::kAes128;
    format.iter_time_ms = 0;
    return format;
}

struct Bench : Qcow2Fixture {
    Bench() {
        secret("s", kPassphrase);
        secret("w", "wrong");
    }
    void secret(std::string_view id, std::string_view data) {
        REQUIRE(rt.run(graph->secrets().add({{"qom-type", "secret"}, {"id", id}, {"data", data}})));
    }
    static json::object with(std::string_view format, std::string_view id) {
        json::object encrypt{{"format", format}};
        if (!id.empty()) encrypt["key-secret"] = id;
        return {{"encrypt", std::move(encrypt)}};
    }
    /// A tiny image whose guest cluster 0 holds 'a', encrypted by `cipher`.
    static TinyImage encrypted(ClusterCipher& cipher, uint32_t method) {
        TinyImage image;
        image.put32(32, method);
        const iovec data{image.bytes.data() + TinyImage::kData, TinyImage::kCluster};
        REQUIRE(cipher.encrypt(0, TinyImage::kData, IoVec(data)));
        return image;
    }
    static TinyImage aes() {
        auto cipher = legacy_cipher(crypto::SecretBytes(kPassphrase));
        REQUIRE(cipher);
        return encrypted(**cipher, kCryptAes);
    }
    /// With a LUKS area behind everything else.
    TinyImage luks() {
        auto scratch = rt.run(graph->add({{"driver", "memory"}, {"node-name", "scratch"}, {"size", 4 << 20}}));
        REQUIRE(scratch);
        NewEncryption wanted{kCryptLuks, crypto::luks_area_bytes(quick()), quick(), crypto::SecretBytes(kPassphrase)};
        const uint64_t area = wanted.area_bytes;
        auto cipher = rt.run(write_encryption(std::move(wanted), **scratch, kLuksAt));
        REQUIRE(cipher);
        TinyImage image = encrypted(**cipher, kCryptLuks);
        const auto bytes = dynamic_cast<MemoryNode&>(**scratch).disk().bytes(kLuksAt, area);
        REQUIRE(rt.run(graph->remove("scratch")));
        image.put32(TinyImage::kExtensions, kExtensionCrypto)
            .put32(TinyImage::kExtensions + 4, 16)
            .put64(TinyImage::kExtensions + 8, kLuksAt)
            .put64(TinyImage::kExtensions + 16, area);
        image.grow(kLuksAt + area);
        std::ranges::copy(bytes, image.bytes.begin() + static_cast<ptrdiff_t>(kLuksAt));
        return image;
    }
};

}  // namespace

TEST_CASE("qcow2 encryption: both methods read with the passphrase", "[qcow2][crypto]") {
    Bench b;
    REQUIRE(b.open_memory(Bench::aes(), Bench::with("aes", "s")).empty());
    CHECK(b.filled_with(0, 512) == 'a');
    CHECK(b.filled_with(512, 4096) == 0);
    CHECK(b.filled_with(100, 300) == 'a');  // pieces of a sector
    auto status = b.status(0, 512);
    REQUIRE(status);
    CHECK(status->encrypted);
    CHECK_FALSE(status->has_offset);
    REQUIRE(b.open_memory(b.luks(), Bench::with("luks", "s")).empty());
    CHECK(b.filled_with(0, 512) == 'a');
    CHECK(b.filled_with(512, 4096) == 0);

    // A disk that ends within a sector.
    REQUIRE(b.open_memory(Bench::aes().put64(24, 300), Bench::with("aes", "s")).empty());
    CHECK(b.node->size() == 300);
    CHECK(b.filled_with(0, 300) == 'a');
    CHECK(b.filled_with(299, 1) == 'a');
    REQUIRE(b.open_memory(b.luks(), Bench::with("luks", "s")).empty());

    // The secret may go once the image is open.
    CHECK(b.graph->secrets().remove("s"));
    CHECK(b.filled_with(0, 512) == 'a');
}

TEST_CASE("qcow2 encryption: a wrong key of the old method gives noise, of LUKS a refusal", "[qcow2][crypto]") {
    Bench b;
    REQUIRE(b.open_memory(Bench::aes(), Bench::with("aes", "w")).empty());
    CHECK(b.filled_with(0, 512) == -1);
    const std::string text = b.open_memory(b.luks(), Bench::with("luks", "w"));
    INFO(text);
    CHECK(text.starts_with("Invalid password, cannot unlock any keyslot; "));
    CHECK(text.find("node 'q'") != std::string::npos);
    CHECK(text.find("wrong") == std::string::npos);
}

TEST_CASE("qcow2 encryption: options that do not fit the image are refused", "[qcow2][crypto]") {
    Bench b;
    const TinyImage luks = b.luks();
    const auto refused = [&](const TinyImage& image, json::object options, std::string_view sentence) {
        const std::string text = b.open_memory(image, std::move(options));
        INFO(text);
        CHECK(text.starts_with(sentence));
        CHECK(b.graph->nodes().empty());
    };
    refused(luks, {}, "Parameter 'encrypt.key-secret' is required for cipher; node 'q'");
    refused(luks, Bench::with("luks", ""), "Parameter 'encrypt.key-secret' is required for cipher");
    refused(Bench::aes(), {}, "Parameter 'encrypt.key-secret' is required for cipher");
    refused(luks, Bench::with("luks", "none"), "No secret with id 'none'");
    refused(luks, Bench::with("aes", "s"), "Header reported 'luks' encryption format but options specify 'aes'");
    refused(Bench::aes(), Bench::with("luks", "s"),
            "Header reported 'aes' encryption format but options specify 'luks'");
    refused(TinyImage(), Bench::with("luks", "s"),
            "No encryption in image header, but options specified format 'luks'");
    TinyImage damaged = luks;
    damaged.put8(kLuksAt, 'X');
    refused(damaged, Bench::with("luks", "s"), "Volume is not in LUKS format; node 'q': LUKS header at offset 0x10000");
    TinyImage slow = luks;
    slow.put32(kLuksAt + 208 + 4, 0xffffffff);
    refused(slow, Bench::with("luks", "s"), "Keyslot 0 asks for 4294967295 iterations");
    TinyImage cut = luks;
    cut.put64(TinyImage::kExtensions + 16, 8192);
    refused(cut, Bench::with("luks", "s"), "Request for data outside of extension header");
    TinyImage nowhere = luks;
    nowhere.bytes.resize(kLuksAt);
    refused(nowhere, Bench::with("luks", "s"), "Volume is not in LUKS format");
}

TEST_CASE("qcow2 encryption: without a passphrase only the facts", "[qcow2][crypto]") {
    Bench b;
    b.graph->opens_locked = true;
    REQUIRE(b.open_memory(b.luks()).empty());
    auto info = b.rt.run(b.node->image_info());
    REQUIRE(info);
    CHECK(info->encrypted == true);
    const json::object& encrypt = info->format_specific.at("data").at("encrypt").as_object();
    CHECK(encrypt.at("format") == "luks");
    CHECK(encrypt.at("cipher-alg") == "aes-128");
    CHECK(encrypt.at("slots").as_array().size() == 8);
    CHECK(encrypt.at("slots").at(0).at("active") == true);
    CHECK(encrypt.at("slots").at(1).at("active") == false);
    CHECK(b.read_error(0, 512) == "node 'q': the image is encrypted and was opened without its passphrase");
    CHECK(b.filled_with(512, 4096) == 0);
    REQUIRE(b.open_memory(Bench::aes()).empty());
    CHECK(b.rt.run(b.node->image_info())->format_specific.at("data").at("encrypt").at("format") == "aes");
}

TEST_CASE("qcow2 encryption: LUKS counts places in the file, the old method places on the disk", "[qcow2][crypto]") {
    Bench b;
    (void)b.luks();
    auto aes = legacy_cipher(crypto::SecretBytes(kPassphrase));
    REQUIRE(aes);
    auto scratch = b.rt.run(b.graph->add({{"driver", "memory"}, {"node-name", "scratch"}, {"size", 4 << 20}}));
    REQUIRE(scratch);
    NewEncryption wanted{kCryptLuks, crypto::luks_area_bytes(quick()), quick(), crypto::SecretBytes(kPassphrase)};
    auto luks = b.rt.run(write_encryption(std::move(wanted), **scratch, 0));
    REQUIRE(luks);
    const auto encrypted = [](ClusterCipher& cipher, uint64_t guest, uint64_t host) {
        Bytes data = pattern(1024, 3);
        const iovec iov{data.data(), data.size()};
        REQUIRE(cipher.encrypt(guest, host, IoVec(iov)));
        return data;
    };
    CHECK(encrypted(**luks, 0, 4096) == encrypted(**luks, 8192, 4096));
    CHECK(encrypted(**luks, 0, 4096) != encrypted(**luks, 0, 8192));
    CHECK(encrypted(**aes, 0, 4096) != encrypted(**aes, 8192, 4096));
    CHECK(encrypted(**aes, 0, 4096) == encrypted(**aes, 0, 8192));
}

TEST_CASE("qcow2 encryption: lists of odd pieces give what one piece gives", "[qcow2][crypto]") {
    auto cipher = legacy_cipher(crypto::SecretBytes(kPassphrase));
    REQUIRE(cipher);
    const Bytes plain = pattern(8192, 5);
    Bytes whole = plain;
    const iovec one{whole.data(), whole.size()};
    REQUIRE((*cipher)->encrypt(1 << 20, 0, IoVec(one)));
    const std::vector<std::vector<size_t>> cuts = {
        {1, 8191},    {511, 1, 512, 7168}, {513, 0, 511, 1, 1, 1, 7165}, {100, 100, 100, 100, 100, 100, 100, 7492},
        {4096, 4096}, {8000, 192}};
    for (const auto& lengths : cuts) {
        Bytes data = plain;
        std::vector<iovec> list;
        size_t at = 0;
        for (const size_t length : lengths) {
            list.push_back({data.data() + at, length});
            at += length;
        }
        REQUIRE(at == data.size());
        const IoVec iov(list.data(), static_cast<uint32_t>(list.size()), data.size());
        REQUIRE((*cipher)->encrypt(1 << 20, 0, iov));
        CHECK(data == whole);
        REQUIRE((*cipher)->decrypt(1 << 20, 0, iov));
        CHECK(data == plain);
    }
}

TEST_CASE("qcow2 encryption: what a new image can have", "[qcow2][crypto][create]") {
    Bench b;
    const auto wanted = [&](std::string text) {
        for (char& c : text) {
            if (c == '\'') c = '"';
        }
        return new_encryption(json::parse(text).as_object(), b.graph->secrets());
    };
    auto luks = wanted("{'format': 'luks', 'key-secret': 's'}");
    REQUIRE(luks);
    CHECK(luks->crypt_method == kCryptLuks);
    CHECK(luks->area_bytes == 0x1f9000);
    CHECK(wanted("{'format': 'luks'}")
              .error()
              .message()
              .starts_with("Parameter 'encrypt.key-secret' is required for cipher"));
    CHECK(wanted("{'format': 'luks', 'key-secret': 'x'}").error().message() == "No secret with id 'x'");
    CHECK(wanted("{'format': 'qcow', 'key-secret': 's'}").error().message().find("not secure") != std::string::npos);
}

TEST_CASE("qcow2 encryption: key slots of an image are changed by its options", "[qcow2][crypto][amend]") {
    Bench b;
    auto scratch = b.rt.run(b.graph->add({{"driver", "memory"}, {"node-name", "scratch"}, {"size", 4 << 20}}));
    REQUIRE(scratch);
    NewEncryption wanted{kCryptLuks, crypto::luks_area_bytes(quick()), quick(), crypto::SecretBytes(kPassphrase)};
    Image image;
    image.header.crypt_method = kCryptLuks;
    image.extensions.crypto = CryptoExtension{kLuksAt, wanted.area_bytes};
    auto cipher = b.rt.run(write_encryption(std::move(wanted), **scratch, kLuksAt));
    REQUIRE(cipher);
    b.secret("n", "new one");
    const auto amend = [&](json::object options, bool force = false) {
        return error_of(b.rt.run(
            amend_encryption(cipher->get(), image, **scratch, std::move(options), b.graph->secrets(), force, "q")));
    };
    const auto opens = [&](std::string_view id) {
        const json::object options{{"encrypt", json::object{{"format", "luks"}, {"key-secret", id}}}};
        return b.rt.run(open_encryption(**scratch, image, options, b.graph->secrets(), false, "q")).has_value();
    };
    CHECK_FALSE(opens("n"));
    CHECK(amend({{"format", "luks"}, {"state", "active"}, {"new-secret", "n"}, {"iter-time", 0}}).empty());
    CHECK(opens("n"));
    CHECK(amend({{"format", "luks"}, {"state", "inactive"}, {"old-secret", "s"}}).empty());
    CHECK_FALSE(opens("s"));
    CHECK((*cipher)->info().at("slots").at(0).at("active") == false);
    CHECK(amend({{"format", "luks"}, {"state", "inactive"}, {"old-secret", "n"}})
              .starts_with("All the active keyslots match the (old) password"));
    CHECK(amend({{"format", "qcow"}}).starts_with("Amend can't be used to change the qcow2 encryption format"));
    image.header.crypt_method = kCryptAes;
    CHECK(amend({{"format", "luks"}}).starts_with("Only LUKS encryption options can be amended"));
    image.header.crypt_method = kCryptNone;
    CHECK(amend({{"format", "luks"}}).starts_with("image is not encrypted, can't amend"));
}

TEST_CASE("qcow2 encryption: qemu-img opens with the passphrases that were put in",
          "[qcow2][crypto][amend][interop][once]") {
    Bench b;
    if (!Bench::has_tool("qemu-img") || !Bench::has_tool("qemu-io")) {
        WARN("skipped: qemu-img and qemu-io are not installed");
        return;
    }
    b.secret("n", "new one");
    const std::string path = b.dir.file("i.qcow2");
    const std::string secrets =
        " --object 'secret,id=s,data=" + std::string(kPassphrase) + "' --object 'secret,id=n,data=new one' ";
    const std::string make = "qemu-img create -q -f qcow2" + secrets +
                             "-o encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10 " + path + " 4M";
    Bench::sh(make);
    const auto opens = [&](const std::string& id) {
        return shell("qemu-io" + secrets + "--image-opts -c 'read -P 0 0 512' driver=qcow2,file.filename=" + path +
                     ",encrypt.format=luks,encrypt.key-secret=" + id)
                   .status == 0;
    };
    REQUIRE(opens("s"));
    const auto amend = [&](std::string_view with, json::object encrypt, bool force = false) {
        json::object options = Bench::with("luks", with);
        options["read-only"] = false;
        const std::string opened = b.open_file(path, std::move(options));
        if (!opened.empty()) return opened;
        const std::string error = error_of(b.rt.run(
            block::amend_image(*b.graph, *b.node, {{"driver", "qcow2"}, {"encrypt", std::move(encrypt)}}, force)));
        b.close();
        return error;
    };
    CHECK(amend("s", {{"format", "luks"}, {"state", "active"}, {"new-secret", "n"}, {"iter-time", 20}}).empty());
    CHECK(opens("s"));
    CHECK(opens("n"));
    CHECK(amend("n", {{"format", "luks"}, {"state", "inactive"}, {"keyslot", 0}}).empty());
    CHECK_FALSE(opens("s"));
    CHECK(opens("n"));
    CHECK(amend("n", {{"format", "luks"}, {"state", "active"}, {"new-secret", "s"}, {"keyslot", 1}, {"iter-time", 20}},
                true)
              .empty());
    CHECK(opens("s"));
    CHECK_FALSE(opens("n"));
    Bench::sh("qemu-img check -q" + secrets + "--image-opts driver=qcow2,file.filename=" + path +
              ",encrypt.format=luks,encrypt.key-secret=s");
}

}  // namespace gantry::test
