#include "cli/image/image_tool.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>

#include "block/formats/image_reference.h"
#include "cli/image/image_definition.h"
#include "runtime/log.h"
#include "schema/json_dialect.h"
#include "schema/scalar_text.h"
#include "schema/schema.h"
#include "schema/validate.h"

namespace gantry::cli::image {

namespace {

constexpr OptionSpec kCommon[] = {
    {"format", 'f', true, "FORMAT", "the image format (default: found out from its first bytes)"},
    {"image-opts", 0, false, "", "IMAGE is a definition: driver=qcow2,file.driver=file,file.filename=..."},
    {"object", 0, true, "DEFINITION", "make an object, for example secret,id=s0,file=PATH"},
    {"json", 0, false, "", "print JSON"},
    {"progress", 0, false, "", "show progress even when the output is no terminal"},
    {"help", 'h', false, "", "show this"},
};

std::vector<OptionSpec> all_options(const Usage& usage) {
    std::vector<OptionSpec> all(usage.options.begin(), usage.options.end());
    for (const OptionSpec& common : kCommon) {
        bool own = false;
        for (const OptionSpec& o : usage.options) own |= o.name == common.name;
        if (!own) all.push_back(common);
    }
    return all;
}

/// Splits names from options; a word after an option that takes a value belongs to it.
Result<Words> split(const Usage& usage, std::span<const char* const> arguments) {
    const std::vector<OptionSpec> specs = all_options(usage);
    Words out;
    std::vector<const char*> words;
    bool value_follows = false, names_only = false;
    for (const char* raw : arguments) {
        const std::string_view word = raw;
        if (!value_follows && word == "--") {
            names_only = true;
            continue;
        }
        // "-5G" is a size, not an option.
        const bool number = word.size() > 1 && word[0] == '-' && word[1] >= '0' && word[1] <= '9';
        if (names_only || (!value_follows && (!word.starts_with("-") || word.size() == 1 || number))) {
            out.names.emplace_back(word);
            continue;
        }
        words.push_back(raw);
        const bool was_value = std::exchange(value_follows, false);
        for (const OptionSpec& spec : specs) {
            if (was_value || !spec.takes_value) continue;
            if (word == fmt::format("--{}", spec.name) ||
                (spec.short_name && word == fmt::format("-{}", spec.short_name)))
                value_follows = true;
        }
    }
    TRY(out.options, parse_options(specs, words));
    return out;
}

}  // namespace

bool Words::has(std::string_view option) const {
    return std::ranges::any_of(options, [&](const OptionUse& o) { return o.name == option; });
}
std::string Words::value(std::string_view option) const {
    std::string last;
    for (const OptionUse& o : options) {
        if (o.name == option) last = o.value;
    }
    return last;
}

Result<uint64_t> parse_size(std::string_view text, std::optional<uint64_t> base) {
    const char sign = text.starts_with('+') || text.starts_with('-') ? text[0] : 0;
    const std::string_view rest = text.substr(sign ? 1 : 0);
    const bool digit = !rest.empty() && rest[0] >= '0' && rest[0] <= '9';
    const std::optional<uint64_t> number = digit ? schema::parse_size_text(rest) : std::nullopt;
    constexpr auto kMax = static_cast<uint64_t>(INT64_MAX);
    if (!number || *number > kMax || (sign && !base) || (sign == '+' && *number > kMax - *base)) {
        return fail(ErrorKind::kInvalid,
                    "Invalid image size '{}'; bytes, or a number with k, M, G, T, P or E behind it, less than 8E",
                    text);
    }
    if (sign == '+') return *base + *number;
    if (sign != '-') return *number;
    if (*number > *base) return fail(ErrorKind::kInvalid, "'{}' is more than the image's {} bytes", text, *base);
    return *base - *number;
}

std::unique_ptr<ImageTool> ImageTool::create(const Usage& usage, std::span<const char* const> arguments, int& status) {
    status = kFailed;
    auto words = split(usage, arguments);
    if (!words) {
        std::fprintf(stderr, "gantry image %s: %s\n", std::string(usage.name).c_str(), words.error().message().c_str());
        return nullptr;
    }
    if (words->has("help")) {
        const std::string line = fmt::format("Usage: gantry image {} {}\n\n{}\n\n{}", usage.name, usage.line, usage.doc,
                                             options_help(all_options(usage)));
        std::fputs(line.c_str(), stdout);
        status = kOk;
        return nullptr;
    }
    std::unique_ptr<ImageTool> tool(new ImageTool(usage, std::move(*words)));
    const size_t names = tool->words_.names.size();
    Result<> ready;
    if (names < usage.min_names || names > usage.max_names) {
        ready = fail(ErrorKind::kInvalid, "{} arguments; usage: gantry image {} {}",
                     names < usage.min_names ? "too few" : "too many", usage.name, usage.line);
    } else {
        ready = tool->set_up();
    }
    if (!ready) {
        tool->failed(ready.error());
        return nullptr;
    }
    return tool;
}

ImageTool::~ImageTool() {
    if (daemon_) daemon_->shut_down();
}

Result<> ImageTool::set_up() {
    log::set_level(log::Level::kWarn);
    DaemonSettings settings;
    settings.runtime.io_loops = 0;
    TRY(daemon_, Daemon::create(std::move(settings)));
    // Metadata is all these look at and change: an encrypted image needs no passphrase for them.
    constexpr std::string_view kMetadataOnly[] = {"info", "map", "check", "snapshot"};
    graph().opens_locked = std::ranges::find(kMetadataOnly, usage_.name) != std::end(kMetadataOnly);
    for (const OptionUse& option : words_.options) {
        if (option.name == "object") CHECK_OK(daemon_->apply(option));
    }
    return {};
}

/// The node below the image, for whoever finds out what the image is.
Result<> ImageTool::add_file(json::object file, Access access) {
    file["node-name"] = "image-file";
    file["read-only"] = access == Access::kRead || access == Access::kShared;
    file["discard"] = "unmap";
    if (access == Access::kShared) file["force-share"] = true;
    TRY(auto added, daemon_->execute("blockdev-add", std::move(file)));
    (void)added;
    return {};
}

/// As said by --format, or found out from the first bytes of "image-file".
Result<std::string> ImageTool::find_format(const std::string& image, bool write) {
    if (words_.has("format")) return words_.value("format");
    TRY(std::string format, run(graph().probe(*graph().find("image-file"))));
    if (format == "raw" && write) {
        return fail(ErrorKind::kInvalid,
                    "'{}' shows no known format, and a probed raw image is never changed; say --format raw if that "
                    "is what it is",
                    image);
    }
    return format;
}

/// What --image-opts or a json: name describe.
Result<json::object> ImageTool::described(const std::string& text, Access access) {
    TRY(ImageDefinition definition, parse_definition(text, words_.has("image-opts")));
    json::object& options = definition.options;
    const schema::Type& type = schema::type("BlockdevOptions");
    json::value* const file = options.if_contains("file");
    if (!options.contains("driver") && file && file->is_object()) {
        TRY(json::object below, schema::validate(type, std::move(file->get_object()), definition.mode));
        CHECK_OK(add_file(std::move(below), access));
        TRY(options["driver"], find_format(text, access == Access::kWrite || access == Access::kRepair));
        options["file"] = "image-file";
    }
    // The image says how it is encrypted; open() tries one, then the other.
    json::value* const encrypt = options.if_contains("encrypt");
    if (encrypt && encrypt->is_object() && !encrypt->get_object().contains("format")) {
        encrypt->get_object()["format"] = "luks";
        encryption_guessed_ = true;
    }
    return schema::validate(type, std::move(options), definition.mode);
}

Result<json::object> ImageTool::definition(const std::string& image, Access access, std::string format) {
    const bool write = access == Access::kWrite || access == Access::kRepair;
    json::object options;
    if (words_.has("image-opts") || image.starts_with("json:")) {
        TRY(options, described(image, access));
    } else {
        struct stat st{};
        json::object file{{"driver", file_driver(image)}, {"filename", image}};
        if (::stat(image.c_str(), &st) != 0) {
            // A file of that name comes first.
            if (!block::has_protocol_prefix(image)) return fail_errno(errno, "Could not open '{}'", image);
            TRY(file, block::protocol_options(image));
            TRY(file, schema::validate(schema::type("BlockdevOptions"), std::move(file)));
        }
        CHECK_OK(add_file(std::move(file), access));
        if (format.empty()) {
            TRY(format, find_format(image, write));
        }
        options = {{"driver", format}, {"file", "image-file"}, {"discard", "unmap"}};
    }
    options["read-only"] = !write;
    if (access == Access::kShared) options["force-share"] = true;
    return options;
}

/// Whether the driver of a definition takes the option.
bool ImageTool::has_option(const json::object& definition, std::string_view name) const {
    const json::value* driver = definition.if_contains("driver");
    if (!driver || !driver->is_string()) return false;
    json::object trial{{"driver", *driver}, {"file", "image-file"}, {std::string(name), nullptr}};
    return schema::validate(schema::type("BlockdevOptions"), std::move(trial)).has_value();
}

Result<block::Node*> ImageTool::open(const std::string& image, Access access, Backing backing, std::string format) {
    graph().opens_for_repair = access == Access::kRepair;
    TRY(json::object options, definition(image, access, std::move(format)));
    options["node-name"] = "image";
    if (backing == Backing::kIgnore && !options.contains("backing") && has_option(options, "backing"))
        options["backing"] = nullptr;
    auto added = daemon_->execute("blockdev-add", options);
    if (!added && encryption_guessed_ && added.error().message().find("reported 'aes'") != std::string::npos) {
        options["encrypt"].as_object()["format"] = "aes";
        added = daemon_->execute("blockdev-add", std::move(options));
    }
    if (!added) return std::unexpected(std::move(added).error().context(fmt::format("Could not open '{}'", image)));
    return graph().find("image");
}

block::Progress ImageTool::progress(std::string what) {
    bar_.begin(std::move(what), words_.has("progress") || ::isatty(STDERR_FILENO));
    return [this](uint64_t done, uint64_t total) {
        bar_.update(done, total);
        return !daemon_->quitting();
    };
}

int ImageTool::failed(const Error& error) {
    bar_.finish(false);
    std::fprintf(stderr, "gantry image %s: %s\n", std::string(usage_.name).c_str(), error.message().c_str());
    return kFailed;
}

void ImageTool::print_json(const json::value& value) {
    std::printf("%s\n", schema::to_json(value, schema::JsonLayout::kPretty).c_str());
}

}  // namespace gantry::cli::image
