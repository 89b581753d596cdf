// Many writers on few clusters, from every loop at once, over small caches and failing media.

#include <catch2/catch.hpp>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <random>
#include <sstream>

#include "block/image_control.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"
#include "tests/unit/block/qcow2_memory_image.h"

using namespace gantry;
using namespace gantry::test;
using block::Channel;
using block::WriteFlags;
using Op = MemoryDisk::Op;

namespace {

constexpr uint64_t kSector = 512;
constexpr unsigned kWorkers = 12;

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr unsigned kOperations = 250;
#define STRESS_SANITIZED
#endif
#endif
#ifndef STRESS_SANITIZED
#ifdef NDEBUG
constexpr unsigned kOperations = 1200;
#else
constexpr unsigned kOperations = 300;
#endif
#endif

unsigned operations() { return std::getenv("GANTRY_SOAK") ? 30 * kOperations : kOperations; }

struct Shape {
    const char* create;
    const char* node = "";
    uint64_t size = 3 << 20;
    bool backing = false;
    bool compress = false;
    bool snapshots = false;  // and compaction, meanwhile
    bool faults = false;
};

const Shape kShapes[] = {
    {"cluster_size=4k", ",'l2-cache-size':4096,'l2-cache-entry-size':512"},
    {"cluster_size=512", ",'l2-cache-size':2048,'l2-cache-entry-size':512,'refcount-cache-size':2048", 1 << 20, true},
    {"cluster_size=64k", "", 3 << 20, true, false, true},
    {"extended_l2=on,cluster_size=16k", ",'l2-cache-size':4096,'l2-cache-entry-size':512", 3 << 20, true},
    {"extended_l2=on,cluster_size=64k", ",'discard-no-unref':true", 6 << 20, false, true, true},
    {"cluster_size=4k", ",'l2-cache-size':4096,'l2-cache-entry-size':512,'pass-discard-other':true", 3 << 20, true,
     true, true},
    {"cluster_size=4k,lazy_refcounts=on", ",'overlap-check':'all'", 3 << 20, false, false, true},
    {"compat=0.10,cluster_size=1k", ",'l2-cache-size':2048,'l2-cache-entry-size':512", 2 << 20},
    {"cluster_size=4k", ",'l2-cache-size':4096,'l2-cache-entry-size':512", 3 << 20, true, true, false, true},
    {"cluster_size=512,refcount_bits=1", ",'l2-cache-size':2048,'l2-cache-entry-size':512,'refcount-cache-size':2048",
     1 << 20, false, false, false, true},
    {"extended_l2=on,cluster_size=16k", ",'l2-cache-size':4096,'l2-cache-entry-size':512", 3 << 20, true, true, true,
     true},
    {"cluster_size=4k,lazy_refcounts=on", "", 3 << 20, false, true, true, true},
};

/// A sector says which one it is, so bytes of another place are told apart from those that somebody wrote here.
/// Version 0: zeroes. The bulk compresses well.
void fill(uint8_t* at, uint64_t sector, uint64_t version) {
    std::memset(at, version == 0 ? 0 : static_cast<int>(1 + version % 255), kSector);
    if (version == 0) return;
    std::memcpy(at, &sector, 8);
    std::memcpy(at + 8, &version, 8);
}
/// Its version; nullopt: nobody wrote this here.
std::optional<uint64_t> version_of(const uint8_t* at, uint64_t sector) {
    uint64_t version = 0;
    std::memcpy(&version, at + 8, 8);
    uint8_t expected[kSector];
    fill(expected, sector, version);
    if (std::memcmp(at, expected, kSector) != 0) return std::nullopt;
    return version;
}

/// The disk is half stripes, half common ground. Stripes are sectors dealt to the workers in turn, so each cluster has
/// parts of all of them; each knows what its own hold. Common ground is written by everybody in any length; whatever a
/// sector holds must have been meant for it.
struct Stress {
    Stress(MemoryImage& fixture, const Shape& s) : f(fixture), shape(s) {}
    MemoryImage& f;
    const Shape& shape;
    uint64_t sectors = 0;
    uint64_t cluster = 0;
    uint64_t ground = 0;                         // first sector of the common ground
    std::vector<std::vector<uint64_t>> stripes;  // of stripe sectors: versions they may hold; their owner's
    std::atomic<uint64_t> next_version{1};
    std::atomic<unsigned> running{0};
    std::atomic<uint64_t> failed{0}, whole_operations{0};
    std::mutex mutex;
    std::string fault;

