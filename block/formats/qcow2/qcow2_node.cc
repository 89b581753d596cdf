#include "block/formats/qcow2/qcow2_node.h"

#include <algorithm>

#include "block/formats/image_reference.h"
#include "block/formats/qcow2/write_options.h"
#include "block/graph.h"
#include "block/observer.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kDecodesAtOnce = 8;
constexpr uint64_t kEncodesAtOnce = 8;
constexpr auto kWriteBackInterval = std::chrono::seconds(5);
constexpr auto kWriteBackPause = std::chrono::milliseconds(20);  // at least, between two
constexpr uint64_t kDecodedBytes = uint64_t{8} << 20;

size_t decoded_capacity(uint64_t cluster_size) { return std::clamp<uint64_t>(kDecodedBytes / cluster_size, 4, 64); }

}  // namespace

Qcow2Node::Qcow2Node(std::string name, NodeFlags flags, Image image, Setup setup, Graph& graph)
    : FormatNode("qcow2", std::move(name), flags),
      image_(std::move(image)),
      image_file_(this->name()),
      graph_(graph),
      main_loop_(graph.runtime().main_loop()),
      observer_(graph.observer()),
      slice_shift_(slice_shift_of(image_)),
      write_options_(setup.write),
      wants_writable_(setup.writable),
      cipher_(std::move(setup.cipher)),
      decode_slots_(kDecodesAtOnce),
      encode_slots_(kEncodesAtOnce),
      decoded_(decoded_capacity(image_.geometry.cluster_size())) {
    set_size(image_.disk_size);
    set_read_only(true);
    limits_.optimal_transfer = cluster_size();
    if (cipher_) limits_.request_alignment = crypto::kSectorBytes;
    limits_.supports_zeroes = true;
    limits_.zeroes_alignment = uint32_t{1} << image_.geometry.subcluster_bits();
    limits_.discard_alignment = cluster_size();
    allow_fast_paths(true, true);
}

Qcow2Node::~Qcow2Node() = default;

Result<std::shared_ptr<Qcow2Node>> Qcow2Node::create(std::string name, NodeFlags flags, Image image, Setup setup,
                                                     Graph& graph) {
    const CacheSizes caches = image.caches;
    TRY(auto cache, L2SliceCache::create(caches.l2_slice_bytes, caches.l2_bytes / caches.l2_slice_bytes));
    std::shared_ptr<Qcow2Node> node(new Qcow2Node(std::move(name), flags, std::move(image), std::move(setup), graph));
    node->l2_cache_ = std::move(cache);
    node->background_.spawn(node->clean_caches());
    return node;
}

// ---- Life ----

Task<Result<>> Qcow2Node::opened() {
    if (!wants_writable_) {
        if (image_.opened_snapshot) co_return Result<>();
        co_return co_await load_bitmaps(false);
    }
    if (graph_.opens_for_repair) {
        set_read_only(false);  // what check() may change; everybody else finds no metadata to write with
        co_return Result<>();
    }
    CO_CHECK(co_await make_writable());
    start_write_back();
    co_return Result<>();
}

Task<void> Qcow2Node::close() {
    closing_ = true;
    clean_timer_.cancel();
    co_await background_.join();
    Result<> rested = co_await make_read_only();
    if (!rested) log::error("node '{}': closing: {}", name(), rested.error().message());
}

void Qcow2Node::children_changed() {
    FormatNode::children_changed();
    image_file_.point_to(file());
}

Task<Result<>> Qcow2Node::do_flush(Request& rq) {
    if (!metadata_) return FormatNode::do_flush(rq);
    // A corrupt image's metadata stays where it is, so what was acknowledged may be lost.
    if (broken_.load(std::memory_order_relaxed)) return ready_task(check_writable());
    return metadata_->flush();
}

// ---- Background write-back ----

void Qcow2Node::start_write_back() {
    write_back_stops_ = false;
    write_back_.spawn(write_back_in_background());
}

