#include "block/create.h"

#include <algorithm>

#include "block/graph.h"
#include "schema/scalar_text.h"

namespace gantry::block {

namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kMaxDisk = INT64_MAX - (kSector - 1);

const Creator* creator(const Graph& graph, std::string_view driver) {
    const Driver* row = graph.driver(driver);
    return row ? row->creator : nullptr;
}

std::unexpected<Error> wrong(std::string_view name, std::string_view expected, const std::string& value) {
    return fail(ErrorKind::kInvalid, "Parameter '{}' expects {}; it is '{}'", name, expected, value);
}

}  // namespace

Result<> check_creatable(const Graph& graph, std::string_view driver) {
    const Creator* found = creator(graph, driver);
    if (found && found->create) return {};
    return fail(ErrorKind::kUnsupported, "Driver does not support blockdev-create; driver '{}'", driver);
}

Task<Result<>> create_image(Graph& graph, json::object options, Progress progress) {
    const std::string driver(options.at("driver").as_string());
    CO_CHECK(check_creatable(graph, driver));
    co_return co_await creator(graph, driver)->create(graph, std::move(options), std::move(progress));
}

Task<Result<>> create_image_file(Graph& graph, std::string format, std::string filename, CreationWords words,
                                 Progress progress) {
    const Driver* driver = graph.driver(format);
    if (!driver) co_return fail(ErrorKind::kInvalid, "{}: Unknown file format '{}'", filename, format);
    const Creator* found = driver->creator;
    if (!found || !found->create_file) {
        co_return fail(ErrorKind::kUnsupported, "{}: Format driver '{}' does not support image creation", filename,
                       format);
    }
    Result<> made = check_words(*found, words, format);
    if (made) made = co_await found->create_file(graph, filename, std::move(words), std::move(progress));
    if (!made) co_return std::unexpected(std::move(made).error().context(filename));
    co_return Result<>();
}

Result<> check_words(const Creator& creator, const CreationWords& words, std::string_view format) {
    const auto known = creator.words();
    for (const auto& [name, value] : words) {
        if (std::ranges::find(known, name, &CreationOption::name) != known.end()) continue;
        return fail(ErrorKind::kInvalid, "Invalid parameter '{}'; format '{}' has no such option", name, format);
    }
    return {};
}

std::span<const CreationOption> creation_options(const Graph& graph, std::string_view format) {
    const Creator* found = creator(graph, format);
    return found && found->create_file ? found->words() : std::span<const CreationOption>();
}

std::optional<std::string> word(const CreationWords& words, std::string_view name) {
    for (auto it = words.rbegin(); it != words.rend(); ++it) {
        if (it->first == name) return it->second;
    }
    return std::nullopt;
}

Result<std::optional<uint64_t>> size_word(const CreationWords& words, std::string_view name) {
    const auto text = word(words, name);
    if (!text) return std::nullopt;
    const auto value = schema::parse_size_text(*text);
    if (!value) return wrong(name, "a size: a number of bytes with an optional suffix k, M, G, T, P or E", *text);
    return value;
}

Result<std::optional<uint64_t>> number_word(const CreationWords& words, std::string_view name) {
    const auto text = word(words, name);
    if (!text) return std::nullopt;
    const auto value = schema::parse_unsigned_text(*text);
    if (!value) return wrong(name, "a number", *text);
    return value;
}

Result<std::optional<bool>> flag_word(const CreationWords& words, std::string_view name) {
    const auto text = word(words, name);
    if (!text) return std::nullopt;
    const auto value = schema::parse_bool_text(*text);
    if (!value) return wrong(name, "'on' or 'off'", *text);
    return value;
}

Result<uint64_t> disk_size_word(const CreationWords& words) {
    TRY(const auto size, size_word(words, "size"));
    if (!size) return fail(ErrorKind::kInvalid, "Image creation needs a size parameter");
    if (*size > kMaxDisk) {
        return fail(ErrorKind::kTooLarge, "Invalid image size specified. Must be between 0 and {}; it is {}", INT64_MAX,
                    *size);
    }
    return (*size + kSector - 1) / kSector * kSector;
}

Result<Preallocation> preallocation_named(std::string_view name, std::string_view value) {
    for (const auto mode :
         {Preallocation::kOff, Preallocation::kMetadata, Preallocation::kFalloc, Preallocation::kFull}) {
        if (name_of(mode) == value) return mode;
    }
    return fail(ErrorKind::kInvalid, "Parameter '{}' does not accept value '{}'", name, value);
}

std::string_view name_of(Preallocation preallocation) {
    switch (preallocation) {
        case Preallocation::kOff:
            return "off";
        case Preallocation::kMetadata:
            return "metadata";
        case Preallocation::kFalloc:
            return "falloc";
        case Preallocation::kFull:
            return "full";
    }
    return "";
}

}  // namespace gantry::block
