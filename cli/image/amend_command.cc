// gantry image amend: what an image got when it was made, changed.

#include "block/image_control.h"
#include "cli/image/creation_words.h"
#include "cli/image/image_tool.h"
#include "schema/keyval.h"

namespace gantry::cli::image {

namespace {

constexpr OptionSpec kOptions[] = {
    {"option", 'o', true, "NAME=VALUE,...", "what to change; 'help' lists what can be changed"},
    {"force", 0, false, "", "allow what may make encrypted data unreachable"},
};
constexpr Usage kUsage{.name = "amend",
                       .line = "-o NAME=VALUE,... IMAGE",
                       .doc = "Changes properties that an image got when it was made.",
                       .options = kOptions,
                       .min_names = 0};

constexpr block::CreationOption kAmendable[] = {
    {"compat", "str", "version of the format: 0.10 or 1.1"},
    {"lazy_refcounts", "bool (on/off)", "reference counts may be written late"},
    {"refcount_bits", "num", "width of a reference count: 1, 2, 4, 8, 16, 32 or 64"},
    {"size", "size", "bytes of the disk; a smaller one loses what lies beyond"},
    {"data_file", "str", "another name of the external data file"},
    {"data_file_raw", "bool (off)", "give up that the data file is always a raw image of the disk"},
    {"encrypt.state", "str", "active: put a passphrase into a key slot; inactive: erase key slots"},
    {"encrypt.new-secret", "str", "id of the secret with the passphrase for an activated slot"},
    {"encrypt.old-secret", "str", "id of the secret with the passphrase of the slots to be erased"},
    {"encrypt.keyslot", "num", "number of the slot, 0 to 7"},
    {"encrypt.iter-time", "num", "milliseconds that one try of the new passphrase takes on this machine"},
    {"encrypt.secret", "str", "id of a secret that opens the image now, where it is not the one it was opened with"},
};

Result<> amend(ImageTool& tool) {
    const Words& words = tool.words();
    if (words.names.empty()) return fail(ErrorKind::kInvalid, "name the image to change");
    std::string text;
    for (const OptionUse& use : words.options) {
        if (use.name == "option") text += (text.empty() ? "" : ",") + use.value;
    }
    if (text.empty()) return fail(ErrorKind::kInvalid, "-o says what to change");
    TRY(schema::OptionValue parsed, schema::parse_keyval(text, ""));
    TRY(block::Node * node, tool.open(words.names[0], ImageTool::Access::kWrite, ImageTool::Backing::kFollow));
    return tool.run(block::amend_image(tool.graph(), *node, std::move(parsed.object), words.has("force"),
                                       tool.progress("Amending")));
}

}  // namespace

int amend_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kUsage, arguments, status);
    if (!tool) return status;
    const std::string option = tool->words().value("option");
    if (option == "help" || option == "?") {
        print_options(kAmendable);
        return kOk;
    }
    auto done = amend(*tool);
    return done ? kOk : tool->failed(done.error());
}

}  // namespace gantry::cli::image
