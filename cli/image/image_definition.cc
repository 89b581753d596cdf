#include "cli/image/image_definition.h"

#include <sys/stat.h>

#include "block/formats/image_reference.h"
#include "schema/keyval.h"

namespace gantry::cli::image {

namespace {

/// Nested no deeper than the parsers allow.
void name_file_drivers(json::object& node) {
    for (auto& member : node) {
        if (member.value().is_object()) name_file_drivers(member.value().get_object());
    }
    const json::value* path = node.if_contains("filename");
    if (path && path->is_string() && !node.contains("driver"))
        node["driver"] = file_driver(std::string(path->get_string()));
}

}  // namespace

std::string_view file_driver(const std::string& path) {
    struct stat st{};
    return ::stat(path.c_str(), &st) == 0 && S_ISBLK(st.st_mode) ? "host_device" : "file";
}

Result<ImageDefinition> parse_definition(const std::string& text, bool image_opts) {
    ImageDefinition out;
    if (image_opts) {
        TRY(schema::OptionValue parsed, schema::parse_option_value(text, ""));
        if (parsed.help)
            return fail(ErrorKind::kInvalid, "--image-opts is a definition; its options are those of blockdev-add");
        out.options = std::move(parsed.object);
        out.mode = parsed.mode;
    } else {
        TRY(out.options, block::json_name_options(text));
    }
    const bool image_known = out.options.contains("driver");
    name_file_drivers(out.options);
    if (!image_known && out.options.contains("filename")) {
        json::object file = std::exchange(out.options, {});
        out.options["file"] = std::move(file);
    }
    return out;
}

}  // namespace gantry::cli::image
