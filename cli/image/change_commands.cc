// gantry image resize, snapshot, compact, commit, rebase: what changes an existing image.

#include <sys/time.h>
#include <time.h>

#include "block/image_control.h"
#include "cli/image/image_tool.h"
#include "cli/readable.h"
#include "qmp/block_info.h"

namespace gantry::cli::image {

namespace {

// ---- resize ----

constexpr OptionSpec kResizeOptions[] = {
    {"shrink", 0, false, "", "allow the disk to become smaller: what lies beyond is lost"},
    {"preallocation", 0, true, "off|metadata|falloc|full", "for what is added"},
};
constexpr Usage kResize{.name = "resize",
                        .line = "[OPTION]... IMAGE SIZE|+SIZE|-SIZE",
                        .doc = "Changes the size of the disk in the image.",
                        .options = kResizeOptions,
                        .min_names = 2,
                        .max_names = 2};

Result<block::Preallocation> preallocation_of(const std::string& text) {
    if (text.empty() || text == "off") return block::Preallocation::kOff;
    if (text == "metadata") return block::Preallocation::kMetadata;
    if (text == "falloc") return block::Preallocation::kFalloc;
    if (text == "full") return block::Preallocation::kFull;
    return fail(ErrorKind::kInvalid, "Invalid preallocation mode '{}'; off, metadata, falloc or full", text);
}

// ---- snapshot ----

constexpr OptionSpec kSnapshotOptions[] = {
    {"list", 'l', false, "", "show the snapshots (when nothing else is asked)"},
    {"create", 'c', true, "NAME", "keep the disk's present state under this name"},
    {"apply", 'a', true, "ID|NAME", "make the disk what it was then; its present state is lost"},
    {"delete", 'd', true, "ID|NAME", "drop a snapshot"},
};
constexpr Usage kSnapshot{.name = "snapshot",
                          .line = "[OPTION]... IMAGE",
                          .doc = "Works on the internal snapshots of an image.",
                          .options = kSnapshotOptions};

std::string local_time(uint32_t seconds) {
    const auto t = static_cast<time_t>(seconds);
    struct tm parts{};
    ::localtime_r(&t, &parts);
    char text[32];
    std::strftime(text, sizeof text, "%Y-%m-%d %H:%M:%S", &parts);
    return text;
}

int list_snapshots(ImageTool& tool, block::Node& node) {
    auto info = tool.run(node.image_info());
    if (!info) return tool.failed(info.error());
    if (tool.json()) {
        json::array list;
        for (const block::SnapshotInfo& s : info->snapshots) list.push_back(qmp::snapshot_json(s));
        tool.print_json(list);
        return kOk;
    }
    std::vector<std::vector<std::string>> rows{{"ID", "NAME", "VM STATE", "DATE", "VM CLOCK"}};
    for (const block::SnapshotInfo& s : info->snapshots) {
        const uint64_t seconds = s.vm_clock_ns / 1000000000;
        rows.push_back({s.id, s.name, s.vm_state_size ? readable_size(s.vm_state_size) : "-", local_time(s.date_sec),
                        fmt::format("{:02}:{:02}:{:02}.{:03}", seconds / 3600, seconds / 60 % 60, seconds % 60,
                                    s.vm_clock_ns / 1000000 % 1000)});
    }
    if (rows.size() == 1) {
        std::puts("No snapshots.");
    } else {
        std::fputs(table(rows).c_str(), stdout);
    }
    return kOk;
}

Task<Result<>> delete_one(block::Graph& graph, block::Node& node, std::string which) {
    // An id is meant before a name, as snapshots are looked up for reading.
    Result<> by_id = co_await block::delete_snapshot(graph, node, which, "");
    if (by_id || by_id.error().kind() != ErrorKind::kNotFound) co_return by_id;
    co_return co_await block::delete_snapshot(graph, node, "", which);
}

// ---- compact, commit, rebase ----

constexpr Usage kCompact{.name = "compact",
                         .line = "[OPTION]... IMAGE",
                         .doc =
                             "Moves the image's clusters into holes further down and cuts the file, so that discarded "
                             "space returns to the host.",
                         .options = {}};
constexpr OptionSpec kCommitOptions[] = {
    {"keep", 'd', false, "", "do not empty the image afterwards"},
};
constexpr Usage kCommit{.name = "commit",
                        .line = "[OPTION]... IMAGE",
                        .doc =
                            "Writes what the image holds into its backing file, then empties the image. Nobody else "
                            "uses either meanwhile.",
                        .options = kCommitOptions};
constexpr OptionSpec kRebaseOptions[] = {
    {"backing", 'b', true, "FILE", "the backing file's new name; \"\" for none"},
    {"backing-format", 'F', true, "FORMAT", "its format"},
    {"unsafe", 'u', false, "", "change the name and nothing else, as is always done"},
};
constexpr Usage kRebase{.name = "rebase",
                        .line = "-b FILE -F FORMAT IMAGE",
                        .doc =
                            "Changes the name of the backing file in the image and nothing else: the new one must "
                            "hold what the old one holds.",
                        .options = kRebaseOptions};

}  // namespace

int resize_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kResize, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    auto preallocation = preallocation_of(words.value("preallocation"));
    if (!preallocation) return tool->failed(preallocation.error());
    auto node = tool->open(words.names[0], ImageTool::Access::kWrite, ImageTool::Backing::kFollow);
    if (!node) return tool->failed(node.error());
    auto size = parse_size(words.names[1], (*node)->size());
    if (!size) return tool->failed(size.error());
    if (*size < (*node)->size() && !words.has("shrink")) {
        return tool->failed(
            Error(ErrorKind::kInvalid,
                  fmt::format("Use the --shrink option to perform a shrink operation; the disk has {} bytes, and what "
                              "lies beyond byte {} would be lost",
                              (*node)->size(), *size)));
    }
    auto done = tool->run(block::resize_image(tool->graph(), **node, *size, *preallocation, words.has("shrink"),
                                              tool->progress("Resizing")));
    if (!done) return tool->failed(done.error());
    if (!tool->json()) std::printf("The disk has %s now.\n", readable_size((*node)->size()).c_str());
    return kOk;
}

