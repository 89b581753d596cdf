#include "block/formats/qcow2/encryption.h"

#include "block/formats/qcow2/refusal.h"
#include "runtime/log.h"
#include "schema/options.h"

namespace gantry::block::qcow2 {

namespace {

std::string_view format_name(uint32_t method) { return method == kCryptLuks ? "luks" : "aes"; }

crypto::LuksArea area_of(const Image& image, Node& file) {
    return {&file, image.extensions.crypto->offset, image.extensions.crypto->length};
}

Error in_image(Error error, const Image& image, std::string_view node) {
    return Error(error.kind(),
                 fmt::format("{}; node '{}': LUKS header at offset {:#x}", error.message(), node,
                             image.extensions.crypto->offset),
                 error.errno_value());
}

/// What the header tells whoever has no passphrase.
Task<Result<json::object>> locked_info(Node& file, const Image& image, std::string node) {
    json::object info{{"format", format_name(image.header.crypt_method)}};
    if (image.header.crypt_method != kCryptLuks) co_return info;
    Result<crypto::LuksHeader> header = co_await crypto::load_luks_header(area_of(image, file));
    if (!header) co_return std::unexpected(in_image(std::move(header).error(), image, node));
    for (const auto& member : crypto::luks_info(*header)) info[member.key()] = member.value();
    co_return info;
}

Task<Result<std::unique_ptr<ClusterCipher>>> unlock(Node& file, const Image& image, crypto::SecretBytes passphrase,
                                                    std::string node) {
    if (image.header.crypt_method == kCryptAes) {
        log::warn(
            "node '{}': the AES-CBC encryption of this image is not secure and does not notice a wrong passphrase; "
            "convert it to encrypt.format=luks",
            node);
        co_return legacy_cipher(passphrase);
    }
    Result<crypto::LuksVolume> volume = co_await crypto::open_luks(area_of(image, file), std::move(passphrase));
    if (!volume) co_return std::unexpected(in_image(std::move(volume).error(), image, node));
    co_return luks_cipher(std::move(*volume));
}

}  // namespace

Task<Result<std::unique_ptr<ClusterCipher>>> open_encryption(Node& file, const Image& image,
                                                             const json::object& options,
                                                             const crypto::Secrets& secrets, bool locked,
                                                             std::string node) {
    const uint32_t method = image.header.crypt_method;
    static const json::object kNone;
    const json::value* given = options.if_contains("encrypt");
    const schema::Options o(given ? given->get_object() : kNone);
    if (method == kCryptNone) {
        if (!given) co_return std::unique_ptr<ClusterCipher>();
        co_return refuse(
            ErrorKind::kInvalid, node,
            fmt::format("No encryption in image header, but options specified format '{}'", o.str("format")),
            "crypt_method at byte 32 is {}", method);
    }
    if (given && o.str("format") != format_name(method)) {
        co_return refuse(ErrorKind::kInvalid, node,
                         fmt::format("Header reported '{}' encryption format but options specify '{}'",
                                     format_name(method), o.str("format")),
                         "crypt_method at byte 32 is {}", method);
    }
    if (!o.has("key-secret")) {
        if (locked) {
            CO_TRY(json::object info, co_await locked_info(file, image, node));
            co_return locked_cipher(node, std::move(info));
        }
        co_return refuse(ErrorKind::kInvalid, node, "Parameter 'encrypt.key-secret' is required for cipher",
                         "the image is encrypted ({}); give encrypt.format={} and in encrypt.key-secret the id of a "
                         "secret object",
                         format_name(method), format_name(method));
    }
    CO_TRY(crypto::SecretBytes passphrase, secrets.lookup_text(o.str("key-secret")));
    co_return co_await unlock(file, image, std::move(passphrase), node);
}

Result<NewEncryption> new_encryption(const json::object& encrypt, const crypto::Secrets& secrets) {
    NewEncryption wanted;
    TRY(wanted.area_bytes, new_encryption_bytes(encrypt));
    const schema::Options o(encrypt);
    wanted.crypt_method = kCryptLuks;
    TRY(wanted.luks, crypto::luks_format(encrypt));
    if (!o.has("key-secret")) {
        return fail(ErrorKind::kInvalid,
                    "Parameter 'encrypt.key-secret' is required for cipher; give the id of a secret object");
    }
    TRY(wanted.passphrase, secrets.lookup_text(o.str("key-secret")));
    return wanted;
}

Result<uint64_t> new_encryption_bytes(const json::object& encrypt) {
    const std::string format = schema::Options(encrypt).str("format");
    if (format != "luks") {
        return fail(ErrorKind::kUnsupported,
                    "Images with encrypt.format={} are not created any more; this encryption is not secure: use "
                    "encrypt.format=luks",
                    format);
    }
    TRY(const crypto::LuksFormat luks, crypto::luks_format(encrypt));
    return crypto::luks_area_bytes(luks);
}

Task<Result<std::unique_ptr<ClusterCipher>>> write_encryption(NewEncryption wanted, Node& file, uint64_t offset) {
    const crypto::LuksArea area{&file, offset, wanted.area_bytes};
    CO_TRY(crypto::LuksVolume volume, co_await crypto::create_luks(area, wanted.luks, std::move(wanted.passphrase)));
    co_return luks_cipher(std::move(volume));
}

Task<Result<>> amend_encryption(ClusterCipher* cipher, const Image& image, Node& file, json::object encrypt,
                                const crypto::Secrets& secrets, bool force, std::string node) {
    const uint32_t method = image.header.crypt_method;
    if (method == kCryptNone) {
        co_return refuse(ErrorKind::kInvalid, node, "image is not encrypted, can't amend",
                         "crypt_method at byte 32 is {}", method);
    }
    if (schema::Options(encrypt).str("format") != "luks") {
        co_return refuse(ErrorKind::kInvalid, node, "Amend can't be used to change the qcow2 encryption format",
                         "crypt_method at byte 32 is {}", method);
    }
    if (method != kCryptLuks) {
        co_return refuse(ErrorKind::kUnsupported, node,
                         "Only LUKS encryption options can be amended for qcow2 with blockdev-amend",
                         "crypt_method at byte 32 is {}", method);
    }
    crypto::LuksVolume* volume = cipher ? cipher->luks() : nullptr;
    if (!volume) {
        co_return fail(ErrorKind::kPermission, "node '{}': the image was opened without its passphrase", node);
    }
    CO_TRY(crypto::LuksAmend change, crypto::luks_amend(encrypt, secrets));
    Result<> amended = co_await crypto::amend_luks(area_of(image, file), *volume, std::move(change), force);
    if (!amended) co_return std::unexpected(in_image(std::move(amended).error(), image, node));
    log::info("node '{}': key slots changed, {} of {} are in use", node, volume->header.active_slots(),
              crypto::kLuksSlots);
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
