// Making images: one Creator for each driver that can, reached through its row in the driver table.

#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "block/image_operations.h"
#include "runtime/error.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::block {

class Graph;
struct MeasureResult;
struct MeasureSource;

/// One option of `gantry image create -o`, in the spelling that qemu-img has.
struct CreationOption {
    std::string_view name;  // "cluster_size"
    std::string_view kind;  // "size", "str", "num", "bool (on/off)"
    std::string_view doc;
};

/// name=value pairs as a person gives them; of a name given twice the last one counts.
using CreationWords = std::vector<std::pair<std::string, std::string>>;

/// How images of one driver are made. Main loop. The graph's lock is not held: a creator takes it for its own steps.
struct Creator {
    /// blockdev-create: `options` is a validated BlockdevCreateOptions of this driver. Null: not made that way.
    Task<Result<>> (*create)(Graph& graph, json::object options, Progress progress) = nullptr;
    /// The tool: makes the file too (and the data file). `words` hold `size`. What did not exist before is deleted when
    /// it fails.
    Task<Result<>> (*create_file)(Graph& graph, std::string filename, CreationWords words, Progress progress) = nullptr;
    /// block/measure.h; `words` hold `size`, the disk's. Null: not measured.
    Task<Result<MeasureResult>> (*measure)(MeasureSource what, CreationWords words) = nullptr;
    /// Of create_file and measure.
    std::span<const CreationOption> (*words)() = nullptr;
};

/// "Driver does not support blockdev-create" when there is no Creator: before anything is begun.
Result<> check_creatable(const Graph& graph, std::string_view driver);
/// blockdev-create with validated options.
Task<Result<>> create_image(Graph& graph, json::object options, Progress progress);
/// `gantry image create -f FORMAT -o WORDS FILENAME`. kInvalid: unknown words, missing size; kUnsupported: a format
/// that cannot be made.
Task<Result<>> create_image_file(Graph& graph, std::string format, std::string filename, CreationWords words,
                                 Progress progress);
/// Every word that `format` understands; empty when it cannot be made.
std::span<const CreationOption> creation_options(const Graph& graph, std::string_view format);

/// kInvalid "Invalid parameter 'x'" for a word that the format does not have.
Result<> check_words(const Creator& creator, const CreationWords& words, std::string_view format);

// ---- For creators ----

/// The value of the last word `name`.
std::optional<std::string> word(const CreationWords& words, std::string_view name);
/// nullopt when absent. kInvalid with the reference's sentence when it is not of that kind.
Result<std::optional<uint64_t>> size_word(const CreationWords& words, std::string_view name);
Result<std::optional<uint64_t>> number_word(const CreationWords& words, std::string_view name);
Result<std::optional<bool>> flag_word(const CreationWords& words, std::string_view name);
/// `size`, rounded up to whole sectors. "Image creation needs a size parameter".
Result<uint64_t> disk_size_word(const CreationWords& words);
/// kInvalid: "Parameter 'NAME' does not accept value 'V'".
Result<Preallocation> preallocation_named(std::string_view name, std::string_view value);
std::string_view name_of(Preallocation preallocation);

}  // namespace gantry::block