    void note(std::string text) {
        const std::lock_guard lock(mutex);
        if (fault.empty()) fault = std::move(text);
    }
    bool broken() {
        const std::lock_guard lock(mutex);
        return !fault.empty();
    }
};

struct Worker {
    Stress& s;
    Channel& channel;
    unsigned number;
    std::mt19937_64 random;
    Bytes data = {};

    /// Runs of own sectors are short: the stripe is `width` sectors wide.
    static constexpr uint64_t kWidth = 3;
    struct Range {
        uint64_t first = 0, count = 0;
    };
    Range own() {
        const uint64_t turns = s.ground / (kWidth * kWorkers);
        const uint64_t at = (random() % turns) * kWidth * kWorkers + number * kWidth;
        const uint64_t skip = random() % kWidth;
        return {at + skip, 1 + random() % (kWidth - skip)};
    }
    Range common() {
        const uint64_t count = s.sectors - s.ground;
        Range r{s.ground + random() % count, 1 + random() % (random() % 8 ? 24 : 300)};
        if (random() % 3 == 0) {  // whole clusters
            const uint64_t cluster = std::max<uint64_t>(s.cluster / kSector, 1);
            r.first = std::max(r.first / cluster * cluster, s.ground);
            r.count = cluster * (1 + random() % 3);
        }
        r.count = std::min(r.count, s.sectors - r.first);
        return r;
    }

    Task<Result<>> write(Range r, std::vector<uint64_t>& versions) {
        data.resize(r.count * kSector);
        const bool same = random() % 2;
        const uint64_t one = s.next_version.fetch_add(r.count);
        versions.clear();
        for (uint64_t i = 0; i < r.count; i++) {
            versions.push_back(same ? one : one + i);
            fill(data.data() + i * kSector, r.first + i, versions.back());
        }
        const iovec iov{data.data(), data.size()};
        if (random() % 3 == 0) {
            const int tried = channel.try_write(r.first * kSector, IoVec(iov), WriteFlags::kNone);
            if (tried == 0) co_return Result<>();
        }
        const bool compressed = s.shape.compress && random() % 3 == 0;
        co_return co_await channel.write(r.first * kSector, IoVec(iov),
                                         compressed ? WriteFlags::kCompressed : WriteFlags::kNone);
    }
    Task<Result<>> zero(Range r) {
        co_return co_await channel.write_zeroes(r.first * kSector, r.count * kSector,
                                                random() % 2 ? WriteFlags::kMayUnmap : WriteFlags::kNone);
    }
    Task<Result<>> read(Range r) {
        data.assign(r.count * kSector, 0xee);
        const iovec iov{data.data(), data.size()};
        if (random() % 2) {
            const int tried = channel.try_read(r.first * kSector, IoVec(iov));
            if (tried == 0) co_return Result<>();
        }
        co_return co_await channel.read(r.first * kSector, IoVec(iov));
    }
    void expect(bool right, const char* what, uint64_t sector) {
        if (right) return;
        uint64_t says[2];
        const uint8_t* at = data.data();
        std::memcpy(says, at, sizeof says);
        s.note(fmt::format("worker {}: {}: sector {}; the first one read says {} of sector {}", number, what, sector,
                           says[1], says[0]));
    }

    /// Own sectors: what is read is what was written last, or, after a failure, one of what was tried.
    void check_own(Range r) {
        for (uint64_t i = 0; i < r.count; i++) {
            const auto version = version_of(data.data() + i * kSector, r.first + i);
            auto& may = s.stripes[r.first + i];
            expect(version && std::ranges::find(may, *version) != may.end(), "its own sector is not as it left it",
                   r.first + i);
            if (version) may = {*version};
        }
    }
    void check_common(Range r) {
        for (uint64_t i = 0; i < r.count; i++)
            expect(version_of(data.data() + i * kSector, r.first + i).has_value(), "foreign bytes", r.first + i);
    }
    void failure(const char* what, const Result<>& result) {
        s.failed++;
        if (!s.shape.faults) s.note(fmt::format("worker {}: {}: {}", number, what, result.error().message()));
        if (result.error().kind() == ErrorKind::kCorrupt)
            s.note("the image is marked corrupt: " + result.error().message());
    }