int snapshot_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kSnapshot, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    const bool create = words.has("create"), apply = words.has("apply"), drop = words.has("delete");
    if (create + apply + drop + words.has("list") > 1) {
        return tool->failed(Error(ErrorKind::kInvalid, "--create, --apply, --delete and --list exclude each other"));
    }
    const bool change = create || apply || drop;
    if (create && words.value("create").empty()) return tool->failed(Error(ErrorKind::kInvalid, "Name is empty"));
    auto node = tool->open(words.names[0], change ? ImageTool::Access::kWrite : ImageTool::Access::kRead,
                           ImageTool::Backing::kIgnore);
    if (!node) return tool->failed(node.error());
    if (!change) return list_snapshots(*tool, **node);
    Result<> done;
    if (create) {
        timeval now{};
        ::gettimeofday(&now, nullptr);
        done = tool->run(block::create_snapshot(tool->graph(), **node,
                                                {.name = words.value("create"),
                                                 .date_sec = static_cast<uint32_t>(now.tv_sec),
                                                 .date_nsec = static_cast<uint32_t>(now.tv_usec) * 1000}));
    } else if (apply) {
        done = tool->run(block::apply_snapshot(tool->graph(), **node, words.value("apply")));
    } else {
        done = tool->run(delete_one(tool->graph(), **node, words.value("delete")));
    }
    return done ? kOk : tool->failed(done.error());
}

int compact_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kCompact, arguments, status);
    if (!tool) return status;
    auto node = tool->open(tool->words().names[0], ImageTool::Access::kWrite, ImageTool::Backing::kIgnore);
    if (!node) return tool->failed(node.error());
    const block::Child* below = (*node)->child("file");
    const uint64_t before = below ? below->node->size() : (*node)->size();
    auto done = tool->run(block::compact_image(tool->graph(), **node, tool->progress("Compacting")));
    if (!done) return tool->failed(done.error());
    const uint64_t after = below ? below->node->size() : (*node)->size();
    if (tool->json()) {
        tool->print_json(json::object{{"before", before}, {"after", after}});
    } else {
        std::printf("%s before, %s now.\n", readable_size(before).c_str(), readable_size(after).c_str());
    }
    return kOk;
}

int commit_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kCommit, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    auto node = tool->open(words.names[0], ImageTool::Access::kWrite, ImageTool::Backing::kFollow);
    if (!node) return tool->failed(node.error());
    auto done = tool->run(block::commit_image(tool->graph(), **node, !words.has("keep"), tool->progress("Committing")));
    return done ? kOk : tool->failed(done.error());
}

int rebase_command(std::span<const char* const> arguments) {
    int status = kFailed;
    auto tool = ImageTool::create(kRebase, arguments, status);
    if (!tool) return status;
    const Words& words = tool->words();
    if (!words.has("backing")) return tool->failed(Error(ErrorKind::kInvalid, "-b names the new backing file"));
    if (!words.value("backing").empty() && !words.has("backing-format")) {
        return tool->failed(
            Error(ErrorKind::kInvalid, "backing format must be specified; say which with -F, it is never guessed"));
    }
    auto node = tool->open(words.names[0], ImageTool::Access::kWrite, ImageTool::Backing::kIgnore);
    if (!node) return tool->failed(node.error());
    auto done = tool->run(
        block::change_backing_file(tool->graph(), **node, words.value("backing"), words.value("backing-format")));
    return done ? kOk : tool->failed(done.error());
}

}  // namespace gantry::cli::image
