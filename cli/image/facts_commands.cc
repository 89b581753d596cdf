// gantry image info, map, check: what an image is, where its bytes are, whether it is well.

#include "block/image_control.h"
#include "cli/image/image_tool.h"
#include "cli/readable.h"
#include "qmp/block_info.h"

namespace gantry::cli::image {

namespace {

// ---- info ----

constexpr OptionSpec kInfoOptions[] = {
    {"backing-chain", 0, false, "", "also the backing files, one after the other"},
    {"force-share", 'U', false, "", "look at an image that somebody else may be writing"},
};
constexpr Usage kInfo{.name = "info",
                      .line = "[OPTION]... IMAGE",
                      .doc =
                          "Shows what the image says about itself. Files that it names stay closed unless "
                          "--backing-chain is given.",
                      .options = kInfoOptions};

// ---- map ----

constexpr OptionSpec kMapOptions[] = {
    {"start", 's', true, "OFFSET", "from here on"},
    {"max-length", 'l', true, "SIZE", "at most so much"},
    {"force-share", 'U', false, "", "look at an image that somebody else may be writing"},
};
constexpr Usage kMap{.name = "map",
                     .line = "[OPTION]... IMAGE",
                     .doc = "Lists which ranges of the disk hold data, in which file of the backing chain, and where.",
                     .options = kMapOptions};

struct MapEntry {
    uint64_t start = 0, length = 0, depth = 0, offset = 0;
    bool data = false, zero = false, present = false, compressed = false, has_offset = false;
    std::string filename;

    bool continued_by(const MapEntry& next) const {
        return next.start == start + length && data == next.data && zero == next.zero && present == next.present &&
               compressed == next.compressed && depth == next.depth && has_offset == next.has_offset &&
               (!has_offset || (offset + length == next.offset && filename == next.filename));
    }
    json::object json() const {
        json::object out{{"start", start}, {"length", length}, {"depth", depth},          {"present", present},
                         {"zero", zero},   {"data", data},     {"compressed", compressed}};
        if (has_offset) {
            out["offset"] = offset;
            if (!filename.empty()) out["filename"] = filename;
        }
        return out;
    }
};

Task<Result<std::vector<MapEntry>>> map_of(block::Node* node, uint64_t start, uint64_t end) {
    std::vector<MapEntry> entries;
    uint64_t deepest = 0;  // where the search for what nobody has ends
    for (const block::Child* below = node->child("backing"); below; below = below->node->child("backing")) deepest++;
    block::Request rq = block::Request::internal();
    for (uint64_t at = start; at < end;) {
        CO_TRY(const block::BlockStatus status, co_await node->block_status(rq, at, end - at));
        MapEntry entry{.start = at,
                       .length = std::min(status.length, end - at),
                       .depth = status.depth == 0 ? deepest : status.depth - 1,
                       .offset = status.host_offset,
                       .data = status.data,
                       .zero = status.zero,
                       .present = status.depth != 0,
                       .compressed = status.compressed,
                       .has_offset = status.has_offset,
                       .filename = status.file && status.has_offset ? status.file->filename() : ""};
        at += entry.length;
        if (!entries.empty() && entries.back().continued_by(entry)) {
            entries.back().length += entry.length;
        } else {
            entries.push_back(std::move(entry));
        }
    }
    co_return std::move(entries);
}

// ---- check ----

constexpr OptionSpec kCheckOptions[] = {
    {"repair", 'r', true, "leaks|all", "mend what is found: only leaked clusters, or everything"},
    {"force-share", 'U', false, "", "look at an image that somebody else may be writing; what is found may be passing"},
};
constexpr Usage kCheck{.name = "check",
                       .line = "[OPTION]... IMAGE",
                       .doc =
                           "Checks the image's structure. Exit status: 0 nothing found, 1 the check could not be "
                           "made, 2 corruptions, 3 leaked clusters only, 63 the format has no check.",
                       .options = kCheckOptions};

int check_status(const block::ImageCheck& check) {
    if (check.check_errors) return kFailed;
    if (check.corruptions) return kCorruptions;
    return check.leaks ? kLeaks : kOk;
}

void print_check(const block::ImageCheck& check) {
    for (const std::string& line : check.findings) std::printf("%s\n", line.c_str());
    const auto number = [](const char* text, uint64_t n) {
        if (n) std::printf("%s: %llu\n", text, static_cast<unsigned long long>(n));
    };
    number("Corruptions mended", check.corruptions_fixed);
    number("Leaked clusters reclaimed", check.leaks_fixed);
    number("Corruptions", check.corruptions);
    number("Leaked clusters", check.leaks);
    number("Places that could not be checked", check.check_errors);
    if (!check.corruptions && !check.leaks && !check.check_errors) std::puts("No errors were found on the image.");
    if (check.total_clusters && *check.total_clusters) {
        const auto percent = [&](uint64_t part, uint64_t whole) {
            return whole ? 100.0 * static_cast<double>(part) / static_cast<double>(whole) : 0.0;
        };
        const uint64_t allocated = check.allocated_clusters.value_or(0);
        std::printf("%llu of %llu clusters allocated (%.2f%%), %.2f%% fragmented, %.2f%% compressed\n",
                    static_cast<unsigned long long>(allocated), static_cast<unsigned long long>(*check.total_clusters),
                    percent(allocated, *check.total_clusters),
                    percent(check.fragmented_clusters.value_or(0), allocated),
                    percent(check.compressed_clusters.value_or(0), allocated));
    }
    if (check.image_end_offset)
        std::printf("The image ends at byte %llu\n", static_cast<unsigned long long>(*check.image_end_offset));
}

}  // namespace

int info_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kInfo, arguments, status);
    if (!tool) return status;
    const bool chain = tool->words().has("backing-chain");
    const auto access = tool->words().has("force-share") ? ImageTool::Access::kShared : ImageTool::Access::kRead;
    auto node =
        tool->open(tool->words().names[0], access, chain ? ImageTool::Backing::kFollow : ImageTool::Backing::kIgnore);
    if (!node) return tool->failed(node.error());
    json::object info = tool->run(qmp::image_info_json(**node, chain));
    // As it was called: opened without its backing file the node has a longer name.
    if (!tool->words().has("image-opts")) info["filename"] = tool->words().names[0];
    if (tool->json() && !chain) {
        tool->print_json(info);
        return kOk;
    }
    json::array images;
    for (bool more = true; more;) {
        json::object below;
        json::value* const backing = info.if_contains("backing-image");
        more = backing != nullptr;
        if (more) below = std::move(backing->as_object());
        info.erase("backing-image");
        images.push_back(std::exchange(info, std::move(below)));
    }
    if (tool->json()) {
        tool->print_json(images);
        return kOk;
    }
    for (const json::value& image : images)
        std::printf("%s%s", &image == &images[0] ? "" : "\n", readable(image).c_str());
    return kOk;
}

