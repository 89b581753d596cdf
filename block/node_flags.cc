#include "block/node_flags.h"

#include "schema/options.h"

namespace gantry::block {

Result<NodeFlags> flags_from_options(const json::object& options, const NodeFlags& inherited) {
    const schema::Options o(options);
    NodeFlags flags = inherited;
    flags.read_only = o.flag("read-only", inherited.read_only);
    flags.auto_read_only = o.flag("auto-read-only", inherited.auto_read_only);
    flags.force_share = o.flag("force-share", inherited.force_share);
    if (o.has("cache")) {
        const schema::Options cache(o.object("cache"));
        flags.cache_direct = cache.flag("direct", inherited.cache_direct);
        flags.cache_no_flush = cache.flag("no-flush", inherited.cache_no_flush);
    }
    if (o.has("discard")) flags.discard = o.str("discard") == "unmap" ? DiscardMode::kUnmap : DiscardMode::kIgnore;
    const std::string zeroes = o.str("detect-zeroes", "off");
    flags.detect_zeroes = zeroes == "on"      ? DetectZeroes::kOn
                          : zeroes == "unmap" ? DetectZeroes::kUnmap
                                              : DetectZeroes::kOff;
    if (flags.detect_zeroes == DetectZeroes::kUnmap && flags.discard != DiscardMode::kUnmap)
        return fail(ErrorKind::kInvalid,
                    "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap");
    if (flags.force_share && !flags.read_only)
        return fail(ErrorKind::kInvalid, "force-share=on can only be used with read-only images");
    return flags;
}

NodeFlags inherited_flags(const NodeFlags& parent, ChildRole role) {
    NodeFlags flags = parent;
    flags.detect_zeroes = DetectZeroes::kOff;
    if (role == ChildRole::kBacking) {
        flags.read_only = true;
        flags.auto_read_only = false;
    }
    return flags;
}

}  // namespace gantry::block
