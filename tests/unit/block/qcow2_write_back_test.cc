// Metadata: the order in which changes reach the disk, what a failure or a power cut leaves, and where a session ends.

#include <catch2/catch.hpp>

#include <array>
#include <random>
#include <set>

#include <sys/mman.h>

#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/image_loader.h"
#include "block/formats/qcow2/metadata.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"
#include "tests/unit/block/qcow2_alloc_rig.h"

using namespace gantry;
using namespace gantry::block::qcow2;
using Catch::Matchers::Contains;
using gantry::test::AllocRig;
using gantry::test::RecordingFile;
using Kind = RecordingFile::Kind;

namespace {

/// Clusters of 512 bytes: 0 header, 1 refcount table, 2 refcount block, 3 L1 of 32 entries (32 KiB of the disk each).
std::vector<uint8_t> empty_image(uint32_t version = 3, uint64_t autoclear = 0) {
    constexpr uint64_t kCluster = 512;
    std::vector<uint8_t> b(4 * kCluster);
    store_be32(b.data(), kMagic);
    store_be32(b.data() + 4, version);
    store_be32(b.data() + 20, 9);
    store_be64(b.data() + 24, uint64_t{1} << 20);
    store_be32(b.data() + 36, 32);
    store_be64(b.data() + 40, 3 * kCluster);
    store_be64(b.data() + 48, kCluster);
    store_be32(b.data() + 56, 1);
    if (version >= 3) {
        store_be64(b.data() + 88, autoclear);
        store_be32(b.data() + 96, 4);
        store_be32(b.data() + 100, kHeaderBytesKnown);
    }
    store_be64(b.data() + kCluster, 2 * kCluster);
    for (uint64_t i = 0; i < 4; i++) store_be16(b.data() + 2 * kCluster + i * 2, 1);
    return b;
}

/// A flush that fails otherwise breaks the node below for good; one that was given up may be tried again. `yields`:
/// requests of several coroutines mix.
struct TestFile : RecordingFile {
    using RecordingFile::RecordingFile;
    Task<Result<>> do_read(block::Request& rq, uint64_t offset, IoVec iov) override {
        if (yields) co_await yield_turn();
        co_return co_await RecordingFile::do_read(rq, offset, iov);
    }
    Task<Result<>> do_write(block::Request& rq, uint64_t offset, IoVec iov, block::WriteFlags flags) override {
        if (yields) co_await yield_turn();
        co_return co_await RecordingFile::do_write(rq, offset, iov, flags);
    }
    Task<Result<>> do_flush(block::Request&) override {
        if (yields) co_await yield_turn();
        if (fault && fault(Kind::kFlush)) co_return fail(ErrorKind::kCancelled, "injected flush error");
        ops.push_back({Kind::kFlush, 0, {}});
        if (yields) co_await yield_turn();
        co_return Result<>();
    }
    void cut(uint64_t size) {
        bytes.resize(size);
        set_size(size);
    }
    bool yields = false;
};

struct Rig : Metadata::Host {
    static constexpr uint64_t kCluster = 512, kSliceEntries = 64;

    explicit Rig(std::vector<uint8_t> contents = empty_image(), WriteOptions options = {}, uint64_t slots = 64)
        : base(std::move(contents)) {
        block::NodeFlags flags;
        flags.discard = block::DiscardMode::kUnmap;
        node = std::make_shared<TestFile>(base, true, flags);
        file = ImageFile("q", *node);
        auto loaded = rt.run(load_image(*node, "q", ""));
        if (!loaded) throw std::runtime_error(loaded.error().message());
        image = std::move(*loaded);
        image.caches.refcount_bytes = 64 * 1024;
        auto made = L2SliceCache::create(512, slots);
        cache = std::move(*made);
        metadata = std::make_unique<Metadata>(*this, file, image, *cache, options);
        auto ready = rt.run(metadata->load());
        if (!ready) throw std::runtime_error(ready.error().message());
    }

