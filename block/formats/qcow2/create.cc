#include "block/formats/qcow2/create.h"

#include <algorithm>
#include <cstring>
#include <filesystem>

#include "block/create_target.h"
#include "block/formats/image_reference.h"
#include "block/formats/qcow2/create_layout.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/header_writer.h"
#include "block/formats/qcow2/measure.h"
#include "block/protocols/file_create.h"
#include "runtime/buffer.h"
#include "runtime/timer.h"

namespace gantry::block {
namespace qcow2 {

namespace {

constexpr uint64_t kMetadataStep = uint64_t{1} << 20;

/// One making: the nodes, and what goes where.
struct Making {
    explicit Making(Graph& graph) : graph(graph), file(graph), data(graph) {}

    Task<Result<>> open(NewImage& what);
    Task<Result<>> build(const NewImage& what, Progress progress);
    Task<Result<>> build_data_file(const CreateOptions& options, const Progress& progress);
    Task<Result<>> write_metadata(const CreateLayout& layout, const Progress& progress);

    Graph& graph;
    CreateTarget file, data;
};

/// The path that an image may store for a data file; empty when it has none.
std::string storable_name(const Node& node) {
    if (node.driver() != "file" && node.driver() != "host_device") return {};
    const std::string name = node.filename();
    std::error_code error;
    const auto absolute = std::filesystem::absolute(name, error);
    // Relative to the image's directory it would be another file.
    return error ? name : absolute.string();
}

/// Everything that can be known, and refused, before a byte is touched.
struct Plan {
    NewEncryption encryption;
    CreateLayout layout;
    std::vector<uint8_t> first_cluster;
};

Result<Plan> make_plan(const CreateOptions& options, std::string data_file_name, const crypto::Secrets& secrets) {
    Plan plan;
    if (!options.encrypt.empty()) {
        TRY(plan.encryption, new_encryption(options.encrypt, secrets));
    }
    TRY(plan.layout, plan_layout(options, plan.encryption.area_bytes));
    const Image image = new_image(options, plan.layout, std::move(data_file_name), plan.encryption.area_bytes);
    TRY(plan.first_cluster, encode_header_cluster(image));
    return plan;
}

/// Of at least one byte.
bool is_zero(std::span<const uint8_t> bytes) {
    return bytes[0] == 0 && std::memcmp(bytes.data(), bytes.data() + 1, bytes.size() - 1) == 0;
}

/// Progress of a part of the work, before which `before` of `total` bytes were done.
Progress part_of(const Progress& whole, uint64_t before, uint64_t total) {
    if (!whole) return {};
    return [whole, before, total](uint64_t done, uint64_t) { return whole(before + done, total); };
}

Task<Result<>> Making::open(NewImage& what) {
    CO_CHECK(co_await file.open(std::move(what.file), "the creation of an image"));
    if (what.options.data_file) CO_CHECK(co_await data.open(std::move(what.data_file), "the creation of an image"));
    co_return Result<>();
}

Task<Result<>> Making::build_data_file(const CreateOptions& options, const Progress& progress) {
    uint64_t had = 0;
    if (options.data_file_raw) {
        had = data.size();
        CO_CHECK(co_await data.grow(options.size));
    } else {
        // Clusters that are mapped at once must read as zeroes.
        const bool mapped = options.preallocation != Preallocation::kOff;
        CO_CHECK(co_await data.empty(options.size, mapped ? options.size : 0));
    }
    if (had < options.size) {
        CO_CHECK(co_await data.preallocate(had, options.size - had, options.preallocation, progress));
    }
    co_return co_await data.flush();
}

Task<Result<>> Making::write_metadata(const CreateLayout& layout, const Progress& progress) {
    const uint64_t begin = layout.geometry.cluster_size();
    const uint64_t bytes = layout.data_offset - begin;
    Buffer buffer = Buffer::alloc(std::min(kMetadataStep, bytes));
    for (uint64_t done = 0; done < bytes;) {
        const std::span<uint8_t> part = buffer.span().first(std::min<uint64_t>(buffer.size(), bytes - done));
        const uint64_t offset = begin + done;
        done += part.size();
        fill_metadata(layout, offset, part);
        // Zeroes are there already.
        if (!is_zero(part)) CO_CHECK(co_await file.write(offset, part, "metadata"));
        if (progress && !progress(done, bytes)) co_return fail(ErrorKind::kCancelled, "cancelled");
        co_await yield_turn();  // a write may be over at once; monitors want to be served
    }
    co_return Result<>();
}

Task<Result<>> Making::build(const NewImage& what, Progress progress) {
    const CreateOptions& options = what.options;
    std::string data_file_name = what.data_file_name;
    if (options.data_file && data_file_name.empty()) data_file_name = storable_name(data.node());
    CO_TRY(Plan plan, make_plan(options, std::move(data_file_name), graph.secrets()));
    const CreateLayout& layout = plan.layout;

    CO_CHECK(co_await file.empty(layout.file_bytes(), layout.file_bytes()));
    // No old header may stand before new tables, or before a data file that is not its own any more.
    CO_CHECK(co_await file.flush());
    // One of the two is where space is taken.
    const bool takes_space =
        options.preallocation == Preallocation::kFalloc || options.preallocation == Preallocation::kFull;
    const uint64_t in_data_file = takes_space && options.data_file ? options.size : 0;
    const uint64_t metadata = layout.data_offset - layout.geometry.cluster_size();
    const uint64_t total = in_data_file + metadata + (takes_space ? layout.data_bytes() : 0);
    if (options.data_file) CO_CHECK(co_await build_data_file(options, part_of(progress, 0, total)));
    CO_CHECK(co_await write_metadata(layout, part_of(progress, in_data_file, total)));
    if (!options.encrypt.empty()) {
        CO_TRY([[maybe_unused]] const std::unique_ptr<ClusterCipher> cipher,
               co_await write_encryption(std::move(plan.encryption), file.node(), layout.crypto_offset));
    }
    CO_CHECK(co_await file.preallocate(layout.data_offset, layout.data_bytes(), options.preallocation,
                                       part_of(progress, in_data_file + metadata, total)));
    CO_CHECK(co_await file.flush());
    CO_CHECK(co_await file.write(0, plan.first_cluster, "image header"));
    co_return co_await file.flush();
}

// ---- The creator ----

Task<Result<>> create(Graph& graph, json::object object, Progress progress) {
    NewImage what;
    CO_TRY(what.options, create_options(schema::Options(object)));
    what.file = std::move(object.at("file"));
    if (what.options.data_file) what.data_file = std::move(object.at("data-file"));
    co_return co_await make_image(graph, std::move(what), std::move(progress));
}

Task<Result<>> create_from_words(Graph& graph, std::string filename, CreationWords words, Progress progress) {
    CO_TRY(FileCreation file, file_creation_from(std::move(filename), words));
    file.preallocation = Preallocation::kOff;
    CO_TRY(json::object object, options_from_words(words));
    NewImage what;
    what.data_file_name = word(words, "data_file").value_or(std::string());
    if (!what.data_file_name.empty()) object["data-file"] = nullptr;
    CO_TRY(what.options, create_options(schema::Options(object)));

    CO_TRY([[maybe_unused]] const Plan plan, make_plan(what.options, what.data_file_name, graph.secrets()));
    const bool has_data_file = what.options.data_file;
    FileCreation data = file;
    FileCreated data_made;
    if (has_data_file) {
        // Made where the image will look for it.
        CO_TRY(data.filename, resolve_local_name(file.filename, what.data_file_name));
        if (data.filename == file.filename) {
            co_return fail(ErrorKind::kInvalid, "the data file '{}' is the image itself", what.data_file_name);
        }
        data.size = what.options.size;
        CO_TRY(data_made, co_await create_plain_file(data, {}));
        what.data_file = file_definition(data.filename, data_made);
    }
    Result<FileCreated> file_made = co_await create_plain_file(file, {});
    Result<> made;
    if (file_made) {
        what.file = file_definition(file.filename, *file_made);
        made = co_await make_image(graph, std::move(what), std::move(progress));
        if (!made) co_await undo_plain_file(file.filename, *file_made);
    } else {
        made = std::unexpected(std::move(file_made).error());
    }
    if (!made && has_data_file) co_await undo_plain_file(data.filename, data_made);
    co_return made;
}

}  // namespace

Task<Result<>> make_image(Graph& graph, NewImage what, Progress progress) {
    Making making(graph);
    Result<> made = co_await making.open(what);
    if (made) made = co_await making.build(what, std::move(progress));
    co_await making.data.close();
    co_await making.file.close();
    co_return made;
}

}  // namespace qcow2

constinit const Creator kQcow2Creator = {.create = qcow2::create,
                                         .create_file = qcow2::create_from_words,
                                         .measure = qcow2::measure_from_words,
                                         .words = qcow2::creation_words};

}  // namespace gantry::block
