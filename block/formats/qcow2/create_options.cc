#include "block/formats/qcow2/create_options.h"

#include <algorithm>
#include <array>
#include <bit>
#include <optional>

#include "schema/schema.h"
#include "schema/validate.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kSector = 512;

Result<uint32_t> cluster_bits_of(uint64_t bytes) {
    if (!std::has_single_bit(bytes) || bytes < uint64_t{1} << kMinClusterBits ||
        bytes > uint64_t{1} << kMaxClusterBits) {
        return fail(ErrorKind::kInvalid, "Cluster size must be a power of two between {} and {}k; it is {}",
                    uint64_t{1} << kMinClusterBits, (uint64_t{1} << kMaxClusterBits) / 1024, bytes);
    }
    return static_cast<uint32_t>(std::countr_zero(bytes));
}

Result<uint32_t> refcount_order_of(int64_t bits) {
    if (bits < 1 || bits > 64 || !std::has_single_bit(static_cast<uint64_t>(bits))) {
        return fail(ErrorKind::kInvalid, "Refcount width must be a power of two and may not exceed 64 bits; it is {}",
                    bits);
    }
    return static_cast<uint32_t>(std::countr_zero(static_cast<uint64_t>(bits)));
}

/// Version 2 has none of these.
Result<> check_version(const CreateOptions& o) {
    if (o.version >= 3) return {};
    const auto refuse = [](std::string_view what) {
        return fail(ErrorKind::kInvalid, "{} compatibility level 1.1 {}above (use version=v3 or greater)", what,
                    what.ends_with("with") ? "and " : "or ");
    };
    if (o.refcount_order != 4) return refuse("Different refcount widths than 16 bits require");
    if (o.lazy_refcounts) return refuse("Lazy refcounts only supported with");
    if (o.data_file) return refuse("External data files are only supported with");
    if (o.extended_l2) return refuse("Extended L2 entries are only supported with");
    if (o.compression_type != 0) return refuse("Non-zlib compression type is only supported with");
    return {};
}

Result<> check_combination(const CreateOptions& o) {
    if (o.extended_l2 && o.cluster_bits < kMinClusterBitsExtended) {
        return fail(ErrorKind::kInvalid,
                    "Extended L2 entries are only supported with cluster sizes of at least {} bytes; they are {}",
                    1u << kMinClusterBitsExtended, o.cluster_size());
    }
    if (!o.backing_file.empty() && o.preallocation != Preallocation::kOff && !o.extended_l2) {
        return fail(ErrorKind::kInvalid,
                    "Backing file and preallocation can only be used at the same time if extended_l2 is on");
    }
    if (o.data_file_raw && !o.backing_file.empty()) {
        return fail(ErrorKind::kInvalid, "Backing file and data-file-raw cannot be used at the same time");
    }
    if (o.data_file_raw && !o.data_file) return fail(ErrorKind::kInvalid, "data-file-raw requires data-file");
    if (!o.encrypt.empty() && o.version < 3 && o.preallocation != Preallocation::kOff) {
        // Without zero clusters, space that was never written would decrypt to noise.
        return fail(ErrorKind::kInvalid,
                    "Preallocation of encrypted images needs compatibility level 1.1 or above (use version=v3 or "
                    "greater)");
    }
    return {};
}

Result<> check_size(const CreateOptions& o) {
    const uint64_t entries = o.size > kMaxOffset ? kMaxL1Entries + 1 : o.geometry().l1_entries_for(o.size);
    if (entries <= kMaxL1Entries) return {};
    const uint32_t shift = o.geometry().l1_shift();
    const uint64_t most = kMaxL1Entries > kMaxOffset >> shift ? kMaxOffset / kSector * kSector : kMaxL1Entries << shift;
    return fail(ErrorKind::kTooLarge,
                "The image size is too large for file format 'qcow2' (try using a larger cluster size); with clusters "
                "of {} bytes it is at most {} bytes",
                o.cluster_size(), most);
}