    void retire_places(std::function<void()> fn) override { fn(); }
    Task<Error> corrupt_on_write(std::string message, uint64_t, uint64_t) override {
        corruptions.push_back(message);
        co_return Error(ErrorKind::kCorrupt, message, EIO);
    }
    block::Node* data_file() override { return nullptr; }
    void header_lost(const Error&) override { lost = true; }

    template <class T>
    std::string run(Task<Result<T>> task) {
        auto r = rt.run(std::move(task));
        return r ? std::string() : r.error().message();
    }

    /// What a write of one whole cluster does; 0 in `byte`: a discard.
    Task<Result<>> put(uint64_t guest, uint8_t byte) {
        Metadata& m = *metadata;
        CO_TRY(auto pin, co_await m.pin_slice(guest / kSliceEntries));
        const auto at = static_cast<uint32_t>(guest % kSliceEntries);
        const uint64_t old = pin.word(at) & kOffsetMask;
        uint64_t word = kReadsAsZero;
        if (byte != 0) {
            CO_TRY(const HostRun run, co_await m.allocate(1, 0));
            const std::vector<uint8_t> data(kCluster, byte);
            CO_CHECK(co_await file.write(run.offset, data, "data"));
            word = run.offset | kCopied;
            m.need_barrier();
        }
        pin.store(at, std::array{word});
        m.log().append(std::array{MappingRecord{MappingRecord::Kind::kL2, guest, word, 0}});
        if (old != 0) m.free_later(old, kCluster, FreedBy::kRequest);
        model[guest].push_back(byte);
        co_return Result<>();
    }
    std::string write(uint64_t guest, uint8_t byte) { return run(put(guest, byte)); }
    std::string flush() { return run(metadata->flush()); }

    /// The byte that fills a guest cluster by what the disk says; 0: zeroes; -1: mixed.
    static int guest_byte(const std::vector<uint8_t>& disk, uint64_t guest) {
        const auto at = [&](uint64_t offset) {
            return offset + 8 <= disk.size() ? load_be64(disk.data() + offset) : 0;
        };
        const uint64_t table = at(load_be64(disk.data() + 40) + guest / 64 * 8) & kOffsetMask;
        if (table == 0) return 0;
        const uint64_t word = at(table + guest % 64 * 8);
        const uint64_t host = word & kOffsetMask;
        if (host == 0 || (word & kReadsAsZero)) return 0;
        int byte = -2;
        for (uint64_t i = host; i < host + kCluster; i++) {
            const int b = i < disk.size() ? disk[i] : 0;
            if (byte != -2 && b != byte) return -1;
            byte = b;
        }
        return byte;
    }

    struct Checked {
        uint64_t corruptions = 0, leaks = 0, errors = 0;
    };
    /// By the check of images.
    Checked check(const std::vector<uint8_t>& disk) {
        auto copy = std::make_shared<RecordingFile>(disk);
        auto loaded = rt.run(load_image(*copy, "q", ""));
        REQUIRE(loaded);
        ImageFile copy_file("q", *copy);
        auto result = rt.run(check_metadata(copy_file, *loaded, block::CheckRepair::kNone, {}));
        INFO((result ? "" : result.error().message()));
        REQUIRE(result);
        return {result->corruptions, result->leaks, result->check_errors};
    }

    /// "F" flush, "H" header, "R" refcount table or block, "1" L1, "2" L2 table, "D" anything else; "X" discard.
    std::string trace(size_t from = 0) const {
        std::string out;
        std::set<uint64_t> tables, blocks{1};
        for (const uint64_t block : metadata->refcounts().table()) blocks.insert(block / kCluster);
        for (uint64_t i = 0; i < metadata->l1().size(); i++) tables.insert(l2_table_offset(metadata->l1().get(i)));
        for (size_t i = from; i < node->ops.size(); i++) {
            const auto& op = node->ops[i];
            if (op.kind != Kind::kWrite) {
                out += op.kind == Kind::kFlush ? 'F' : 'X';
                continue;
            }
            const uint64_t c = op.offset / kCluster;
            out += c == 0 ? 'H' : blocks.contains(c) ? 'R' : c == 3 ? '1' : tables.contains(c * kCluster) ? '2' : 'D';
        }
        return out;
    }

