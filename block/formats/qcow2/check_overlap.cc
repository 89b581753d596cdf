// Tables that lie on other metadata: whatever is written into one of them damages the other.

#include <algorithm>

#include "block/formats/qcow2/check_references.h"

namespace gantry::block::qcow2 {

void find_contested(CheckRun& run, std::vector<MetadataRange> fixed) {
    const Header& h = run.image.header;
    const uint64_t cs = run.cluster_size();
    const MetadataRange active_l1{h.l1_table_offset, uint64_t{h.l1_size} * 8, true};
    const auto dropped = [&](const L2Ref& table) {  // a repair takes such pointers out
        return table.offset < cs || active_l1.touches(table.offset, cs);
    };
    std::vector<MetadataRange> ranges = std::move(fixed);
    for (const L2Ref& table : run.tables) {
        if (!dropped(table)) ranges.push_back({table.offset, cs, true});
    }
    ranges.push_back({h.refcount_table_offset, h.refcount_table_clusters * cs, false});
    for (const BlockRef& block : run.blocks) {
        if (block.offset == 0) continue;
        if (block.counted && run.cluster_of(block.offset) < run.file_clusters)
            ranges.push_back({block.offset, cs, false});
    }
    std::erase_if(ranges, [](const MetadataRange& r) { return r.bytes == 0 || wraps(r.offset, r.bytes); });
    std::ranges::sort(ranges, {}, &MetadataRange::offset);

    size_t widest = 0;  // of those before, the one that reaches furthest
    for (size_t i = 1; i < ranges.size(); i++) {
        if (ranges[i].offset < ranges[widest].end()) {
            for (const size_t both : {widest, i}) {
                if (!ranges[both].may_be_mended) continue;
                run.contested.tables.push_back(ranges[both].offset);
                if (!ranges[i].may_be_mended || !ranges[widest].may_be_mended)
                    run.contested.flags.push_back(ranges[both].offset);
            }
        }
        if (ranges[i].end() > ranges[widest].end()) widest = i;
    }
    std::ranges::sort(run.contested.tables);
    std::ranges::sort(run.contested.flags);
}

}  // namespace gantry::block::qcow2
