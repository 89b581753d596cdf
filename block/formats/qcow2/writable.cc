// From read-only to writable and back; what a crash left behind; the end of writing when an image turns out corrupt.

#include <cerrno>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/qcow2/refusal.h"
#include "block/formats/qcow2/write_options.h"
#include "block/observer.h"
#include "runtime/log.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kIncompatibleOffset = 72;  // in the header

}  // namespace

// ---- May it be written? ----

Result<> check_may_be_written(const Image& image, std::string_view node) {
    if (image.header.has_incompatible(kIncompatCorrupt)) {
        return refuse(ErrorKind::kReadOnly, node,
                      "qcow2: Image is corrupt; cannot be opened read/write; open it with read-only=on, or repair it",
                      "incompatible_features at byte 72 are {:#x}", image.header.incompatible_features);
    }
    if (image.opened_snapshot) {
        return refuse(ErrorKind::kReadOnly, node, "An internal snapshot can only be read; open it with read-only=on",
                      "the snapshot is '{}'", image.opened_snapshot->name);
    }
    return {};
}

Result<> Qcow2Node::check_writable() const {
    if (broken_.load(std::memory_order_relaxed)) {
        const char* why = header_lost_.load(std::memory_order_relaxed) ? "the image lost its header and"
                                                                       : "the image is marked corrupt and";
        return std::unexpected(
            Error(ErrorKind::kCorrupt, fmt::format("node '{}': {} takes no more writes", name(), why), EIO));
    }
    if (!metadata_) return fail(ErrorKind::kReadOnly, "node '{}' is read-only", name());
    return {};
}

bool Qcow2Node::write_allowed(uint64_t host_offset, uint64_t length) {
    if (broken_.load(std::memory_order_relaxed)) return false;
    if (geometry().external_data) return true;
    if (metadata_->overlap().hits(host_offset, length)) return false;
    // A bad pointer must not make the file grow without bound. After a power cut an entry may name a place that the
    // file did not reach before it.
    const uint64_t end = host_offset + length;
    const uint64_t cs = geometry().cluster_size();
    return end <= file().size() + cs || end <= metadata_->allocator().fresh_from() + cs;
}

Task<Error> Qcow2Node::write_refused(Request& rq, uint64_t host_offset, uint64_t length) {
    if (Result<> writable = check_writable(); !writable) co_return std::move(writable).error();
    std::string message = fmt::format("Preventing invalid write beyond the end of the file {:#x}", file().size());
    {
        auto guard = co_await metadata_->mutex().lock();
        if (const std::optional<Structure> what = metadata_->overlap().what(host_offset, length)) {
            message = fmt::format("Preventing invalid write on metadata (overlaps with {})", structure_name(*what));
        }
    }
    co_return co_await corrupt_on_write(std::move(message), host_offset, length);
}

/// May be called with or without Metadata::mutex(), so it does not take it: the header's word is written by itself.
Task<Error> Qcow2Node::corrupt_on_write(std::string message, uint64_t offset, uint64_t bytes) {
    if (!broken_.exchange(true)) {
        log::error("node '{}': marking the image as corrupt: {}; further corruption of it is not logged", name(),
                   message);
        tell_observer(message, offset, bytes, true);
        if (image_.header.version >= 3) {
            image_.header.incompatible_features |= kIncompatCorrupt;
            std::array<uint8_t, 8> word;
            store_be64(word.data(), image_.header.incompatible_features);
            Result<> marked = co_await image_file_.write(kIncompatibleOffset, word, "header");
            if (marked) marked = co_await image_file_.flush();
            if (!marked) log::error("node '{}': marking the image as corrupt: {}", name(), marked.error().message());
        }
    }
    co_return Error(ErrorKind::kCorrupt, fmt::format("node '{}': image is corrupt: {}", name(), message), EIO);
}

void Qcow2Node::header_lost(const Error& error) {
    header_lost_ = true;
    if (broken_.exchange(true)) return;
    log::error(
        "node '{}': nobody knows what the header of the image says: {}; it takes no more writes until it is "
        "opened anew",
        name(), error.message());
}

Node* Qcow2Node::data_file() { return geometry().external_data ? &data() : nullptr; }

// ---- Read-only to writable ----

Task<Result<>> Qcow2Node::make_writable() {
    Result<> done = co_await become_writable();
    if (!done) metadata_.reset();
    set_read_only(!done);
    co_return done;
}

Task<Result<>> Qcow2Node::become_writable() {
    CO_CHECK(check_may_be_written(image_, name()));
    if (header_lost_) {
        co_return refuse(ErrorKind::kReadOnly, name(), "The header of the image could not be written",
                         "what it says now is known only after it is opened anew");
    }
    broken_ = false;
    if (l2_cache_->dirty_count() != 0) {
        // What an earlier time of writing could not bring to the file.
        CO_TRY(l2_cache_, L2SliceCache::create(l2_cache_->slice_bytes(), l2_cache_->slots()));
    }
    Metadata::Host& host = *this;
    metadata_ = std::make_shared<Metadata>(host, image_file_, image_, *l2_cache_, write_options_);
    attach_log();
    CO_CHECK(co_await repair_after_crash());
    CO_CHECK(co_await metadata_->load());
    CO_CHECK(co_await clean_header());
    recycle_places();
    co_return co_await load_bitmaps(true);
}