    std::vector<uint8_t> base;
    test::TestRuntime rt;
    std::shared_ptr<TestFile> node;
    ImageFile file{"q"};
    Image image;
    std::unique_ptr<L2SliceCache> cache;
    std::unique_ptr<Metadata> metadata;
    std::vector<std::string> corruptions;
    bool lost = false;
    std::map<uint64_t, std::vector<uint8_t>> model;  // guest cluster: every byte it was filled with
};

/// Clusters `first`, `first` + 8, ... : one writer for each cluster, as claims see to it.
Task<void> put_many(Rig* rig, uint64_t first, uint64_t count, unsigned seed, std::vector<std::string>* errors) {
    std::mt19937 random(seed);
    for (uint64_t i = 0; i < count; i++) {
        const uint64_t guest = first + random() % 256 * 8;
        const auto byte = static_cast<uint8_t>(random() % 5 ? 1 + random() % 250 : 0);
        auto r = co_await rig->put(guest, byte);
        if (!r) errors->push_back(r.error().message());
    }
}

Task<void> flush_many(Rig* rig, int count, bool stable, std::vector<std::string>* errors) {
    for (int i = 0; i < count; i++) {
        Result<> r;
        if (stable) {
            r = co_await rig->metadata->flush();
        } else {
            r = co_await rig->metadata->write_back();
        }
        if (!r) errors->push_back(r.error().message());
        for (int turn = 0; turn < 10; turn++) co_await yield_turn();
    }
}

Task<Result<>> put_and_flush_together(Rig* rig, unsigned seed, std::vector<std::string>* errors) {
    TaskScope scope;
    rig->node->yields = true;
    for (uint64_t w = 0; w < 8; w++) scope.spawn(put_many(rig, w, 60, seed * 100 + static_cast<unsigned>(w), errors));
    for (int f = 0; f < 3; f++) scope.spawn(flush_many(rig, 12, f != 2, errors));
    co_await scope.join();
    rig->node->yields = false;
    co_return Result<>();
}

}  // namespace

TEST_CASE("qcow2: counts and data are stable before entries, entries before the flush ends", "[qcow2][write-back]") {
    Rig rig;
    REQUIRE(rig.write(0, 'a') == "");
    REQUIRE(rig.write(1, 'b') == "");
    const size_t from = rig.node->ops.size();
    REQUIRE(rig.flush() == "");
    // New refcount blocks have an order of their own.
    const std::string trace = rig.trace(from);
    REQUIRE(trace.size() > 5);
    CHECK(trace.substr(trace.size() - 5) == "RF21F");
    CHECK(trace.find_first_of("12") == trace.size() - 3);
    CHECK(Rig::guest_byte(rig.node->bytes, 1) == 'b');
    const auto checked = rig.check(rig.node->bytes);
    CHECK(checked.corruptions == 0);

    const size_t again = rig.node->ops.size();
    REQUIRE(rig.flush() == "");
    CHECK(rig.trace(again) == "F");  // nothing to write: the guest's data alone

    // In a place that is counted and stable already: copied bytes ask for a barrier, others do not.
    const size_t third = rig.node->ops.size();
    REQUIRE(rig.write(0, 0) == "");
    REQUIRE(rig.flush() == "");
    CHECK(rig.trace(third) == "2F");
    const size_t fourth = rig.node->ops.size();
    REQUIRE(rig.write(0, 0) == "");
    rig.metadata->need_barrier();
    REQUIRE(rig.flush() == "");
    // The place freed before lost its count in memory then; that is written now.
    CHECK(rig.trace(fourth) == "RF2F");
}

