#include "nbd/meta_context.h"

namespace gantry::nbd {

std::vector<MetaContext> offered_contexts() { return {{ContextKind::kBaseAllocation, "base:allocation", 1}}; }

bool query_matches(std::string_view query, const MetaContext& context, bool listing) {
    if (query == context.name) return true;
    return listing && query.ends_with(':') && context.name.starts_with(query);
}

}  // namespace gantry::nbd
