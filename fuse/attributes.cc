#include "fuse/attributes.h"

#include <sys/stat.h>
#include <time.h>

#include <algorithm>

namespace gantry::fuse {

namespace {

constexpr int64_t kSecond = 1'000'000'000;
constexpr int64_t kAllocationLife = kSecond;
constexpr int64_t kAllocationPause = 10'000'000;  // between two looks, however much is written
constexpr uint32_t kBlockSize = 4096;             // st_blksize

int64_t clock_ns(clockid_t clock) {
    timespec t{};
    ::clock_gettime(clock, &t);
    return t.tv_sec * kSecond + t.tv_nsec;
}

std::optional<int64_t> integer(const json::object& from, std::string_view key, int64_t limit) {
    const json::value* value = from.if_contains(key);
    if (!value) return std::nullopt;
    boost::system::error_code failed;
    const auto n = value->to_number<int64_t>(failed);
    if (failed || n < 0 || n > limit) return std::nullopt;
    return n;
}

}  // namespace

int64_t Attributes::coarse_now_ns() { return clock_ns(CLOCK_REALTIME_COARSE); }

void Attributes::raise(std::atomic<int64_t>& to, int64_t least) {
    int64_t seen = to.load(std::memory_order_relaxed);
    while (seen < least && !to.compare_exchange_weak(seen, least, std::memory_order_relaxed)) {
    }
}

Attributes::Attributes(bool writable, uint32_t uid, uint32_t gid)
    : mode_(writable ? 0600 : 0400),
      uid_(uid),
      gid_(gid),
      ctime_ns_(clock_ns(CLOCK_REALTIME)),
      mtime_ns_(ctime_ns_.load()) {}

AttrOut Attributes::answer(uint64_t size) const {
    const int64_t mtime = mtime_ns_.load(std::memory_order_relaxed);
    const int64_t ctime = std::max(mtime, ctime_ns_.load(std::memory_order_relaxed));
    const int64_t allocated = allocation_bytes_.load(std::memory_order_relaxed);
    const uint64_t stored = allocated > 0 ? static_cast<uint64_t>(allocated) : size;
    AttrOut out;
    out.attr_valid = 1;
    Attr& a = out.attr;
    a.ino = kRootNode;
    a.size = size;
    a.blocks = stored / 512 + (stored % 512 != 0);
    a.atime = a.mtime = static_cast<uint64_t>(mtime / kSecond);
    a.atime_nsec = a.mtime_nsec = static_cast<uint32_t>(mtime % kSecond);
    a.ctime = static_cast<uint64_t>(ctime / kSecond);
    a.ctime_nsec = static_cast<uint32_t>(ctime % kSecond);
    a.mode = S_IFREG | mode();
    a.nlink = 1;
    a.uid = uid_.load(std::memory_order_relaxed);
    a.gid = gid_.load(std::memory_order_relaxed);
    a.blksize = kBlockSize;
    return out;
}

void Attributes::status_changed() { raise(ctime_ns_, clock_ns(CLOCK_REALTIME)); }

void Attributes::data_changed_visibly() {
    // Two changes within the clock's tick, or a clock that was set back, are still two.
    int64_t seen = mtime_ns_.load(std::memory_order_relaxed);
    while (!mtime_ns_.compare_exchange_weak(seen, std::max(seen + 1, clock_ns(CLOCK_REALTIME)),
                                            std::memory_order_relaxed)) {
    }
    allocation_dirty_.store(true);
}

bool Attributes::allocation_stale() const {
    const int64_t age = clock_ns(CLOCK_MONOTONIC_COARSE) - allocation_time_ns_.load(std::memory_order_relaxed);
    return age > (allocation_dirty_.load(std::memory_order_relaxed) ? kAllocationPause : kAllocationLife);
}

void Attributes::set_allocation(std::optional<uint64_t> bytes) {
    allocation_bytes_.store(bytes && *bytes <= INT64_MAX ? static_cast<int64_t>(*bytes) : -1,
                            std::memory_order_relaxed);
    allocation_time_ns_.store(clock_ns(CLOCK_MONOTONIC_COARSE), std::memory_order_relaxed);
}

json::object Attributes::save() const {
    return {{"mode", mode()},
            {"uid", uid_.load(std::memory_order_relaxed)},
            {"gid", gid_.load(std::memory_order_relaxed)},
            {"mtime-ns", mtime_ns_.load(std::memory_order_relaxed)},
            {"ctime-ns", ctime_ns_.load(std::memory_order_relaxed)}};
}

Result<> Attributes::load(const json::object& saved) {
    const auto mode = integer(saved, "mode", 07777);
    const auto uid = integer(saved, "uid", UINT32_MAX);
    const auto gid = integer(saved, "gid", UINT32_MAX);
    const auto mtime = integer(saved, "mtime-ns", INT64_MAX);
    const auto ctime = integer(saved, "ctime-ns", INT64_MAX);
    if (!mode || !uid || !gid || !mtime || !ctime)
        return fail(ErrorKind::kInvalid, "what was saved about a FUSE mount does not tell its file's attributes");
    set_mode(static_cast<uint32_t>(*mode));
    set_uid(static_cast<uint32_t>(*uid));
    set_gid(static_cast<uint32_t>(*gid));
    ctime_ns_.store(*ctime, std::memory_order_relaxed);
    // The process before this one may have written until its end without saving the time of it.
    mtime_ns_.store(*mtime, std::memory_order_relaxed);
    data_changed_visibly();
    return {};
}

}  // namespace gantry::fuse