// ---- Words ----

constexpr CreationOption kWords[] = {
    {"size", "size", "Virtual disk size"},
    {"compat", "str", "Compatibility level (v2 [0.10] or v3 [1.1])"},
    {"backing_file", "str", "File name of a base image"},
    {"backing_fmt", "str", "Image format of the base image"},
    {"cluster_size", "size", "Bytes of a cluster"},
    {"preallocation", "str", "Preallocation mode (off, metadata, falloc, full)"},
    {"lazy_refcounts", "bool (on/off)", "Reference counts may be written late"},
    {"refcount_bits", "num", "Width of a reference count in bits"},
    {"extended_l2", "bool (on/off)", "Clusters of 32 subclusters"},
    {"compression_type", "str", "Method of compressed clusters (zlib, zstd)"},
    {"data_file", "str", "File that holds the data; made too"},
    {"data_file_raw", "bool (on/off)", "The data file is always a raw image"},
    {"encrypt.format", "str", "Encrypt the image: luks"},
    {"encrypt.key-secret", "str", "ID of the secret object with the passphrase"},
    {"encrypt.cipher-alg", "str", "Name of the cipher"},
    {"encrypt.cipher-mode", "str", "Name of the cipher's mode"},
    {"encrypt.ivgen-alg", "str", "Name of the generator of initialisation vectors"},
    {"encrypt.ivgen-hash-alg", "str", "Name of the hash of that generator"},
    {"encrypt.hash-alg", "str", "Name of the hash of the key derivation"},
    {"encrypt.iter-time", "num", "Time that one try of the passphrase takes, in milliseconds"},
    {"encryption", "bool (on/off)", "The old encryption; refused"},
    {"nocow", "bool (on/off)", "Turn off copy-on-write (valid only on btrfs)"},
    {"extent_size_hint", "size", "Extent size hint for the image file, 0 to disable"},
};

struct Renamed {
    std::string_view word, member;
};
constexpr Renamed kStrings[] = {
    {"backing_file", "backing-file"}, {"backing_fmt", "backing-fmt"}, {"compression_type", "compression-type"}};
constexpr Renamed kFlags[] = {
    {"lazy_refcounts", "lazy-refcounts"}, {"extended_l2", "extended-l2"}, {"data_file_raw", "data-file-raw"}};

Result<> take_version(const CreationWords& words, json::object& out) {
    const auto compat = word(words, "compat");
    if (!compat) return {};
    if (*compat == "0.10" || *compat == "v2") {
        out["version"] = "v2";
    } else if (*compat == "1.1" || *compat == "v3") {
        out["version"] = "v3";
    } else {
        return fail(ErrorKind::kInvalid, "Parameter 'version' does not accept value '{}'; compat is 0.10 or 1.1",
                    *compat);
    }
    return {};
}

constexpr std::string_view kEncryptPrefix = "encrypt.";

/// The words "encrypt.*" as a validated QCryptoBlockCreateOptions; nullopt when there are none.
Result<std::optional<json::object>> encryption_from(const CreationWords& words) {
    TRY(const auto old, flag_word(words, "encryption"));
    json::object encrypt;
    for (const auto& [name, value] : words) {
        if (name.starts_with(kEncryptPrefix)) encrypt[name.substr(kEncryptPrefix.size())] = value;
    }
    if (old.value_or(false)) {
        if (encrypt.contains("format")) {
            return fail(ErrorKind::kInvalid, "Options encryption and encrypt.format are mutually exclusive");
        }
        encrypt["format"] = "aes";
    }
    if (encrypt.empty()) return std::nullopt;
    const auto format = encrypt.find("format");
    if (format == encrypt.end()) return fail(ErrorKind::kInvalid, "Parameter 'encrypt.format' is missing");
    // Commands have another name for the old method.
    if (format->value() == "aes") format->value() = "qcow";
    Result<json::object> valid =
        schema::validate(schema::type("QCryptoBlockCreateOptions"), std::move(encrypt), schema::InputMode::kKeyval);
    if (!valid) return std::unexpected(std::move(valid).error().context("encrypt"));
    return std::move(*valid);
}

}  // namespace

