// gantry image measure: how large an image would be.

#include "block/measure.h"
#include "cli/image/creation_words.h"
#include "cli/image/image_tool.h"
#include "cli/readable.h"

namespace gantry::cli::image {

namespace {

constexpr OptionSpec kOptions[] = {
    {"output-format", 'O', true, "FORMAT", "of the image to be made (default: qcow2)"},
    {"option", 'o', true, "NAME=VALUE,...", "its creation options"},
    {"size", 0, true, "SIZE", "of an empty disk, instead of IMAGE"},
};
constexpr Usage kUsage{.name = "measure",
                       .line = "[OPTION]... IMAGE | --size SIZE",
                       .doc =
                           "Computes how many bytes the file of a new image takes: with the data of IMAGE, and when "
                           "everything has been written.",
                       .options = kOptions,
                       .min_names = 0,
                       .max_names = 1};

Result<block::MeasureResult> measure(ImageTool& tool) {
    const Words& words = tool.words();
    if (words.names.empty() == !words.has("size"))
        return fail(ErrorKind::kInvalid, "either an image or --size says what to measure");
    block::MeasureSource source;
    if (words.has("size")) {
        TRY(source.size, parse_size(words.value("size")));
    } else {
        TRY(source.source, tool.open(words.names[0], ImageTool::Access::kRead, ImageTool::Backing::kFollow));
        source.size = source.source->size();
    }
    TRY(block::CreationWords creation, creation_words(words));
    const std::string format = words.has("output-format") ? words.value("output-format") : "qcow2";
    return tool.run(block::measure_image(tool.graph(), format, source, std::move(creation)));
}

}  // namespace

int measure_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kUsage, arguments, status);
    if (!tool) return status;
    auto result = measure(*tool);
    if (!result) return tool->failed(result.error());
    if (tool->json()) {
        json::object out{{"required", result->required}, {"fully-allocated", result->fully_allocated}};
        if (result->bitmaps) out["bitmaps"] = *result->bitmaps;
        tool->print_json(out);
        return kOk;
    }
    std::printf("required: %s\nfully allocated: %s\n", readable_size(result->required).c_str(),
                readable_size(result->fully_allocated).c_str());
    if (result->bitmaps) std::printf("bitmaps: %s\n", readable_size(*result->bitmaps).c_str());
    return kOk;
}

}  // namespace gantry::cli::image
