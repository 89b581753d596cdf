// The time in which an image is written: its marks in the header, and how it ends exact.

#include <sys/random.h>

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/metadata.h"
#include "block/formats/qcow2/session_mark.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kSector = 512;
constexpr uint64_t kFeaturesAt = 72;
constexpr int kSettleRounds = 16;

uint64_t random_session() {
    uint64_t number = 0;
    while (number == 0) {
        if (getrandom(&number, sizeof number, 0) != sizeof number) number = 0;
    }
    return number;
}

void put_features(std::span<uint8_t> cluster, uint64_t incompatible, uint64_t compatible, uint64_t autoclear) {
    store_be64(cluster.data() + kFeaturesAt, incompatible);
    store_be64(cluster.data() + kFeaturesAt + 8, compatible);
    store_be64(cluster.data() + kFeaturesAt + 16, autoclear);
}

}  // namespace

/// Sector by sector from the last, each stable before the next: see put_session().
Task<Result<>> Metadata::change_header(std::span<const uint8_t> before, std::span<const uint8_t> after) {
    for (uint64_t at = after.size(); at != 0;) {
        at -= kSector;
        if (std::ranges::equal(before.subspan(at, kSector), after.subspan(at, kSector))) continue;
        CO_CHECK(co_await file_.write(at, after.subspan(at, kSector), "qcow2 header"));
        CO_CHECK(co_await file_.flush());
    }
    co_return Result<>();
}

Task<Result<>> Metadata::begin_session() {
    if (in_session()) co_return Result<>();
    auto guard = co_await mutex_.lock();
    if (in_session()) co_return Result<>();
    Header& h = image_.header;
    std::vector<uint8_t> before(cluster_size());
    CO_CHECK(co_await file_.read(0, before, "qcow2 header"));
    std::vector<uint8_t> after = before;
    const SessionExtension session{random_session(), kSessionOpen};
    const bool marked = put_session(after, h, session);
    const bool dirty = h.version >= 3 && options_.lazy_refcounts;
    uint64_t autoclear = h.autoclear_features & kAutoclearKnown & ~kAutoclearSession;
    if (marked && log_.attached()) autoclear |= kAutoclearSession;
    if (h.version >= 3) {
        put_features(after, h.incompatible_features | (dirty ? kIncompatDirty : 0), h.compatible_features, autoclear);
    }
    CO_CHECK(co_await change_header(before, after));
    const bool found_corrupt = h.has_incompatible(kIncompatCorrupt);
    if (dirty) h.incompatible_features |= kIncompatDirty;
    if (h.version >= 3) h.autoclear_features = autoclear;
    image_.extensions.session = marked ? std::optional(session) : std::nullopt;
    // Somebody who found damage meanwhile wrote that word, too.
    if (found_corrupt) CO_CHECK(co_await write_features());
    log_.start(session.session);
    in_session_.store(true, std::memory_order_release);
    co_return Result<>();
}

/// Counted places that nothing names lose their counts.
Task<Result<>> Metadata::return_reserved() {
    auto guard = co_await mutex_.lock();
    const HostRun spare = std::exchange(spare_tables_, {});
    next_spare_tables_ = 1;
    if (spare.clusters != 0) {
        Result<std::vector<HostRun>> freed = co_await allocator_.free(spare.offset, spare.clusters * cluster_size());
        if (!freed) {
            spare_tables_ = spare;
            co_return std::unexpected(std::move(freed).error());
        }
    }
    co_return co_await allocator_.settle();
}

Task<Result<>> Metadata::settle() {
    CO_CHECK(co_await flush());
    if (!in_session() && !marks_left_) co_return Result<>();
    CO_CHECK(co_await return_reserved());
    // A flush lowers counts in memory after it has written them: until nothing is left to be written.
    strict_.store(true);
    Result<> flushed;
    for (int round = 0; round < kSettleRounds && flushed; round++) {
        flushed = co_await flush();
        if (!refcounts_.dirty() && !has_freed()) break;
    }
    strict_.store(false);
    CO_CHECK(flushed);
    if (refcounts_.dirty() || has_freed()) {
        co_return fail(ErrorKind::kIo, "node '{}': freed clusters of the image could not be given back",
                       file_.node_name());
    }
    co_return co_await end_session();
}

Task<Result<>> Metadata::end_session() {
    auto guard = co_await mutex_.lock();
    Header& h = image_.header;
    std::vector<uint8_t> before(cluster_size());
    CO_CHECK(co_await file_.read(0, before, "qcow2 header"));
    std::vector<uint8_t> after = before;
    auto& session = image_.extensions.session;
    if (session) put_session(after, h, {session->session, session->flags & ~kSessionOpen});
    const uint64_t incompatible = h.incompatible_features & ~kIncompatDirty;
    const uint64_t autoclear = h.autoclear_features & ~kAutoclearSession;
    if (h.version >= 3) put_features(after, incompatible, h.compatible_features, autoclear);
    // Whatever an error leaves in the file, the next session makes all its marks again.
    in_session_.store(false, std::memory_order_release);
    marks_left_ = true;
    CO_CHECK(co_await change_header(before, after));
    marks_left_ = false;
    h.incompatible_features = incompatible;
    h.autoclear_features = autoclear;
    if (session) session->flags &= ~kSessionOpen;
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