TEST_CASE("qcow2: no entry is written that names what may lie behind the file", "[qcow2][write-back]") {
    Rig rig;
    REQUIRE(rig.write(0, 'a') == "");
    REQUIRE(rig.flush() == "");
    // The reservation is counted and stable; only the file grows.
    const size_t from = rig.node->ops.size();
    const std::vector<uint8_t> data(512, 'c');
    const uint64_t end = rig.node->size();
    auto pin = rig.rt.run(rig.metadata->pin_slice(0));
    REQUIRE(pin);
    REQUIRE(rig.run(rig.file.write(end, data, "data")) == "");
    pin->store(5, std::array{end | kCopied});
    REQUIRE(rig.flush() == "");
    CHECK(rig.trace(from) == "DF2F");
    pin->store(6, std::array{kReadsAsZero});
    REQUIRE(rig.flush() == "");
    CHECK(rig.trace(from) == "DF2F2F");

    // A file that was cut grows anew, also where it was as long before.
    rig.node->cut(end);
    rig.metadata->file_was_cut();
    const size_t again = rig.node->ops.size();
    REQUIRE(rig.run(rig.file.write(end, data, "data")) == "");
    pin->store(7, std::array{end | kCopied});
    REQUIRE(rig.flush() == "");
    CHECK(rig.trace(again) == "DF2F");
}

TEST_CASE("qcow2: adjacent slices are written together", "[qcow2][write-back]") {
    Rig rig;
    for (uint64_t g = 0; g < 2048; g += 64) REQUIRE(rig.write(g, 'x') == "");
    REQUIRE(rig.flush() == "");
    size_t tables = 0, l1 = 0;
    for (const char c : rig.trace()) {
        tables += c == '2';
        l1 += c == '1';
    }
    CHECK(l1 == 1);
    CHECK(tables < 20);  // 32 slices, and some tables were zeroed
    CHECK(rig.check(rig.node->bytes).corruptions == 0);
}

TEST_CASE("qcow2: a freed place is used again only after the loss of its entry is stable", "[qcow2][write-back]") {
    WriteOptions options;
    options.pass_discard_request = GENERATE(false, true);
    Rig rig(empty_image(), options);
    REQUIRE(rig.write(0, 'a') == "");
    REQUIRE(rig.flush() == "");
    const uint64_t host = rig.rt.run(rig.metadata->pin_slice(0))->word(0) & kOffsetMask;
    const uint64_t cluster = host / 512;
    REQUIRE(rig.write(0, 0) == "");
    const auto count = [&] { return rig.rt.run(rig.metadata->refcounts().get(cluster)).value(); };
    CHECK(count() == 1);
    REQUIRE(rig.run(rig.metadata->write_back()) == "");  // not stable yet
    CHECK(count() == 1);
    bool failing = true;
    rig.node->fault = [&](Kind kind) { return failing && kind == Kind::kFlush ? EIO : 0; };
    CHECK(rig.flush() != "");
    CHECK(count() == 1);
    failing = false;
    const size_t from = rig.node->ops.size();
    REQUIRE(rig.flush() == "");
    CHECK(count() == 0);
    const std::string trace = rig.trace(from);
    CHECK(trace == (options.pass_discard_request ? "FX" : "F"));
}

