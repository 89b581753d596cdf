#include "block/formats/qcow2/bitmap_table.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/refusal.h"
#include "runtime/buffer.h"

namespace gantry::block::qcow2 {

Task<Result<std::vector<BitmapCluster>>> read_bitmap_table(const ImageFile& file, const BitmapEntry& entry,
                                                           Geometry geometry) {
    const uint64_t bytes = uint64_t{entry.table_entries} * 8;
    const std::string name = entry.name;
    if (wraps(entry.table_offset, bytes) || entry.table_offset + bytes > file.size()) {
        co_return refuse_corrupt(file.node_name(), fmt::format("Bitmap '{}' is cut off", name),
                                 "its table of {} bytes at {:#x} runs past the end of the file {:#x}", bytes,
                                 entry.table_offset, file.size());
    }
    std::vector<BitmapCluster> table(entry.table_entries);
    CO_TRY(Buffer raw, Buffer::try_alloc(bytes));
    CO_CHECK(co_await file.read(entry.table_offset, raw.span(), "bitmap table"));
    for (size_t i = 0; i < table.size(); i++) {
        table[i].word = load_be64(raw.data() + i * 8);
        if (table[i].valid(geometry)) continue;
        co_return refuse_corrupt(file.node_name(), fmt::format("Bitmap '{}' has an invalid table", name),
                                 "entry {} of the table at {:#x} is {:#x}", i, entry.table_offset, table[i].word);
    }
    co_return table;
}

uint64_t adjacent_clusters(const std::vector<BitmapCluster>& table, uint64_t first, const Geometry& geometry) {
    const uint64_t most = std::max<uint64_t>(1, kBitmapTransferBytes >> geometry.cluster_bits);
    uint64_t count = 1;
    while (count < most && first + count < table.size() &&
           table[first + count].offset() == table[first].offset() + (count << geometry.cluster_bits)) {
        count++;
    }
    return count;
}

}  // namespace gantry::block::qcow2
