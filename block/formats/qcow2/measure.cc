#include "block/formats/qcow2/measure.h"

#include <algorithm>
#include <vector>

#include "block/bitmap.h"
#include "block/formats/qcow2/create_layout.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kDirectoryEntryBytes = 24;

uint64_t round_up(uint64_t value, uint64_t unit) { return (value + unit - 1) / unit * unit; }

bool takes_whole_disk(Preallocation mode) { return mode == Preallocation::kFalloc || mode == Preallocation::kFull; }

std::vector<MeasuredBitmap> persistent_bitmaps(const Node& source) {
    std::vector<MeasuredBitmap> list;
    for (const auto& bitmap : source.bitmaps()) {
        if (bitmap->persistent && !bitmap->inconsistent) list.push_back({bitmap->name().size(), bitmap->granularity()});
    }
    return list;
}

}  // namespace

MeasureResult measure(const CreateOptions& options, uint64_t data_bytes, uint64_t crypto_bytes) {
    // Data beside the image counts as if it were in it. That the image may never be filled, because its refcount table
    // would become too large, is no reason to say nothing.
    const uint64_t cluster = options.cluster_size();
    const uint64_t l2_tables = options.geometry().l1_entries_for(options.size);
    const uint64_t others = 1 + round_up(l2_tables * 8, cluster) / cluster + l2_tables + options.disk_clusters() +
                            round_up(crypto_bytes, cluster) / cluster;
    const RefcountSpace space = refcount_space(others, options.cluster_bits, options.refcount_order);
    MeasureResult result;
    result.fully_allocated = (others + space.table_clusters + space.blocks) << options.cluster_bits;
    const uint64_t disk = options.disk_clusters() << options.cluster_bits;
    const uint64_t data = takes_whole_disk(options.preallocation) ? disk : std::min(data_bytes, disk);
    result.required = result.fully_allocated - disk + data;
    return result;
}

uint64_t measure_bitmaps(std::span<const MeasuredBitmap> bitmaps, uint64_t size, uint32_t cluster_bits) {
    const uint64_t cluster = uint64_t{1} << cluster_bits;
    uint64_t bytes = 0, directory = 0;
    for (const MeasuredBitmap& bitmap : bitmaps) {
        const uint64_t bits = size / bitmap.granularity + (size % bitmap.granularity != 0);
        const uint64_t clusters = round_up((bits + 7) / 8, cluster) >> cluster_bits;
        bytes += (clusters << cluster_bits) + round_up(clusters * 8, cluster);
        directory += round_up(kDirectoryEntryBytes + bitmap.name_bytes, 8);
    }
    return bytes + round_up(directory, cluster);
}

Task<Result<MeasureResult>> measure_from_words(MeasureSource what, CreationWords words) {
    CO_TRY(json::object object, options_from_words(words));
    if (word(words, "data_file")) object["data-file"] = nullptr;
    CO_TRY(const CreateOptions options, create_options(schema::Options(object)));
    uint64_t data_bytes = 0;
    if (what.source) {
        if (!options.backing_file.empty()) {
            // How much the two have in common is not known.
            data_bytes = options.disk_clusters() << options.cluster_bits;
        } else {
            CO_TRY(data_bytes, co_await count_data(*what.source, options.cluster_size()));
        }
    }
    uint64_t crypto_bytes = 0;
    if (!options.encrypt.empty()) {
        CO_TRY(crypto_bytes, new_encryption_bytes(options.encrypt));
    }
    MeasureResult result = measure(options, data_bytes, crypto_bytes);
    const auto* image = dynamic_cast<const Qcow2Node*>(what.source);
    if (image && image->image().header.version >= 3 && options.version >= 3) {
        result.bitmaps = measure_bitmaps(persistent_bitmaps(*image), options.size, options.cluster_bits);
    }
    co_return result;
}

}  // namespace gantry::block::qcow2