TEST_CASE("qcow2: whatever fails, the next flush makes up for it", "[qcow2][write-back]") {
    // The n-th operation fails, for every n until none does.
    const bool lazily = GENERATE(false, true);
    int survived = 0;
    for (int failing = 0; survived == 0; failing++) {
        CAPTURE(failing);
        REQUIRE(failing < 200);
        WriteOptions options;
        options.lazy_refcounts = lazily;
        Rig rig(empty_image(), options);
        int at = 0;
        bool failed = false;
        rig.node->fault = [&](Kind kind) {
            if (kind == Kind::kRead || at++ != failing) return 0;
            failed = true;
            return kind == Kind::kWrite && failing % 2 ? EPERM : EIO;  // done but reported as failed, or not done
        };
        std::map<uint64_t, uint8_t> now;
        const auto write = [&](uint64_t guest, uint8_t byte) {
            if (rig.write(guest, byte) == "") now[guest] = byte;
        };
        for (uint64_t g = 0; g < 200; g += 40) write(g, 'a');
        (void)rig.flush();
        for (uint64_t g = 0; g < 200; g += 20) write(g, static_cast<uint8_t>('b' + g / 40));
        write(80, 0);
        (void)rig.flush();
        write(120, 0);
        (void)rig.flush();
        if (!failed) survived++;
        rig.node->fault = nullptr;
        REQUIRE(rig.flush() == "");
        for (const auto& [guest, byte] : now) {
            CAPTURE(guest);
            REQUIRE(Rig::guest_byte(rig.node->bytes, guest) == byte);
        }
        REQUIRE(rig.run(rig.metadata->settle()) == "");
        const auto checked = rig.check(rig.node->bytes);
        REQUIRE(checked.corruptions == 0);
        // A place taken by a write that failed is not given back by this test.
        REQUIRE(checked.leaks <= (failed ? 1u : 0u));
        REQUIRE(rig.corruptions.empty());
    }
}

TEST_CASE("qcow2: what changes while it is being written is written again", "[qcow2][write-back]") {
    Rig rig;
    REQUIRE(rig.write(0, 'a') == "");
    REQUIRE(rig.write(1, 'a') == "");
    REQUIRE(rig.write(2, 'b') == "");
    auto pin = rig.rt.run(rig.metadata->pin_slice(0));
    REQUIRE(pin);
    const uint64_t other = pin->word(2);
    bool armed = true;
    rig.node->fault = [&](Kind kind) {
        if (armed && kind == Kind::kWrite) pin->store(1, std::array{other});  // any operation of the write-back
        return 0;
    };
    REQUIRE(rig.flush() == "");
    armed = false;
    pin->release();
    CHECK(rig.cache->dirty_count() == 1);
    CHECK(Rig::guest_byte(rig.node->bytes, 1) == 'a');
    REQUIRE(rig.flush() == "");
    CHECK(Rig::guest_byte(rig.node->bytes, 1) == 'b');
}

TEST_CASE("qcow2: more changed slices than the cache has places", "[qcow2][write-back]") {
    Rig rig(empty_image(), {}, 8);
    REQUIRE(rig.cache->slots() == 8);
    for (uint64_t g = 0; g < 2048; g += 64) REQUIRE(rig.write(g, static_cast<uint8_t>(1 + g / 64)) == "");
    for (uint64_t g = 1; g < 2048; g += 64) REQUIRE(rig.write(g, static_cast<uint8_t>(1 + g / 64)) == "");
    REQUIRE(rig.flush() == "");
    for (uint64_t g = 0; g < 2048; g += 64) {
        REQUIRE(Rig::guest_byte(rig.node->bytes, g) == static_cast<int>(1 + g / 64));
        REQUIRE(Rig::guest_byte(rig.node->bytes, g + 1) == static_cast<int>(1 + g / 64));
    }
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    const auto checked = rig.check(rig.node->bytes);
    CHECK(checked.corruptions == 0);
    CHECK(checked.leaks == 0);
}

