#include "block/formats/qcow2/write_options.h"

#include "block/formats/qcow2/refusal.h"

namespace gantry::block::qcow2 {

Result<WriteOptions> write_options(const schema::Options& o, const Header& header, DiscardMode discard,
                                   std::string_view node) {
    if (header.version < 3 && o.flag("lazy-refcounts")) {
        return refuse(ErrorKind::kInvalid, node,
                      "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level",
                      "the version at byte 4 is {}", header.version);
    }
    if (header.version < 3 && o.flag("discard-no-unref")) {
        return refuse(ErrorKind::kInvalid, node,
                      "discard-no-unref is only supported by qcow2 images with at least compatibility level 1.1",
                      "the version at byte 4 is {}", header.version);
    }
    WriteOptions options;
    options.lazy_refcounts = o.flag("lazy-refcounts", header.has_compatible(kCompatLazyRefcounts));
    options.pass_discard_request = o.flag("pass-discard-request", discard == DiscardMode::kUnmap);
    options.pass_discard_snapshot = o.flag("pass-discard-snapshot", true);
    options.pass_discard_other = o.flag("pass-discard-other");
    options.discard_no_unref = o.flag("discard-no-unref");
    TRY(options.overlap, overlap_flags(o));
    return options;
}

bool same_options(const WriteOptions& a, const WriteOptions& b) {
    return a.lazy_refcounts == b.lazy_refcounts && a.pass_discard_request == b.pass_discard_request &&
           a.pass_discard_snapshot == b.pass_discard_snapshot && a.pass_discard_other == b.pass_discard_other &&
           a.discard_no_unref == b.discard_no_unref && a.overlap == b.overlap;
}

}  // namespace gantry::block::qcow2