int map_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kMap, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    const auto access = words.has("force-share") ? ImageTool::Access::kShared : ImageTool::Access::kRead;
    auto node = tool->open(words.names[0], access, ImageTool::Backing::kFollow);
    if (!node) return tool->failed(node.error());
    const uint64_t size = (*node)->size();
    uint64_t start = 0, end = size;
    if (words.has("start")) {
        auto value = parse_size(words.value("start"));
        if (!value) return tool->failed(value.error());
        start = std::min(*value, size);
    }
    if (words.has("max-length")) {
        auto value = parse_size(words.value("max-length"));
        if (!value) return tool->failed(value.error());
        end = start + std::min(*value, size - start);
    }
    auto entries = tool->run(map_of(*node, start, end));
    if (!entries) return tool->failed(entries.error());
    if (tool->json()) {
        json::array list;
        for (const MapEntry& e : *entries) list.push_back(e.json());
        tool->print_json(list);
        return kOk;
    }
    std::vector<std::vector<std::string>> rows{{"START", "LENGTH", "KIND", "DEPTH", "AT", "FILE"}};
    for (const MapEntry& e : *entries) {
        if (!e.data || e.zero) continue;
        rows.push_back({fmt::format("{:#x}", e.start), fmt::format("{:#x}", e.length),
                        e.compressed ? "compressed" : "data", fmt::format("{}", e.depth),
                        e.has_offset ? fmt::format("{:#x}", e.offset) : "-", e.filename});
    }
    std::fputs(table(rows).c_str(), stdout);
    return kOk;
}

int check_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kCheck, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    block::CheckRepair repair = block::CheckRepair::kNone;
    if (const std::string what = words.value("repair"); what == "leaks") {
        repair = block::CheckRepair::kLeaks;
    } else if (what == "all") {
        repair = block::CheckRepair::kAll;
    } else if (!what.empty()) {
        return tool->failed(Error(ErrorKind::kInvalid, fmt::format("--repair {} is neither 'leaks' nor 'all'", what)));
    }
    auto access = repair == block::CheckRepair::kNone ? ImageTool::Access::kRead : ImageTool::Access::kRepair;
    if (words.has("force-share")) {
        if (access == ImageTool::Access::kRepair) {
            return tool->failed(
                Error(ErrorKind::kInvalid, "--repair changes the image, which --force-share leaves to others"));
        }
        access = ImageTool::Access::kShared;
    }
    auto node = tool->open(words.names[0], access, ImageTool::Backing::kIgnore);
    if (!node) return tool->failed(node.error());
    auto check = tool->run(block::check_image(tool->graph(), **node, repair, tool->progress("Checking")));
    if (!check) {
        tool->failed(check.error());
        return check.error().kind() == ErrorKind::kUnsupported ? kNotSupported : kFailed;
    }
    if (tool->json()) {
        tool->print_json(block::to_json(*check, words.names[0], std::string((*node)->driver())));
    } else {
        print_check(*check);
    }
    return check_status(*check);
}

}  // namespace gantry::cli::image