TEST_CASE("qcow2: concurrent writers and flushes share the work and lose nothing", "[qcow2][write-back][crash]") {
    const unsigned seed = GENERATE(1u, 2u, 3u);
    CAPTURE(seed);
    Rig rig(empty_image(), {}, seed == 1 ? 64 : 8);
    std::vector<std::string> errors;
    REQUIRE(rig.run(put_and_flush_together(&rig, seed, &errors)) == "");
    CHECK(errors == std::vector<std::string>());
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    for (const auto& [guest, versions] : rig.model) {
        CAPTURE(guest);
        REQUIRE(Rig::guest_byte(rig.node->bytes, guest) == versions.back());
    }
    const auto checked = rig.check(rig.node->bytes);
    CHECK(checked.corruptions == 0);
    CHECK(checked.leaks == 0);

    std::mt19937 random(seed);
    for (size_t cut = 0; cut <= rig.node->ops.size(); cut += 1 + random() % 7) {
        CAPTURE(cut);
        const auto disk = rig.node->after_cut(rig.base, cut, random);
        const auto then = rig.check(disk);
        REQUIRE(then.corruptions == 0);
        REQUIRE(then.errors == 0);
        for (const auto& [guest, versions] : rig.model) {
            CAPTURE(guest);
            const int byte = Rig::guest_byte(disk, guest);
            REQUIRE((byte == 0 || std::ranges::find(versions, byte) != versions.end()));
        }
    }
}

TEST_CASE("qcow2: a shared table is copied before it changes", "[qcow2][write-back]") {
    // Table at cluster 4 with an entry for cluster 5, both counted twice: a snapshot has them, too.
    auto bytes = empty_image();
    bytes.resize(6 * 512);
    store_be64(bytes.data() + 3 * 512, 4 * 512);
    store_be64(bytes.data() + 4 * 512 + 7 * 8, 5 * 512);
    std::fill_n(bytes.begin() + 5 * 512, 512, uint8_t{'s'});
    store_be16(bytes.data() + 1024 + 4 * 2, 2);
    store_be16(bytes.data() + 1024 + 5 * 2, 2);
    Rig rig(bytes);
    const auto before = rig.cache->ticket(0);
    REQUIRE(rig.write(3, 'n') == "");
    const uint64_t word = rig.metadata->l1().get(0);
    CHECK((word & kCopied) != 0);
    CHECK(l2_table_offset(word) != 4 * 512);
    const auto count = [&](uint64_t c) { return rig.rt.run(rig.metadata->refcounts().get(c)).value(); };
    CHECK(count(4) == 2);
    CHECK(load_be64(rig.node->bytes.data() + 3 * 512) == 4 * 512);
    REQUIRE(rig.flush() == "");
    CHECK(count(4) == 1);
    CHECK(count(5) == 2);
    CHECK(load_be64(rig.node->bytes.data() + 3 * 512) == word);
    CHECK(Rig::guest_byte(rig.node->bytes, 7) == 's');
    CHECK(Rig::guest_byte(rig.node->bytes, 3) == 'n');
    CHECK(load_be64(rig.node->bytes.data() + 4 * 512 + 3 * 8) == 0);  // the snapshot's table is as it was
    CHECK_FALSE(rig.cache->insert(0, rig.node->bytes.data() + 4 * 512, before));
}

TEST_CASE("qcow2: tables that cannot be right are not written to", "[qcow2][write-back][malformed]") {
    auto bytes = empty_image();
    bytes.resize(6 * 512);
    const uint64_t table =
        GENERATE(uint64_t{1024}, uint64_t{1536}, uint64_t{512}, uint64_t{2048 + 512 * 1000}, uint64_t{2048 + 8 * 64});
    CAPTURE(table);
    store_be64(bytes.data() + 3 * 512, table | kCopied);
    if (table == 2048 + 8 * 64) store_be64(bytes.data() + 3 * 512 + 8, table | kCopied);  // the same one twice
    Rig rig(bytes);
    CHECK_THAT(rig.write(3, 'n'), Contains("Preventing invalid write on metadata"));
    CHECK(rig.corruptions.size() == 1);
    REQUIRE(rig.flush() == "");
    CHECK(std::equal(rig.node->bytes.begin() + 512, rig.node->bytes.begin() + 6 * 512, bytes.begin() + 512));
}

