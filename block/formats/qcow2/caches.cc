// The caches of an open image: dropped when unused, resized with the disk and by a reopen.

#include <bit>

#include "block/formats/qcow2/qcow2_node.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr auto kNever = std::chrono::hours(24 * 365);

}  // namespace

uint32_t Qcow2Node::slice_shift_of(const Image& image) {
    const uint32_t entries = image.caches.l2_slice_bytes / image.geometry.l2_entry_bytes();
    return image.geometry.cluster_bits + static_cast<uint32_t>(std::countr_zero(entries));
}

Task<void> Qcow2Node::clean_caches() {
    while (!closing_) {
        const std::chrono::seconds interval(image_.caches.clean_interval_s);
        const bool expired = co_await clean_timer_.after(interval.count() != 0 ? interval : kNever);
        if (closing_) co_return;
        if (!expired) continue;  // the interval may have changed
        l2_cache_->clean();
        decoded_.clean();
        const std::shared_ptr<Metadata> metadata = metadata_;
        if (!metadata) continue;
        auto guard = co_await metadata->mutex().lock();
        metadata->refcounts().clean();
    }
}

Result<Qcow2Node::NewCaches> Qcow2Node::prepare_caches(const json::object& options) const {
    NewCaches next;
    TRY(next.sizes, cache_sizes(schema::Options(options), geometry(), image_.disk_size, name()));
    const CacheSizes& now = image_.caches;
    if (next.sizes.l2_slice_bytes == now.l2_slice_bytes && next.sizes.l2_bytes == now.l2_bytes) return next;
    TRY(next.l2, L2SliceCache::create(next.sizes.l2_slice_bytes, next.sizes.l2_bytes / next.sizes.l2_slice_bytes));
    return next;
}

void Qcow2Node::adopt_caches(NewCaches next) {
    image_.caches = next.sizes;
    if (next.l2) {
        l2_cache_->reshape(std::move(next.l2));
        slice_shift_ = slice_shift_of(image_);
    }
    if (metadata_) metadata_->refcounts().set_cache_bytes(next.sizes.refcount_bytes);
    clean_timer_.cancel();
}

void Qcow2Node::fit_caches() {
    if (l2_cache_->dirty_count() != 0) return;
    Result<NewCaches> next = prepare_caches(options());
    if (next) return adopt_caches(std::move(*next));
    log::warn("node '{}': its caches stay as they are: {}", name(), next.error().message());
}

}  // namespace gantry::block::qcow2
