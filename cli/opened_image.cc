#include "cli/opened_image.h"

#include <sys/stat.h>

#include <cstring>

#include "cli/partition_table.h"
#include "runtime/buffer.h"
#include "runtime/log.h"

namespace gantry::cli {

namespace {

Result<std::string> find_format(Daemon& daemon, const ImageChoice& choice) {
    if (!choice.format.empty()) return choice.format;
    block::Graph& graph = daemon.services().graph;
    TRY(std::string format, daemon.runtime().main_loop().run_until_complete(graph.probe(*graph.find("file"))));
    if (format == "raw" && choice.write) {
        return fail(ErrorKind::kInvalid,
                    "'{}' shows no known format, and a probed raw image is never served for writing; say --format raw "
                    "if that is what it is",
                    choice.image);
    }
    return format;
}

Task<Result<>> read_node(std::shared_ptr<block::Node> node, uint64_t offset, std::span<uint8_t> room) {
    Buffer buffer = Buffer::alloc(room.size());
    const iovec iov = buffer.iov();
    block::Request request = block::Request::internal();
    CO_CHECK(co_await node->read(request, offset, IoVec(iov)));
    std::memcpy(room.data(), buffer.data(), room.size());
    co_return Result<>();
}

Result<Partition> choose_partition(Daemon& daemon, const ImageChoice& choice) {
    const std::shared_ptr<block::Node> disk = daemon.services().graph.find("disk")->shared_from_this();
    const DiskReader read = [&](uint64_t offset, std::span<uint8_t> room) {
        return daemon.runtime().main_loop().run_until_complete(read_node(disk, offset, room));
    };
    auto table = read_partition_table(read, disk->size());
    if (!table) {
        return std::unexpected(
            std::move(table).error().context(fmt::format("Partition {} of '{}'", *choice.partition, choice.image)));
    }
    TRY(Partition found, find_partition(*table, *choice.partition, choice.image));
    if (!table->note.empty()) log::warn("'{}': {}", choice.image, table->note);
    return found;
}

}  // namespace

Result<std::string> open_image(Daemon& daemon, const ImageChoice& choice) {
    struct stat st{};
    if (::stat(choice.image.c_str(), &st) != 0) return fail_errno(errno, "Could not open '{}'", choice.image);
    const std::string_view leaf = S_ISBLK(st.st_mode) ? "host_device" : "file";
    TRY(auto file, daemon.execute("blockdev-add", {{"driver", leaf},
                                                   {"node-name", "file"},
                                                   {"filename", choice.image},
                                                   {"read-only", !choice.write},
                                                   {"discard", "unmap"}}));
    TRY(const std::string format, find_format(daemon, choice));
    json::object disk{{"driver", format},
                      {"node-name", "disk"},
                      {"file", "file"},
                      {"read-only", !choice.write},
                      {"discard", "unmap"}};
    if (!choice.snapshot.empty()) disk["snapshot"] = choice.snapshot;
    TRY(auto added, daemon.execute("blockdev-add", std::move(disk)));
    (void)file, (void)added;
    if (!choice.partition) return "disk";
    TRY(const Partition partition, choose_partition(daemon, choice));
    TRY(auto window, daemon.execute("blockdev-add", {{"driver", "raw"},
                                                     {"node-name", "partition"},
                                                     {"file", "disk"},
                                                     {"offset", partition.offset},
                                                     {"size", partition.size},
                                                     {"read-only", !choice.write},
                                                     {"discard", "unmap"}}));
    (void)window;
    return "partition";
}

}  // namespace gantry::cli