TEST_CASE("qcow2: an image whose counts deny its metadata is not written over", "[qcow2][write-back][malformed]") {
    auto bytes = empty_image();
    bytes.resize(16 * 512, 0);
    store_be64(bytes.data() + 3 * 512, 5 * 512 | kCopied);  // the table at cluster 5 has count 0
    Rig rig(bytes);
    std::string error;
    for (uint64_t g = 64; g < 1024 && error.empty(); g += 64) error = rig.write(g, 'n');
    CHECK(error != "");
    CHECK(rig.corruptions.size() == 1);
    CHECK(std::equal(bytes.begin() + 5 * 512, bytes.begin() + 6 * 512, rig.node->bytes.begin() + 5 * 512));
}

TEST_CASE("qcow2: a session marks the header before anything else and leaves an exact image", "[qcow2][session]") {
    const uint32_t version = GENERATE(2u, 3u);
    Rig rig(empty_image(version, (1u << 7) | (version == 3 ? kAutoclearSession : 0)));
    REQUIRE(rig.write(0, 'a') == "");
    REQUIRE(rig.metadata->in_session());
    CHECK(rig.trace().starts_with("HF"));
    CHECK(rig.image.header.autoclear_features == 0);
    auto during = rig.rt.run(load_image(*rig.node, "q", ""));
    REQUIRE(during);
    REQUIRE(during->extensions.session);
    CHECK(during->extensions.session->flags == kSessionOpen);
    CHECK(during->extensions.session->session != 0);
    CHECK(during->header.autoclear_features == 0);
    REQUIRE(rig.flush() == "");
    CHECK(rig.check(rig.node->bytes).leaks != 0);  // the reservation

    REQUIRE(rig.run(rig.metadata->settle()) == "");
    CHECK_FALSE(rig.metadata->in_session());
    const auto checked = rig.check(rig.node->bytes);
    CHECK(checked.corruptions == 0);
    CHECK(checked.leaks == 0);
    auto after = rig.rt.run(load_image(*rig.node, "q", ""));
    REQUIRE(after);
    CHECK((!after->extensions.session || after->extensions.session->flags == 0));

    // Writing goes on in a session of its own.
    const uint64_t first = during->extensions.session->session;
    REQUIRE(rig.write(1, 'b') == "");
    CHECK(rig.image.extensions.session->session != first);
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    CHECK(Rig::guest_byte(rig.node->bytes, 1) == 'b');
    CHECK(rig.check(rig.node->bytes).leaks == 0);
}

TEST_CASE("qcow2: lazy refcounts wait for the end of the session, behind the dirty bit", "[qcow2][session]") {
    WriteOptions options;
    options.lazy_refcounts = true;
    Rig rig(empty_image(), options);
    for (uint64_t g = 0; g < 300; g += 10) REQUIRE(rig.write(g, 'a') == "");
    REQUIRE(rig.flush() == "");
    CHECK(rig.trace().starts_with("HF"));
    // Not one of the counts on disk has changed.
    CHECK(std::equal(rig.base.begin() + 512, rig.base.begin() + 1536, rig.node->bytes.begin() + 512));
    CHECK((load_be64(rig.node->bytes.data() + 72) & kIncompatDirty) != 0);
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    CHECK(load_be64(rig.node->bytes.data() + 72) == 0);
    const auto checked = rig.check(rig.node->bytes);
    CHECK(checked.corruptions == 0);
    CHECK(checked.leaks == 0);
}

