#include "block/formats/qcow2/image_loader.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kFirstSnapshotRead = 64 * 1024;

/// The part of [offset, offset + bytes) that the file has.
uint64_t present(const Node& file, uint64_t offset, uint64_t bytes) {
    const uint64_t size = file.size();
    return offset >= size ? 0 : std::min(bytes, size - offset);
}

/// `bytes` lie inside the file and below a limit of the format.
Task<Result<Buffer>> read_at(Node& file, uint64_t offset, uint64_t bytes, std::string node, std::string what) {
    CO_TRY(Buffer buffer, Buffer::try_alloc(bytes));
    if (bytes == 0) co_return std::move(buffer);
    const iovec iov = buffer.iov();
    Request rq = Request::internal();
    Result<> read = co_await file.read(rq, offset, IoVec(iov));
    if (!read) {
        co_return std::unexpected(std::move(read).error().context(
            fmt::format("Could not read {}; node '{}': {} bytes at {:#x}", what, node, bytes, offset)));
    }
    co_return std::move(buffer);
}

Task<Result<>> load_header(Node& file, Image& image, std::string node) {
    CO_TRY(Buffer head, co_await read_at(file, 0, present(file, 0, kHeaderBytesKnown), node, "qcow2 header"));
    CO_TRY(image.header, parse_header(head.span(), node));
    if (image.header.header_length > kHeaderBytesKnown) {
        // Fields of the future: a rewritten header carries them along.
        const uint64_t bytes = present(file, 0, image.header.header_length);
        CO_TRY(head, co_await read_at(file, 0, bytes, node, "qcow2 header"));
        CO_TRY(image.header, parse_header(head.span(), node));
    }
    const Header& h = image.header;
    const uint64_t area_bytes = present(file, h.header_length, h.extensions_end() - h.header_length);
    CO_TRY(Buffer area, co_await read_at(file, h.header_length, area_bytes, node, "header extensions"));
    // With unknown features nothing else may be believed, not even that the extensions make sense.
    CO_CHECK(check_features(h, parse_feature_names(area.span()), node));
    CO_TRY(image.extensions, parse_extensions(h, area.span(), node));
    CO_CHECK(validate_header(h, image.extensions, node));
    image.geometry = h.geometry();

    if (h.backing_file_offset != 0 && h.backing_file_size != 0) {
        const uint64_t bytes = present(file, h.backing_file_offset, h.backing_file_size);
        CO_TRY(Buffer name, co_await read_at(file, h.backing_file_offset, bytes, node, "backing file name"));
        const std::string_view text(reinterpret_cast<const char*>(name.data()), name.size());
        image.backing_name = text.substr(0, text.find('\0'));
    }
    co_return Result<>();
}

Task<Result<>> load_snapshots(Node& file, Image& image, std::string node) {
    const Header& h = image.header;
    if (h.nb_snapshots == 0) co_return Result<>();
    const uint64_t available = present(file, h.snapshots_offset, kMaxSnapshotTableBytes);
    // The length of the table is known only when its last entry has been seen.
    for (uint64_t bytes = std::min(available, kFirstSnapshotRead);; bytes = std::min(available, bytes * 4)) {
        CO_TRY(Buffer table, co_await read_at(file, h.snapshots_offset, bytes, node, "snapshot table"));
        CO_TRY(auto snapshots, parse_snapshot_table(table.span(), h.nb_snapshots, bytes == available, node));
        if (!snapshots) continue;
        image.snapshots = std::move(*snapshots);
        co_return Result<>();
    }
}

Task<Result<>> load_bitmaps(Node& file, Image& image, std::string node) {
    if (!image.extensions.bitmaps) co_return Result<>();
    const BitmapsExtension& extension = *image.extensions.bitmaps;
    const uint64_t bytes = present(file, extension.directory_offset, extension.directory_size);
    if (bytes != extension.directory_size) {
        co_return refuse_corrupt(node, "Broken bitmap directory",
                                 "its {} bytes at offset {:#x} run past the end of the file {:#x}",
                                 extension.directory_size, extension.directory_offset, file.size());
    }
    CO_TRY(Buffer directory, co_await read_at(file, extension.directory_offset, bytes, node, "bitmap directory"));
    CO_TRY(image.bitmaps, parse_bitmap_directory(directory.span(), extension, image.geometry, node));
    image.bitmaps_trusted = true;
    co_return Result<>();
}

/// Where the L1 table in use is.
struct L1Place {
    uint64_t offset = 0;
    uint64_t entries = 0;
};

Result<L1Place> choose_disk(Image& image, std::string_view snapshot, std::string_view node) {
    const Header& h = image.header;
    image.disk_size = h.size;
    if (snapshot.empty()) return L1Place{h.l1_table_offset, h.l1_size};
    const Snapshot* found = find_snapshot(image.snapshots, snapshot);
    if (!found) {
        return fail(ErrorKind::kNotFound, "Can't find snapshot '{}'; node '{}': the image has {} internal snapshots",
                    snapshot, node, image.snapshots.size());
    }
    image.disk_size = found->disk_size.value_or(h.size);
    CHECK_OK(check_l1(image.geometry, found->l1_table_offset, found->l1_size, image.disk_size, "Snapshot", node));
    image.opened_snapshot = *found;
    return L1Place{found->l1_table_offset, found->l1_size};
}

Task<Result<>> load_l1(Node& file, Image& image, L1Place place, std::string node) {
    // All of it, also what lies beyond the disk (the state of a virtual machine): a writer must know what it owns.
    // An entry that the end of the file cuts goes on with zeroes.
    const uint64_t bytes = (present(file, place.offset, place.entries * 8) + 7) & ~uint64_t{7};
    CO_TRY(Buffer table, co_await read_at(file, place.offset, bytes, node, "L1 table"));
    image.l1.resize(bytes / 8);
    for (size_t i = 0; i < image.l1.size(); i++) image.l1[i] = load_be64(table.data() + i * 8);
    co_return Result<>();
}

}  // namespace

Task<Result<Image>> load_image(Node& file, std::string node, std::string snapshot) {
    Image image;
    CO_CHECK(co_await load_header(file, image, node));
    CO_CHECK(co_await load_snapshots(file, image, node));
    CO_CHECK(co_await load_bitmaps(file, image, node));
    CO_TRY(const L1Place place, choose_disk(image, snapshot, node));
    CO_CHECK(co_await load_l1(file, image, place, node));
    co_return std::move(image);
}

}  // namespace gantry::block::qcow2