    Task<void> one_own() {
        const Range r = own();
        const unsigned kind = random() % 10;
        std::vector<uint64_t> versions(r.count, 0);
        Result<> done;
        if (kind < 4) {
            done = co_await write(r, versions);
        } else if (kind < 5) {
            done = co_await zero(r);
        } else {
            done = co_await read(r);
            if (done) check_own(r);
            if (!done) failure("read", done);
            co_return;
        }
        if (!done) failure("write", done);
        for (uint64_t i = 0; i < r.count; i++) {
            auto& may = s.stripes[r.first + i];
            if (done) may.clear();
            may.push_back(versions[i]);
        }
    }
    Task<void> one_common() {
        const Range r = common();
        const unsigned kind = random() % 20;
        std::vector<uint64_t> versions;
        Result<> done;
        if (kind < 8) {
            done = co_await write(r, versions);
        } else if (kind < 10) {
            done = co_await zero(r);
        } else if (kind < 13) {
            done = co_await channel.discard(r.first * kSector, r.count * kSector);
        } else if (kind < 14) {
            done = co_await channel.flush();
        } else if (kind < 15) {
            const auto status = co_await channel.block_status(r.first * kSector, r.count * kSector);
            if (!status) done = std::unexpected(status.error());
        } else {
            done = co_await read(r);
            if (done) check_common(r);
        }
        if (!done) failure("common ground", done);
    }
};

Task<void> work(std::unique_ptr<Worker> worker, unsigned count) {
    for (unsigned i = 0; i < count && !worker->s.broken(); i++) {
        if (worker->random() % 5 < 3) {
            co_await worker->one_own();
        } else {
            co_await worker->one_common();
        }
        if (i % 8 == 7) co_await yield_turn();
    }
    worker->s.running--;
}

/// Snapshots, compaction and drains while the others work.
Task<void> operate(Stress* s) {
    std::mt19937_64 random(7);
    std::vector<std::string> names;
    while (s->running) {
        block::Node& node = *s->f.q();
        Result<> done;
        const unsigned what = s->shape.snapshots ? random() % 4 : 3;
        if (what == 0 && names.size() < 3) {
            names.push_back("s" + std::to_string(s->whole_operations.load()));
            done = co_await block::create_snapshot(*s->f.graph, node, {.name = names.back()});
            if (!done) names.pop_back();
        } else if (what == 1 && !names.empty()) {
            done = co_await block::delete_snapshot(*s->f.graph, node, "", names.front());
            names.erase(names.begin());
        } else if (what == 2) {
            done = co_await block::compact_image(*s->f.graph, node);
        } else {
            auto guard = co_await s->f.graph->mutex().lock();
            block::Node* nodes[] = {&node};
            co_await s->f.graph->drain(nodes);
            co_await s->f.graph->undrain(nodes);
        }
        if (!done && !s->shape.faults) s->note("an operation on the whole: " + done.error().message());
        s->whole_operations++;
        co_await sleep_for(std::chrono::milliseconds(3));
    }
}

Task<void> run_all(Stress* s, std::vector<Channel*> channels) {
    TaskScope scope;
    s->running = kWorkers;
    for (unsigned i = 0; i < kWorkers; i++) {
        const size_t loop = i % channels.size();
        auto worker = std::make_unique<Worker>(*s, *channels[loop], i, std::mt19937_64(i + 1));
        scope.spawn(run_on(s->f.runtime.io_loop(loop), work(std::move(worker), operations())));
    }
    scope.spawn(operate(s));
    co_await scope.join();
}

/// One operation of sixty fails. A header that could neither be switched nor be put back ends all writing, as it must:
/// that is the business of qcow2_write_failures_test.cc. So of two writes of the header that follow each other, each
/// with the flushes after it, only one may fail; the second one may be what puts it back.
class RandomFaults {
  public:
    explicit RandomFaults(uint64_t header_bytes) : header_bytes_(header_bytes) {}