TEST_CASE("qcow2: the log holds what the file does not have yet", "[qcow2][log]") {
    Rig rig;
    MappingLog& log = rig.metadata->log();
    REQUIRE(log.attach(UniqueFd(memfd_create("log", MFD_CLOEXEC))));
    REQUIRE(rig.write(0, 'a') == "");
    CHECK(log.session() == rig.image.extensions.session->session);
    CHECK((rig.image.header.autoclear_features & kAutoclearSession) != 0);
    auto records = log.records();
    REQUIRE(records.size() == 2);
    CHECK(records[0].kind == MappingRecord::Kind::kL1);
    CHECK(records[0].word == rig.metadata->l1().get(0));
    CHECK(records[1].index == 0);
    rig.node->fault = [](Kind kind) { return kind == Kind::kWrite ? EIO : 0; };
    CHECK(rig.run(rig.metadata->write_back()) != "");
    CHECK(log.records() == records);
    rig.node->fault = nullptr;
    REQUIRE(rig.run(rig.metadata->write_back()) == "");
    CHECK(log.records().empty());
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    CHECK((load_be64(rig.node->bytes.data() + 88) & kAutoclearSession) == 0);
}

TEST_CASE("qcow2: the mapping is read again where the header says", "[qcow2][write-back]") {
    Rig rig;
    REQUIRE(rig.write(0, 'a') == "");
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    const uint64_t table = l2_table_offset(rig.metadata->l1().get(0));
    CHECK(rig.metadata->overlap().hits(table, 1));
    // Behind its back: no table any more.
    std::vector<uint8_t> none(8);
    REQUIRE(rig.run(rig.file.write(3 * 512, none, "L1 table")) == "");
    REQUIRE(rig.run(rig.metadata->reload_mapping()) == "");
    CHECK(rig.metadata->l1().get(0) == 0);
    CHECK_FALSE(rig.metadata->overlap().hits(table, 1));
    CHECK_FALSE(rig.cache->find(0));
    CHECK(rig.metadata->overlap().hits(3 * 512, 1));
}

TEST_CASE("qcow2: a power cut at any moment leaves counts that suffice and data of old or new",
          "[qcow2][write-back][crash]") {
    const unsigned seed = GENERATE(1u, 2u, 3u, 4u);
    CAPTURE(seed);
    std::mt19937 random(seed);
    WriteOptions options;
    options.pass_discard_request = seed % 2;
    Rig rig(empty_image(), options, seed % 3 ? 64 : 8);
    struct Stable {
        size_t ops;
        std::map<uint64_t, size_t> versions;  // how many of the model's were written when the flush began
    };
    std::vector<Stable> flushes;
    for (int step = 0; step < 160; step++) {
        const uint64_t guest = random() % 4 ? random() % 64 : random() % 2048;
        if (random() % 8 == 0) {
            std::map<uint64_t, size_t> versions;
            for (const auto& [g, v] : rig.model) versions[g] = v.size();
            REQUIRE(rig.flush() == "");
            flushes.push_back({rig.node->ops.size(), std::move(versions)});
        } else if (random() % 16 == 0) {
            REQUIRE(rig.run(rig.metadata->write_back()) == "");
        } else {
            REQUIRE(rig.write(guest, random() % 5 ? static_cast<uint8_t>(1 + random() % 250) : 0) == "");
        }
    }
    REQUIRE(rig.run(rig.metadata->settle()) == "");
    const size_t total = rig.node->ops.size();
    for (size_t cut = 0; cut <= total; cut += 1 + random() % 3) {
        CAPTURE(cut);
        const auto disk = rig.node->after_cut(rig.base, cut, random);
        const auto checked = rig.check(disk);
        REQUIRE(checked.corruptions == 0);
        REQUIRE(checked.errors == 0);
        const Stable* last = nullptr;
        for (const Stable& s : flushes) {
            if (s.ops <= cut) last = &s;
        }
        for (const auto& [guest, versions] : rig.model) {
            CAPTURE(guest);
            const int byte = Rig::guest_byte(disk, guest);
            size_t from = 0;
            if (last) {
                const auto found = last->versions.find(guest);
                if (found != last->versions.end()) from = found->second;
            }
            // One of what was written since the last flush, or what that flush made stable.
            bool known = from == 0 ? byte == 0 : byte == versions[from - 1];
            for (size_t v = from; v < versions.size(); v++) known = known || byte == versions[v];
            REQUIRE(known);
        }
    }
}
