#include "cli/image/image_tool.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>

#include "block/formats/image_reference.h"
#include "runtime/log.h"
#include "schema/json_dialect.h"
#include "schema/keyval.h"
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

Result<uint64_t> parse_size(std::string_view text, uint64_t base) {
    const auto bad = [&] {
        return fail(ErrorKind::kInvalid,
                    "Invalid image size '{}'; bytes, or a number with k, M, G, T, P or E behind it", text);
    };
    std::string_view rest = text;
    const char sign = rest.starts_with('+') || rest.starts_with('-') ? rest[0] : 0;
    if (sign) rest.remove_prefix(1);
    uint64_t number = 0;
    auto [end, error] = std::from_chars(rest.data(), rest.data() + rest.size(), number);
    if (error != std::errc() || end == rest.data()) return bad();
    rest.remove_prefix(static_cast<size_t>(end - rest.data()));
    unsigned shift = 0;
    if (!rest.empty()) {
        constexpr std::string_view kSuffixes = "bkmgtpe";
        const size_t at = kSuffixes.find(static_cast<char>(std::tolower(static_cast<unsigned char>(rest[0]))));
        if (at == std::string_view::npos || rest.size() > 1) return bad();
        shift = static_cast<unsigned>(at) * 10;
    }
    if (number > (static_cast<uint64_t>(INT64_MAX) >> shift)) return bad();
    number <<= shift;
    if (sign == '+') {
        if (number > static_cast<uint64_t>(INT64_MAX) - base) return bad();
        return base + number;
    }
    if (sign == '-') {
        if (number > base) return fail(ErrorKind::kInvalid, "'{}' is more than the image's {} bytes", text, base);
        return base - number;
    }
    return number;
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
    if (bar_shown_) std::fputs("\n", stderr);
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

Result<json::object> ImageTool::definition(const std::string& image, Access access, std::string format) {
    const bool write = access == Access::kWrite;
    if (words_.has("image-opts")) {
        TRY(json::object options, schema::parse_option(schema::type("BlockdevOptions"), image, "driver"));
        options["read-only"] = !write;
        if (access == Access::kShared) options["force-share"] = true;
        return options;
    }
    json::object file;
    if (image.starts_with("json:")) {
        TRY(json::object options, block::json_name_options(image));
        options["read-only"] = !write;
        return options;
    }
    struct stat st{};
    if (::stat(image.c_str(), &st) != 0) return fail_errno(errno, "Could not open '{}'", image);
    file = {{"driver", S_ISBLK(st.st_mode) ? "host_device" : "file"},
            {"node-name", "image-file"},
            {"filename", image},
            {"read-only", !write},
            {"discard", "unmap"}};
    if (access == Access::kShared) file["force-share"] = true;
    TRY(auto added, daemon_->execute("blockdev-add", std::move(file)));
    (void)added;
    if (format.empty()) format = words_.value("format");
    if (format.empty()) {
        TRY(format, run(graph().probe(*graph().find("image-file"))));
        if (format == "raw" && write) {
            return fail(ErrorKind::kInvalid,
                        "'{}' shows no known format, and a probed raw image is never changed; say --format raw if that "
                        "is what it is",
                        image);
        }
    }
    return json::object{{"driver", format}, {"file", "image-file"}, {"read-only", !write}, {"discard", "unmap"}};
}

/// Whether the driver of a definition takes the option.
bool ImageTool::has_option(const json::object& definition, std::string_view name) const {
    const json::value* driver = definition.if_contains("driver");
    if (!driver || !driver->is_string()) return false;
    json::object trial{{"driver", *driver}, {"file", "image-file"}, {std::string(name), nullptr}};
    return schema::validate(schema::type("BlockdevOptions"), std::move(trial)).has_value();
}

Result<block::Node*> ImageTool::open(const std::string& image, Access access, Backing backing, std::string format) {
    TRY(json::object options, definition(image, access, std::move(format)));
    options["node-name"] = "image";
    if (backing == Backing::kIgnore && !options.contains("backing") && has_option(options, "backing"))
        options["backing"] = nullptr;
    if (access == Access::kShared) options["force-share"] = true;
    auto added = daemon_->execute("blockdev-add", std::move(options));
    if (!added) return std::unexpected(std::move(added).error().context(fmt::format("Could not open '{}'", image)));
    return graph().find("image");
}

block::Progress ImageTool::progress(std::string what) {
    const bool show = words_.has("progress") || ::isatty(STDERR_FILENO);
    return [this, show, what = std::move(what), last = -1](uint64_t done, uint64_t total) mutable {
        const int percent =
            total == 0 ? 100 : static_cast<int>(static_cast<double>(done) * 100 / static_cast<double>(total));
        if (show && percent != last) {
            last = percent;
            bar_shown_ = true;
            const int filled = std::min(percent, 100) * 40 / 100;
            std::fprintf(stderr, "\r%s [%s%s] %3d%%", what.c_str(),
                         std::string(static_cast<size_t>(filled), '#').c_str(),
                         std::string(static_cast<size_t>(40 - filled), ' ').c_str(), percent);
            std::fflush(stderr);
        }
        return !daemon_->quitting();
    };
}

int ImageTool::failed(const Error& error) {
    if (std::exchange(bar_shown_, false)) std::fputs("\n", stderr);
    std::fprintf(stderr, "gantry image %s: %s\n", std::string(usage_.name).c_str(), error.message().c_str());
    return kFailed;
}

void ImageTool::print_json(const json::value& value) {
    std::printf("%s\n", schema::to_json(value, schema::JsonLayout::kPretty).c_str());
}

}  // namespace gantry::cli::image