Geometry CreateOptions::geometry() const {
    Geometry g;
    g.cluster_bits = cluster_bits;
    g.extended_l2 = extended_l2;
    g.zero_flag = version >= 3;
    g.external_data = data_file;
    g.raw_external_data = data_file_raw;
    return g;
}

Result<CreateOptions> create_options(const schema::Options& options) {
    CreateOptions o;
    o.size = options.size("size");
    if (o.size % kSector != 0) {
        return fail(ErrorKind::kInvalid, "Image size must be a multiple of {} bytes; it is {}", kSector, o.size);
    }
    o.version = options.str("version", "v3") == "v2" ? 2 : 3;
    TRY(o.cluster_bits, cluster_bits_of(options.size("cluster-size", 65536)));
    o.extended_l2 = options.flag("extended-l2");
    TRY(o.preallocation, preallocation_named("preallocation", options.str("preallocation", "off")));
    o.lazy_refcounts = options.flag("lazy-refcounts");
    TRY(o.refcount_order, refcount_order_of(options.integer("refcount-bits", 16)));
    o.compression_type = options.str("compression-type", "zlib") == "zstd" ? 1 : 0;
    o.data_file = options.has("data-file");
    o.data_file_raw = options.flag("data-file-raw");
    o.backing_file = options.str("backing-file");
    if (options.has("backing-fmt") && !options.has("backing-file")) {
        return fail(ErrorKind::kInvalid, "Backing format cannot be used without backing file");
    }
    if (!o.backing_file.empty()) o.backing_format = options.str("backing-fmt");
    if (options.has("encrypt")) o.encrypt = options.object("encrypt");
    CHECK_OK(check_version(o));
    CHECK_OK(check_combination(o));
    CHECK_OK(check_size(o));
    // A raw data file is complete by itself; its image says so of every cluster.
    if (o.data_file_raw && o.preallocation == Preallocation::kOff) o.preallocation = Preallocation::kMetadata;
    return o;
}

std::span<const CreationOption> creation_words() { return kWords; }

Result<json::object> options_from_words(const CreationWords& words) {
    json::object out{{"driver", "qcow2"}};
    TRY(const uint64_t size, disk_size_word(words));
    out["size"] = size;
    CHECK_OK(take_version(words, out));
    for (const Renamed& r : kStrings) {
        if (const auto value = word(words, r.word)) out[r.member] = *value;
    }
    for (const Renamed& r : kFlags) {
        TRY(const auto value, flag_word(words, r.word));
        if (value) out[r.member] = *value;
    }
    TRY(const auto cluster_size, size_word(words, "cluster_size"));
    if (cluster_size) out["cluster-size"] = *cluster_size;
    TRY(const auto refcount_bits, number_word(words, "refcount_bits"));
    if (refcount_bits) out["refcount-bits"] = *refcount_bits;
    if (const auto value = word(words, "preallocation")) {
        TRY([[maybe_unused]] const Preallocation mode, preallocation_named("preallocation", *value));
        out["preallocation"] = *value;
    }
    if (const auto value = word(words, "compression_type"); value && *value != "zlib" && *value != "zstd") {
        return fail(ErrorKind::kInvalid, "Parameter 'compression-type' does not accept value '{}'", *value);
    }
    TRY(auto encrypt, encryption_from(words));
    if (encrypt) out["encrypt"] = std::move(*encrypt);
    if (out.contains("backing-file") && !out.contains("backing-fmt")) {
        return fail(ErrorKind::kInvalid, "Backing file specified without backing format; give backing_fmt");
    }
    return out;
}

}  // namespace gantry::block::qcow2
