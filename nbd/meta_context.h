// Meta contexts: what an export offers, how queries select among them.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gantry::nbd {

enum class ContextKind : uint8_t { kBaseAllocation };

/// A context an export offers.
struct MetaContext {
    ContextKind kind;
    std::string name;  // "base:allocation"
    uint32_t id = 0;   // on the wire once selected
};

/// What SET_META_CONTEXT chose: bound to the export name it was asked for.
struct ContextSelection {
    std::string export_name;
    std::vector<MetaContext> contexts;
    void clear() {
        export_name.clear();
        contexts.clear();
    }
};

/// The contexts every export has, with the ids they get when selected.
std::vector<MetaContext> offered_contexts();

/// Whether `query` names `context`. With `listing` a namespace alone ("base:") names all in it. Anything unknown:
/// false.
bool query_matches(std::string_view query, const MetaContext& context, bool listing);

}  // namespace gantry::nbd
