#include "block/formats/qcow2/qcow2_node.h"

#include <algorithm>
#include <bit>

#include "block/graph.h"
#include "block/observer.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kDecodesAtOnce = 8;
constexpr uint64_t kDecodedBytes = uint64_t{8} << 20;

size_t decoded_capacity(uint64_t cluster_size) { return std::clamp<uint64_t>(kDecodedBytes / cluster_size, 4, 64); }

uint32_t slice_shift_of(const Image& image) {
    const uint32_t entries = image.caches.l2_slice_bytes / image.geometry.l2_entry_bytes();
    return image.geometry.cluster_bits + static_cast<uint32_t>(std::countr_zero(entries));
}

}  // namespace

Qcow2Node::Qcow2Node(std::string name, NodeFlags flags, Image image, Graph& graph)
    : FormatNode("qcow2", std::move(name), flags),
      image_(std::move(image)),
      image_file_(this->name()),
      main_loop_(graph.runtime().main_loop()),
      observer_(graph.observer()),
      slice_shift_(slice_shift_of(image_)),
      decode_slots_(kDecodesAtOnce),
      decoded_(decoded_capacity(image_.geometry.cluster_size())) {
    set_size(image_.disk_size);
    set_read_only(true);
    limits_.optimal_transfer = cluster_size();
    allow_fast_paths(true, false);
}

Qcow2Node::~Qcow2Node() = default;

Result<std::shared_ptr<Qcow2Node>> Qcow2Node::create(std::string name, NodeFlags flags, Image image, Graph& graph) {
    const CacheSizes caches = image.caches;
    TRY(auto cache, L2SliceCache::create(caches.l2_slice_bytes, caches.l2_bytes / caches.l2_slice_bytes));
    std::shared_ptr<Qcow2Node> node(new Qcow2Node(std::move(name), flags, std::move(image), graph));
    node->l2_cache_ = std::move(cache);
    if (caches.clean_interval_s != 0) node->background_.spawn(node->clean_caches());
    return node;
}

Task<void> Qcow2Node::clean_caches() {
    const auto interval = std::chrono::seconds(image_.caches.clean_interval_s);
    for (;;) {
        const bool expired = co_await clean_timer_.after(interval);
        if (!expired || closing_) co_return;
        l2_cache_->clean();
        decoded_.clean();
    }
}

Task<void> Qcow2Node::close() {
    closing_ = true;
    clean_timer_.cancel();
    co_await background_.join();
}

void Qcow2Node::children_changed() {
    FormatNode::children_changed();
    image_file_.point_to(file());
}

Task<Result<>> Qcow2Node::prepare_reopen(const json::object& options, const NodeFlags& flags) {
    if (!flags.read_only && !flags.auto_read_only) {
        co_return fail(ErrorKind::kReadOnly,
                       "Image is read-only; reopen it with read-only=on; node '{}': this build does not "
                       "write qcow2 images",
                       name());
    }
    co_return co_await FormatNode::prepare_reopen(options, flags);
}

Error Qcow2Node::corrupt(std::string message, std::optional<uint64_t> offset, std::optional<uint64_t> size) {
    if (!damage_reported_.exchange(true, std::memory_order_relaxed)) {
        log::error("node '{}': image is corrupt: {}; further damage of it is not logged", name(), message);
        if (observer_) {
            main_loop_.post([weak = weak_from_this(), observer = observer_, message, offset, size] {
                if (const auto node = weak.lock()) observer->image_corrupted(*node, message, offset, size, false);
            });
        }
    }
    return Error(ErrorKind::kCorrupt, fmt::format("node '{}': image is corrupt: {}", name(), message), EIO);
}

Task<Result<ImageInfo>> Qcow2Node::image_info() {
    CO_TRY(ImageInfo info, co_await FormatNode::image_info());
    const Header& h = image_.header;
    info.virtual_size = size();
    info.cluster_size = h.cluster_size();
    info.dirty = h.has_incompatible(kIncompatDirty);
    info.backing_filename = image_.backing_name;
    info.full_backing_filename = image_.full_backing_name;
    info.backing_format = image_.extensions.backing_format;
    for (const Snapshot& s : image_.snapshots) {
        info.snapshots.push_back({s.id, s.name, s.vm_state_size, s.date_sec, s.date_nsec, s.vm_clock_ns, s.icount});
    }
    json::object data{{"compat", h.version >= 3 ? "1.1" : "0.10"},
                      {"compression-type", h.compression_type == 1 ? "zstd" : "zlib"},
                      {"refcount-bits", int64_t{1} << h.refcount_order}};
    if (h.version >= 3) {
        data["lazy-refcounts"] = h.has_compatible(kCompatLazyRefcounts);
        data["corrupt"] = h.has_incompatible(kIncompatCorrupt);
        data["extended-l2"] = h.has_incompatible(kIncompatExtendedL2);
    }
    if (h.has_incompatible(kIncompatDataFile)) {
        if (!image_.extensions.data_file.empty()) data["data-file"] = image_.extensions.data_file;
        data["data-file-raw"] = h.has_autoclear(kAutoclearRawData);
    }
    if (!image_.bitmaps.empty()) {
        json::array bitmaps;
        for (const BitmapEntry& b : image_.bitmaps) {
            json::array flags;
            if (!image_.bitmaps_trusted || (b.flags & BitmapEntry::kInUse)) flags.emplace_back("in-use");
            if (b.flags & BitmapEntry::kAuto) flags.emplace_back("auto");
            bitmaps.push_back(json::object{
                {"name", b.name}, {"granularity", static_cast<int64_t>(b.granularity())}, {"flags", std::move(flags)}});
        }
        data["bitmaps"] = std::move(bitmaps);
    }
    info.format_specific = {{"type", "qcow2"}, {"data", std::move(data)}};
    co_return info;
}

}  // namespace gantry::block::qcow2
