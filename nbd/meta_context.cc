#include "nbd/meta_context.h"

#include <algorithm>

#include "block/bitmap.h"

namespace gantry::nbd {

std::shared_ptr<const ContextList> base_contexts() {
    static const auto list =
        std::make_shared<const ContextList>(ContextList{{ContextKind::kBaseAllocation, "base:allocation", 1}});
    return list;
}

ContextList match_contexts(const ContextList& offered, std::vector<std::string_view>& queries, bool listing) {
    std::ranges::sort(queries);
    const auto asked = [&](std::string_view query) { return std::ranges::binary_search(queries, query); };
    const bool all = listing && queries.empty();
    const bool all_base = listing && asked("base:");
    const bool all_qemu = listing && asked("qemu:");
    const bool all_bitmaps = all_qemu || (listing && asked("qemu:dirty-bitmap:"));
    ContextList chosen;
    for (const MetaContext& context : offered) {
        bool of_group = all;
        switch (context.kind) {
            case ContextKind::kBaseAllocation:
                of_group = of_group || all_base;
                break;
            case ContextKind::kAllocationDepth:
                of_group = of_group || all_qemu;
                break;
            case ContextKind::kDirtyBitmap:
                of_group = of_group || all_bitmaps;
                break;
        }
        if (of_group || asked(context.name)) chosen.push_back(context);
    }
    return chosen;
}

}  // namespace gantry::nbd