void Qcow2Node::kick_write_back() {
    if (!metadata_->wants_write_back() || write_back_kicked_.exchange(true, std::memory_order_relaxed)) return;
    main_loop_.post([weak = weak_from_this()] {
        if (const auto node = weak.lock()) static_cast<Qcow2Node&>(*node).write_back_timer_.cancel();
    });
}

Task<void> Qcow2Node::write_back_in_background() {
    bool failing = false;
    while (!write_back_stops_) {
        write_back_kicked_.store(false, std::memory_order_relaxed);
        const bool rests = failing || broken_.load(std::memory_order_relaxed) || !metadata_->wants_write_back();
        if (rests) co_await write_back_timer_.after(kWriteBackInterval);
        const bool pending =
            l2_cache_->dirty_count() != 0 || metadata_->refcounts().dirty() || metadata_->wants_write_back();
        if (write_back_stops_ || !pending || broken_.load(std::memory_order_relaxed)) continue;
        Result<> written = co_await metadata_->write_back();
        if (!written && !failing) {
            log::warn("node '{}': writing metadata back: {}; tried again later", name(), written.error().message());
        }
        failing = !written;
        for (const auto next = deadline_in(kWriteBackPause); !write_back_stops_ && Clock::now() < next;) {
            co_await write_back_timer_.until(next);
        }
    }
}

Task<void> Qcow2Node::quiesce() {
    write_back_stops_ = true;
    write_back_timer_.cancel();
    co_await write_back_.join();
}

void Qcow2Node::unquiesce() {
    // Who worked on the image as a whole may have moved blobs.
    decoded_.forget_all();
    if (metadata_ && !closing_) start_write_back();
}

// ---- Facts ----

void Qcow2Node::tell_observer(std::string message, std::optional<uint64_t> offset, std::optional<uint64_t> size,
                              bool fatal) {
    if (!observer_) return;
    main_loop_.post([weak = weak_from_this(), observer = observer_, message = std::move(message), offset, size, fatal] {
        if (const auto node = weak.lock()) observer->image_corrupted(*node, message, offset, size, fatal);
    });
}

Error Qcow2Node::corrupt(std::string message, std::optional<uint64_t> offset, std::optional<uint64_t> size) {
    if (!damage_reported_.exchange(true, std::memory_order_relaxed)) {
        log::error("node '{}': image is corrupt: {}; further damage of it is not logged", name(), message);
        tell_observer(message, offset, size, false);
    }
    return Error(ErrorKind::kCorrupt, fmt::format("node '{}': image is corrupt: {}", name(), message), EIO);
}

bool Qcow2Node::is_tuning(std::string_view option) const {
    return FormatNode::is_tuning(option) ||
           std::ranges::find(kReopenOptionNames, option) != std::end(kReopenOptionNames);
}

bool Qcow2Node::path_suffices() const {
    // Files given explicitly may be those that the image names; the one it names may have changed since.
    const Child* const backing = child("backing");
    if (backing ? backing->node->filename() != image_.full_backing_name : !image_.backing_name.empty()) return false;
    for (const auto& member : options()) {
        const std::string_view key = member.key();
        if (is_tuning(key) || key == "driver" || key == "file" || key == "backing") continue;
        const Child* const given = key == "data-file" ? child(key) : nullptr;
        if (!given) return false;
        const Result<std::string> named = resolve_image_name(own_file_name(file()), image_.extensions.data_file);
        if (!named || given->node->filename() != *named) return false;
    }
    return true;
}

Task<Result<ImageInfo>> Qcow2Node::image_info() {
    CO_TRY(ImageInfo info, co_await FormatNode::image_info());
    // The header changes under the mutex while the image is written.
    const std::shared_ptr<Metadata> metadata = metadata_;
    AsyncMutex::Guard guard;
    if (metadata) guard = co_await metadata->mutex().lock();
    const Header& h = image_.header;
    info.virtual_size = size();
    if (cipher_) info.encrypted = true;
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
    if (cipher_) data["encrypt"] = cipher_->info();
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
