// gantry image create: a new image.

#include "block/formats/image_reference.h"
#include "cli/image/creation_words.h"
#include "cli/image/image_tool.h"
#include "cli/readable.h"

namespace gantry::cli::image {

namespace {

constexpr OptionSpec kOptions[] = {
    {"format", 'f', true, "FORMAT", "the format to make (default: qcow2)"},
    {"option", 'o', true, "NAME=VALUE,...", "creation options; 'help' lists those of the format"},
    {"backing", 'b', true, "FILE", "the backing file, as the image is to name it"},
    {"backing-format", 'F', true, "FORMAT", "its format"},
    {"unsafe", 'u', false, "", "do not look at the backing file"},
};
constexpr Usage kUsage{.name = "create",
                       .line = "[OPTION]... IMAGE [SIZE]",
                       .doc =
                           "Makes an image. SIZE is that of the disk: bytes, or with k, M, G, T behind. With a backing "
                           "file it may be left out.",
                       .options = kOptions,
                       .min_names = 0,
                       .max_names = 2};

/// The size of the disk in the backing file, which also shows that it is there.
Result<uint64_t> backing_size(ImageTool& tool, const std::string& image, const block::CreationWords& words) {
    TRY(std::string path, block::resolve_image_name(image, *block::word(words, "backing_file")));
    const std::string format = block::word(words, "backing_fmt").value_or("");
    auto node = tool.open(path, ImageTool::Access::kRead, ImageTool::Backing::kFollow, format);
    if (!node) return std::unexpected(std::move(node).error().context("Could not open backing file"));
    const uint64_t size = (*node)->size();
    TRY(auto gone, tool.daemon().execute("blockdev-del", {{"node-name", "image"}}));
    (void)gone;
    return size;
}

Result<> create(ImageTool& tool, const std::string& format) {
    const Words& words = tool.words();
    TRY(block::CreationWords creation, creation_words(words));
    if (words.names.size() > 1) {
        TRY(const uint64_t size, parse_size(words.names[1]));
        creation.emplace_back("size", fmt::format("{}", size));
    }
    const auto backing = block::word(creation, "backing_file");
    if (backing && !backing->empty() && !words.has("unsafe")) {
        if (!block::word(creation, "backing_fmt"))
            return fail(ErrorKind::kInvalid, "backing file specified without backing format; say which with -F");
        TRY(const uint64_t size, backing_size(tool, words.names[0], creation));
        if (!block::word(creation, "size")) creation.emplace_back("size", fmt::format("{}", size));
    }
    return tool.run(
        block::create_image_file(tool.graph(), format, words.names[0], std::move(creation), tool.progress("Creating")));
}

}  // namespace

int create_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kUsage, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    const std::string format = words.has("format") ? words.value("format") : "qcow2";
    if (words.value("option") == "help" || words.value("option") == "?") {
        print_options(block::creation_options(tool->graph(), format));
        return kOk;
    }
    if (words.names.empty()) return tool->failed(Error(ErrorKind::kInvalid, "name the image to make"));
    auto made = create(*tool, format);
    if (!made) return tool->failed(made.error());
    if (tool->json()) {
        tool->print_json(json::object{{"filename", words.names[0]}, {"format", format}});
    } else {
        std::printf("Made %s (%s).\n", words.names[0].c_str(), format.c_str());
    }
    return kOk;
}

}  // namespace gantry::cli::image