    /// Called with the lock of the disk held.
    int operator()(Op op, uint64_t offset, uint64_t) {
        const bool header = op == Op::kWrite && offset < header_bytes_;
        if (header) header_writes_++;
        if (random_() % 60) return 0;
        if (header || op == Op::kFlush) {
            if (failed_at_ && *failed_at_ + 1 == header_writes_) return 0;
            failed_at_ = header_writes_;
        }
        // A flush that fails otherwise makes every later one fail, as it must.
        if (op == Op::kFlush) return ECANCELED;
        return random_() % 2 ? EIO : ENOSPC;
    }

  private:
    std::mt19937_64 random_{5};
    const uint64_t header_bytes_;
    uint64_t header_writes_ = 0;
    std::optional<uint64_t> failed_at_;
};

/// Every corruption that a check tells of is a COPIED flag that is missing.
bool only_flags(const std::string& report) {
    std::istringstream lines(report);
    for (std::string line; std::getline(lines, line);) {
        if (line.starts_with("ERROR") && !line.starts_with("ERROR OFLAG_COPIED")) return false;
    }
    return true;
}

Task<Result<Bytes>> read_all(Channel* channel, uint64_t bytes) {
    Bytes data(bytes);
    const iovec iov{data.data(), data.size()};
    CO_CHECK(co_await channel->read(0, IoVec(iov)));
    co_return data;
}

}  // namespace

TEST_CASE("qcow2: writers on every loop share clusters, and nobody's bytes go astray",
          "[qcow2][write][stress][memory][long]") {
    if (MemoryImage::tools_missing()) return;
    const Shape& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
    INFO(shape.create << shape.node << (shape.faults ? " failing" : ""));
    MemoryImage f;
    f.create(shape.create, shape.size);
    Stress s(f, shape);
    s.sectors = shape.size / kSector;
    s.ground = s.sectors / 2 / (Worker::kWidth * kWorkers) * (Worker::kWidth * kWorkers);
    s.stripes.assign(s.ground, {0});
    if (shape.backing) {
        Bytes below(shape.size);
        for (uint64_t i = 0; i < s.sectors; i++) {
            const uint64_t version = i / 50 % 3 ? s.next_version++ : 0;
            fill(below.data() + i * kSector, i, version);
            if (i < s.ground) s.stripes[i] = {version};
        }
        f.put_backing(below);
    }
    REQUIRE(f.open(shape.node, ",'latency-ns':20000") == "");
    s.cluster = f.q()->cluster_size();
    std::vector<Channel*> channels;
    for (size_t i = 0; i < f.runtime.io_loop_count(); i++)
        channels.push_back(f.run(f.root->channel(f.runtime.io_loop(i))));
    if (shape.faults) f.disk->set_fault(RandomFaults(s.cluster));
    f.run(run_all(&s, channels));
    f.disk->set_fault(nullptr);
    REQUIRE(s.fault == "");
    CHECK(s.whole_operations > 0);
    CHECK((s.failed > 0) == shape.faults);

    const auto all = f.runtime.run_on_io(read_all(channels[0], shape.size));
    REQUIRE(all);
    for (uint64_t i = 0; i < s.sectors; i++) {
        const auto version = version_of(all->data() + i * kSector, i);
        INFO("sector " << i);
        REQUIRE(version);
        if (i < s.ground) REQUIRE(std::ranges::find(s.stripes[i], *version) != s.stripes[i].end());
    }
    REQUIRE(f.close() == "");
    const int checked = f.qemu_check();
    INFO(f.report);
    // An operation on the whole that failed half-way may leave leaks, and flags that cost a copy.
    const bool excused = shape.faults && shape.snapshots && (checked == 3 || (checked == 2 && only_flags(f.report)));
    if (!excused) CHECK(checked == 0);
    // What is stored is what was seen.
    REQUIRE(f.open(shape.node) == "");
    const auto again = f.run(node_read(f.q(), 0, shape.size));
    REQUIRE(again);
    CHECK(*again == *all);
}