/// Works on the file alone: Metadata is not loaded yet.
Task<Result<>> Qcow2Node::repair_after_crash() {
    const auto& session = image_.extensions.session;
    const bool left_open = session && (session->flags & kSessionOpen);
    CO_CHECK(co_await replay_log());
    const bool dirty = image_.header.has_incompatible(kIncompatDirty);
    if (dirty) {
        log::warn("node '{}': the image was not closed; its refcounts are being repaired", name());
        CO_TRY(const ImageCheck check, co_await check_metadata(image_file_, image_, CheckRepair::kAll, {}));
        if (check.check_errors || check.corruptions) {
            co_return refuse_corrupt(name(), "Could not repair dirty image", "{} corruptions and {} errors are left",
                                     check.corruptions, check.check_errors);
        }
    } else if (left_open) {
        CO_TRY(const uint64_t leaked, co_await reclaim_leaks(image_file_, image_));
        if (leaked) log::info("node '{}': the image was not closed; {} leaked clusters are free again", name(), leaked);
    }
    if (dirty || left_open) {
        l2_cache_->drop_all();
        decoded_.forget_all();
    }
    co_return Result<>();
}

/// Marks that others would misread once we write: unknown autoclear bits, the open mark of a session that is over.
Task<Result<>> Qcow2Node::clean_header() {
    Header& h = image_.header;
    auto guard = co_await metadata_->mutex().lock();
    auto& session = image_.extensions.session;
    if (session && (session->flags & kSessionOpen)) {
        session->flags &= ~kSessionOpen;
        CO_CHECK(co_await metadata_->write_header());
    }
    if (h.version < 3 || (h.autoclear_features & ~kAutoclearKnown) == 0) co_return Result<>();
    h.autoclear_features &= kAutoclearKnown;
    co_return co_await metadata_->write_features();
}

// ---- Writable to read-only ----

Task<Result<>> Qcow2Node::make_read_only() {
    if (!metadata_) co_return Result<>();
    Result<> result = co_await come_to_rest();
    drop_metadata();
    co_return result;
}

/// The file is exact afterwards. A corrupt image is left as it is.
Task<Result<>> Qcow2Node::come_to_rest() {
    if (broken_.load(std::memory_order_relaxed)) co_return Result<>();
    Result<> stored = co_await store_bitmaps();
    Result<> settled = co_await metadata_->settle();
    co_return stored ? std::move(settled) : std::move(stored);
}

void Qcow2Node::drop_metadata() {
    keep_l1();
    metadata_.reset();
    set_read_only(true);
}

/// The L1 table outlives the time of writing.
void Qcow2Node::keep_l1() {
    const L1Table& l1 = metadata_->l1();
    uint64_t used = l1.size();
    while (used > 0 && l1.get(used - 1) == 0) used--;
    image_.l1.resize(used);
    for (uint64_t i = 0; i < used; i++) image_.l1[i] = l1.get(i);
}

// ---- Reopen ----

Task<Result<>> Qcow2Node::prepare_reopen(const json::object& options, const NodeFlags& flags) {
    CO_CHECK(co_await FormatNode::prepare_reopen(options, flags));
    Reopening next;
    next.was_writable = metadata_ != nullptr;
    // What auto-read-only made of the node stays unless the option itself changes.
    next.writable = flags.read_only == this->flags().read_only ? next.was_writable : !flags.read_only;
    CO_TRY(next.options, write_options(schema::Options(options), image_.header, flags.discard, name()));
    CO_TRY(next.caches, prepare_caches(options));
    if (next.writable && !next.was_writable) CO_CHECK(check_may_be_written(image_, name()));
    if (next.was_writable && !broken_.load(std::memory_order_relaxed)) {
        if (!next.writable) {
            // Now, while the file may still be written.
            Result<> rested = co_await come_to_rest();
            if (!rested) {
                (void)co_await load_bitmaps(true);
                co_return rested;
            }
            next.stored = true;
        } else if (!same_options(next.options, write_options_)) {
            CO_CHECK(co_await metadata_->settle());
            keep_l1();
            Metadata::Host& host = *this;
            next.metadata = std::make_shared<Metadata>(host, image_file_, image_, *l2_cache_, next.options);
            CO_CHECK(co_await next.metadata->load());
        } else if (next.caches.l2) {
            CO_CHECK(co_await metadata_->flush());
        }
    }
    reopening_ = std::move(next);
    co_return Result<>();
}

void Qcow2Node::commit_reopen() {
    CHECK(reopening_, "a reopen is prepared before it is committed");
    write_options_ = reopening_->options;
    if (reopening_->was_writable && !reopening_->writable) drop_metadata();
    if (reopening_->metadata) {
        metadata_ = std::move(reopening_->metadata);
        attach_log();
    }
    // What a corrupt image could not write any more stays readable.
    if (l2_cache_->dirty_count() == 0) adopt_caches(std::move(reopening_->caches));
}

void Qcow2Node::abort_reopen() {
    if (reopening_ && !reopening_->stored) reopening_.reset();
}

Task<Result<>> Qcow2Node::reopened(bool committed) {
    if (!reopening_) co_return Result<>();
    const bool becomes_writable = committed && reopening_->writable && !reopening_->was_writable;
    const bool unmarked = !committed && reopening_->stored;
    reopening_.reset();
    if (becomes_writable) co_return co_await make_writable();
    if (unmarked) co_return co_await load_bitmaps(true);
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
