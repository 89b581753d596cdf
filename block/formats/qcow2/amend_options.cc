// The options of amend: read, checked against the image.

#include <bit>

#include "block/formats/qcow2/amend_steps.h"
#include "block/formats/qcow2/refusal.h"
#include "schema/scalar_text.h"
#include "schema/schema.h"
#include "schema/validate.h"

namespace gantry::block::qcow2 {

namespace {

using std::string_view;

Result<std::string> text_of(string_view key, const json::value& value) {
    if (value.is_string()) return std::string(value.get_string());
    return fail(ErrorKind::kInvalid, "Invalid parameter type for '{}', expected: string", key);
}

Result<bool> flag_of(string_view key, const json::value& value) {
    if (value.is_bool()) return value.get_bool();
    if (value.is_string()) {
        if (const auto flag = schema::parse_bool_text(value.get_string())) return *flag;
    }
    return fail(ErrorKind::kInvalid, "Parameter '{}' expects 'on' or 'off'", key);
}

Result<uint64_t> number_of(string_view key, const json::value& value, bool is_size) {
    std::optional<uint64_t> number;
    if (value.is_uint64()) number = value.get_uint64();
    if (value.is_int64() && value.get_int64() >= 0) number = static_cast<uint64_t>(value.get_int64());
    if (value.is_string()) {
        const string_view text = value.get_string();
        number = is_size ? schema::parse_size_text(text) : schema::parse_unsigned_text(text);
    }
    if (number) return *number;
    return fail(ErrorKind::kInvalid, "Parameter '{}' expects {}", key,
                is_size ? "a non-negative number below 2^64" : "a number");
}

Result<> take_compat(const std::string& text, AmendChange& change) {
    if (text == "0.10" || text == "v2") {
        change.version = 2;
    } else if (text == "1.1" || text == "v3") {
        change.version = 3;
    } else {
        return fail(ErrorKind::kInvalid, "Unknown compatibility level {}", text);
    }
    return {};
}

Result<> take_refcount_bits(uint64_t bits, AmendChange& change) {
    if (bits == 0 || bits > 64 || !std::has_single_bit(bits)) {
        return fail(ErrorKind::kInvalid, "Refcount width must be a power of two and may not exceed 64 bits");
    }
    change.refcount_order = static_cast<uint32_t>(std::countr_zero(bits));
    return {};
}

Result<> take_data_file_raw(const Header& h, bool raw, AmendChange& change) {
    const bool is_raw = h.has_autoclear(kAutoclearRawData);
    if (raw && !is_raw) return fail(ErrorKind::kInvalid, "data-file-raw cannot be set on existing images");
    change.drop_data_file_raw = is_raw && !raw;
    return {};
}

Result<> take_encrypt(const Header& h, const json::value& value, AmendChange& change) {
    if (!value.is_object()) return fail(ErrorKind::kInvalid, "Invalid parameter type for 'encrypt', expected: object");
    json::object encrypt = value.get_object();
    if (h.crypt_method == 0) return fail(ErrorKind::kInvalid, "image is not encrypted, can't amend");
    const json::value* format = encrypt.if_contains("format");
    if (h.crypt_method != 2) {
        return fail(ErrorKind::kInvalid, "Only LUKS encryption options can be amended for qcow2 with blockdev-amend");
    }
    if (format && (!format->is_string() || format->get_string() != "luks")) {
        return fail(ErrorKind::kInvalid, "Amend can't be used to change the qcow2 encryption format");
    }
    encrypt.erase("format");
    // From a command line every scalar is text; from QMP it has been checked already.
    bool all_text = true;
    for (const auto& member : encrypt) all_text &= member.value().is_string();
    const schema::Type& type = schema::type("QCryptoBlockAmendOptionsLUKS");
    TRY(change.luks,
        schema::validate(type, std::move(encrypt), all_text ? schema::InputMode::kKeyval : schema::InputMode::kJson));
    return {};
}

Result<> take_option(const Image& image, string_view key, const json::value& value, AmendChange& change) {
    const Header& h = image.header;
    if (key == "driver") return {};
    if (key == "compat" || key == "version") {
        TRY(const std::string text, text_of(key, value));
        return take_compat(text, change);
    }
    if (key == "refcount_bits") {
        TRY(const uint64_t bits, number_of(key, value, false));
        return take_refcount_bits(bits, change);
    }
    if (key == "lazy_refcounts") {
        TRY(change.lazy_refcounts, flag_of(key, value));
        return {};
    }
    if (key == "size") {
        TRY(change.size, number_of(key, value, true));
        return {};
    }
    if (key == "data_file") {
        if (!h.has_incompatible(kIncompatDataFile)) {
            return fail(ErrorKind::kInvalid, "data-file can only be set for images that use an external data file");
        }
        TRY(change.data_file, text_of(key, value));
        return {};
    }
    if (key == "data_file_raw") {
        TRY(const bool raw, flag_of(key, value));
        return take_data_file_raw(h, raw, change);
    }
    if (key == "encrypt") return take_encrypt(h, value, change);
    if (key == "backing_file" || key == "backing_fmt") {
        return fail(ErrorKind::kUnsupported, "Cannot amend the backing file; You can use 'qemu-img rebase' instead.");
    }
    for (string_view fixed : {"cluster_size", "preallocation", "compression_type", "extended_l2", "encryption"}) {
        if (key != fixed) continue;
        return fail(ErrorKind::kUnsupported, "Invalid parameter '{}'; This option is only supported for image creation",
                    key);
    }
    return fail(ErrorKind::kInvalid, "Invalid parameter '{}'", key);
}

}  // namespace

Result<AmendChange> parse_amend(const Image& image, std::string_view node, const json::object& options) {
    const Header& h = image.header;
    AmendChange change;
    change.version = h.version;
    change.refcount_order = h.refcount_order;
    for (const auto& member : options) CHECK_OK(take_option(image, member.key(), member.value(), change));

    if (change.version < 3 && change.lazy_refcounts.value_or(false)) {
        return fail(ErrorKind::kInvalid,
                    "Lazy refcounts only supported with compatibility level 1.1 and above (use compat=1.1 or greater)");
    }
    if (change.version < 3 && options.contains("refcount_bits") && change.refcount_order != 4) {
        return fail(ErrorKind::kInvalid,
                    "Refcount widths other than 16 bits require compatibility level 1.1 or above (use compat=1.1 or "
                    "greater)");
    }
    if (change.version < h.version) CHECK_OK(check_downgrade(image, node, change.refcount_order));
    return change;
}

}  // namespace gantry::block::qcow2
