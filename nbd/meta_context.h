// Meta contexts: what an export offers, how queries select among them.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace gantry::block {
class DirtyBitmap;
}

namespace gantry::nbd {

enum class ContextKind : uint8_t { kBaseAllocation, kAllocationDepth, kDirtyBitmap };

/// A context an export offers.
struct MetaContext {
    ContextKind kind;
    std::string name;                                    // "base:allocation"
    uint32_t id = 0;                                     // on the wire once selected
    std::shared_ptr<const block::DirtyBitmap> bitmap{};  // kDirtyBitmap: nobody changes what it is but its node
};
using ContextList = std::vector<MetaContext>;

/// What SET_META_CONTEXT chose: bound to the export name it was asked for, and to the export that had the name then.
struct ContextSelection {
    std::string export_name;
    ContextList contexts;
    std::shared_ptr<const ContextList> offered;  // each export with contexts of its own has a list of its own
    void clear() { *this = {}; }
};

/// base:allocation alone: what every export has.
std::shared_ptr<const ContextList> base_contexts();

/// The members of `offered` that `queries` name, each once, in their order; no more than a search per member, however
/// many queries there are (they are sorted). A query is a whole name; with `listing` also "base:", "qemu:" or
/// "qemu:dirty-bitmap:" for all that begin so, and no query at all for everything. Anything else matches nothing.
ContextList match_contexts(const ContextList& offered, std::vector<std::string_view>& queries, bool listing);

}  // namespace gantry::nbd
