// Changes of an image's properties (spec/qcow2.md section 16).

#include "block/formats/qcow2/amend_steps.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/refusal.h"
#include "block/graph.h"

namespace gantry::block::qcow2 {

namespace {

/// One step on the image as a whole, which gives its rows back when it fails.
Task<Result<>> conclude(Operation& op, Result<> done) {
    if (!done) co_await op.give_back();
    co_return done;
}

Task<Result<>> change_version(Qcow2Node& node, uint32_t version, Progress progress) {
    Operation op(node);
    CO_CHECK(co_await op.begin());
    Result<> done;
    if (version == 3) {
        done = co_await upgrade_version(op);
    } else {
        done = co_await downgrade_version(op, std::move(progress));
    }
    co_return co_await conclude(op, std::move(done));
}

Task<Result<>> change_refcount_bits(Qcow2Node& node, uint32_t order, Progress progress) {
    Operation op(node);
    CO_CHECK(co_await op.begin());
    Result<> done = co_await rewrite_refcounts(op, order, std::move(progress));
    co_return co_await conclude(op, std::move(done));
}

/// Feature bits and names in the header; what was there comes back when it cannot be written.
Task<Result<>> change_header(Qcow2Node& node, AmendChange change) {
    Operation op(node);
    CO_CHECK(co_await op.begin());
    Image& image = op.image();
    const Header old_header = image.header;
    const Extensions old_extensions = image.extensions;
    Header& h = image.header;
    if (change.lazy_refcounts) {
        h.compatible_features &= ~kCompatLazyRefcounts;
        if (*change.lazy_refcounts) h.compatible_features |= kCompatLazyRefcounts;
    }
    if (change.drop_data_file_raw) h.autoclear_features &= ~kAutoclearRawData;
    if (change.data_file) image.extensions.data_file = *change.data_file;
    Result<> written;
    if (change.data_file) {
        written = co_await op.metadata().write_header();
    } else {
        written = co_await op.metadata().write_features();
    }
    if (!written) {
        image.header = old_header;
        image.extensions = old_extensions;
        co_return written;
    }
    image.geometry = image.header.geometry();
    if (!change.lazy_refcounts) co_return Result<>();
    // Counts may stay behind only after the dirty bit was set, which the next session begins with.
    op.unlock();
    CO_CHECK(co_await op.metadata().settle());
    op.metadata().options().lazy_refcounts = *change.lazy_refcounts;
    co_return Result<>();
}

Task<Result<>> change_key_slots(Qcow2Node& node, Graph& graph, json::object options, bool force) {
    Operation op(node);
    CO_CHECK(co_await op.begin());
    options["format"] = "luks";
    co_return co_await amend_encryption(node.cipher(), op.image(), node.file(), std::move(options), graph.secrets(),
                                        force, node.name());
}

}  // namespace

Task<Result<>> Qcow2Node::amend(json::object options, bool force, Progress progress) {
    CO_CHECK(check_writable());
    CO_TRY(const AmendChange change, parse_amend(image_, name(), options));
    if (change.version > image_.header.version) CO_CHECK(co_await change_version(*this, change.version, progress));
    if (change.luks) CO_CHECK(co_await change_key_slots(*this, graph_, *change.luks, force));
    if (change.refcount_order != image_.header.refcount_order) {
        CO_CHECK(co_await change_refcount_bits(*this, change.refcount_order, progress));
    }
    const bool lazy_changes = change.lazy_refcounts && image_.header.version >= 3;
    if (lazy_changes || change.drop_data_file_raw || change.data_file) {
        CO_CHECK(co_await change_header(*this, change));
    }
    if (change.size) CO_CHECK(co_await resize(*change.size, Preallocation::kOff, true, progress));
    if (change.version < image_.header.version) CO_CHECK(co_await change_version(*this, change.version, progress));
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
