// Random requests against plain arrays. GANTRY_TEST_MODEL_OPS sets how many.

#include <catch2/catch.hpp>

#include <unistd.h>

#include "tests/support/model_run.h"
#include "tests/support/node_io.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;

namespace {

constexpr uint64_t kSize = (3 << 20) + 1234 * 512;
constexpr uint64_t kMaxSize = 6 << 20;

std::string memory(std::string_view name, std::string_view disk, std::string_view more = "") {
    return fmt::format("{{'driver':'memory','node-name':'{}','disk':'{}','discard':'unmap'{}}}", name, disk, more);
}

/// Fresh disks "model" and "base" of this test.
struct Disks {
    static std::shared_ptr<MemoryDisk> fresh(std::string_view name) {
        MemoryDisk::forget(name);
        return MemoryDisk::named(name);
    }
    std::shared_ptr<MemoryDisk> image = fresh("model");
    std::shared_ptr<MemoryDisk> base = fresh("base");
};

struct BlocksCase {
    const char* name;
    uint64_t key;
    uint64_t backing;  // bytes; 0: none
    const char* options;
};

std::vector<std::string> blocks_definitions(const BlocksCase& c, std::string_view disk = "model",
                                            std::string_view more = "") {
    return {memory("f", disk, fmt::format(",'growable':true{}", more)),
            fmt::format("{{'driver':'blocks','node-name':'n','file':'f','discard':'unmap'{}{}}}",
                        c.backing ? ",'backing':{'driver':'memory','disk':'base','read-only':true}" : "", c.options)};
}

/// What an empty image over the backing disk reads as.
Bytes blocks_contents(const BlocksCase& c, Disks& disks, uint64_t size) {
    Bytes contents(size);
    if (!c.backing) return contents;
    const Bytes old = pattern(c.backing, 17);
    disks.base->write(0, old.data(), old.size());
    std::copy_n(old.begin(), std::min<size_t>(old.size(), contents.size()), contents.begin());
    return contents;
}

const std::vector<BlocksCase> kBlocksCases = {
    {"plain", 0, 0, ""},
    {"short backing", 0, kSize / 2 + 777, ""},
    {"long backing and transform", 0x1234567, kSize + 300'000, ""},
    {"write-through, forgetful", 0, kSize / 3, ",'write-through':true,'forget':true"},
    {"forgetful with transform", 99, 0, ",'forget':true"},
};

}  // namespace

TEST_CASE("model: memory nodes of all alignments, alone and under raw", "[block][model][memory][long]") {
    const std::string limits = GENERATE(as<std::string>(), "", ",'request-alignment':512,'memory-alignment':512",
                                        ",'request-alignment':4096,'max-transfer':65536,'zeroes-alignment':8192",
                                        ",'no-inline':true,'no-zeroes':true,'discard-alignment':4096,'fua':true");
    const bool raw = GENERATE(false, true);
    CAPTURE(limits, raw);
    Disks disks;
    disks.image->resize(kSize);
    ModelRun m;
    const std::string name = raw ? "f" : "n";
    std::vector<std::string> definitions = {memory(name, "model", limits + ",'detect-zeroes':'unmap'")};
    if (raw) definitions.push_back("{'driver':'raw','node-name':'n','file':'f','discard':'unmap'}");
    m.open(definitions, Bytes(kSize));
    m.run_concurrent(model_operations(4), 8, 1);
    CHECK(m.drains > 0);
    m.verify();
    m.run_sequential(model_operations(1), 2, kMaxSize);
    m.verify();
}

TEST_CASE("model: null nodes read zeroes whatever is written", "[block][model][memory][long]") {
    ModelRun m;
    m.forgets = true;
    m.open({fmt::format("{{'driver':'{}','node-name':'n','size':{},'read-zeroes':true}}",
                        GENERATE("null-co", "null-aio"), kSize)},
           Bytes(kSize));
    m.run_concurrent(model_operations(3), 8, 3);
    m.verify();
}

TEST_CASE("model: a block-mapped format", "[block][model][memory][long]") {
    const BlocksCase c = GENERATE(from_range(kBlocksCases));
    CAPTURE(c.name);
    Disks disks;
    BlockFormat::create(*disks.image, kSize, kMaxSize, c.key);
    ModelRun m;
    m.can_compress = true;
    m.open(blocks_definitions(c), blocks_contents(c, disks, kSize));
    m.run_concurrent(model_operations(5), 8, 5);
    m.verify();
    auto& image = dynamic_cast<BlockFormat&>(m.node("n"));
    REQUIRE(m.run(image.share_all()).has_value());
    m.run_concurrent(model_operations(3), 16, 6);
    m.run_sequential(model_operations(2), 7, kMaxSize);
    m.verify();
    // What is on disk after closing is the same.
    const Bytes model = m.model;
    m.close();
    CHECK(m.remove("f") == "");
    CHECK(BlockFormat::check(*disks.image) == "");
    m.open(blocks_definitions(c), model);
    m.verify();
}

TEST_CASE("model: requests that really overlap in time", "[block][model][memory][long]") {
    const BlocksCase c = GENERATE(from_range(kBlocksCases));
    CAPTURE(c.name);
    Disks disks;
    BlockFormat::create(*disks.image, kSize, kMaxSize, c.key);
    ModelRun m;
    m.can_compress = true;
    m.open(blocks_definitions(c, "model", ",'latency-ns':20000"), blocks_contents(c, disks, kSize));
    m.run_concurrent(model_operations(2), 64, 8);
    m.verify();
    CHECK(BlockFormat::check(*disks.image) == "");
}

TEST_CASE("model: read-modify-writes that really overlap in time", "[block][model][memory][long]") {
    Disks disks;
    disks.image->resize(kSize);
    ModelRun m;
    m.open({memory("n", "model", ",'request-alignment':4096,'memory-alignment':512,'latency-ns':20000")}, Bytes(kSize));
    m.run_concurrent(model_operations(2), 512, 11);
    m.verify();
}

TEST_CASE("model: a failing medium never damages what was acknowledged", "[block][model][errors][memory][long]") {
    const unsigned subject = GENERATE(range(0u, 7u));
    CAPTURE(subject);
    Disks disks;
    ModelRun m;
    m.faulty = true;
    if (subject < kBlocksCases.size()) {
        const BlocksCase& c = kBlocksCases[subject];
        BlockFormat::create(*disks.image, kSize, kMaxSize, c.key);
        m.can_compress = true;
        m.open(blocks_definitions(c), blocks_contents(c, disks, kSize));
    } else {
        disks.image->resize(kSize);
        m.open({memory("n", "model", subject == 5 ? "" : ",'request-alignment':4096")}, Bytes(kSize));
    }
    auto random = std::make_shared<std::atomic<uint64_t>>(subject);
    disks.image->set_fault([random](MemoryDisk::Op op, uint64_t, uint64_t) {
        if (op == MemoryDisk::Op::kFlush) return 0;
        const uint64_t x = random->fetch_add(0x9e3779b97f4a7c15) * 0xbf58476d1ce4e5b9;
        return (x >> 32) % 64 == 0 ? (x >> 20) % 2 ? EIO : ENOSPC : 0;
    });
    m.run_concurrent(model_operations(2), 8, 9);
    m.run_sequential(model_operations(1), 10);
    CHECK(m.failed > 0);
    disks.image->set_fault(nullptr);
    m.verify();
    if (subject >= kBlocksCases.size()) return;
    // What could not be written back meanwhile is written now.
    const Bytes model = m.model;
    REQUIRE(m.run(node_flush(&m.node("n"))).has_value());
    m.close();
    CHECK(m.remove("f") == "");
    CHECK(BlockFormat::check(*disks.image) == "");
    m.faulty = false;
    m.open(blocks_definitions(kBlocksCases[subject]), model);
    m.verify();
}

namespace {

/// Remembers what a disk with a volatile cache is sure to hold: its contents when the last flush began.
struct VolatileCache {
    explicit VolatileCache(std::shared_ptr<MemoryDisk> d) : disk(std::move(d)) {
        save();
        disk->set_fault([this](MemoryDisk::Op op, uint64_t, uint64_t) {
            if (op == MemoryDisk::Op::kFlush) save();
            return 0;
        });
    }
    ~VolatileCache() { disk->set_fault(nullptr); }
    void save() {
        stable.resize(disk->size());
        const ssize_t n = ::pread(disk->fd(), stable.data(), stable.size(), 0);
        if (n != static_cast<ssize_t>(stable.size())) throw std::runtime_error("reading a test disk");
    }
    /// Each sector as it is, or, with `loss` percent, as it was.
    Bytes after_power_cut(unsigned loss, std::mt19937_64& random) const {
        Bytes image = disk->bytes(0, disk->size());
        Bytes old = stable;
        old.resize(image.size());
        for (size_t at = 0; loss && at < image.size(); at += 512) {
            const size_t length = std::min<size_t>(512, image.size() - at);
            if (random() % 100 < loss) std::memcpy(image.data() + at, old.data() + at, length);
        }
        return image;
    }
    std::shared_ptr<MemoryDisk> disk;
    Bytes stable;
};

/// Bytes that differ although they were flushed and not written since.
uint64_t lost_bytes(const Bytes& got, const ModelRun& m) {
    uint64_t lost = 0;
    for (uint64_t at = 0; at < got.size(); at += 4096) {
        const uint64_t end = std::min<uint64_t>(at + 4096, got.size());
        if (std::memcmp(got.data() + at, m.model.data() + at, end - at) == 0) continue;
        for (uint64_t b = at; b < end; b++) lost += !m.touched[b] && got[b] != m.model[b];
    }
    return lost;
}

}  // namespace

TEST_CASE("model: after a crash or a power cut everything flushed is there", "[block][model][crash][memory][long]") {
    const BlocksCase c = GENERATE(from_range(kBlocksCases));
    CAPTURE(c.name);
    Disks disks;
    BlockFormat::create(*disks.image, kSize, kMaxSize, c.key);
    VolatileCache cache(disks.image);
    ModelRun m;
    m.can_compress = true;
    m.open(blocks_definitions(c), blocks_contents(c, disks, kSize));
    m.touched.assign(kSize, 0);
    std::mt19937_64 random(4711);
    for (unsigned i = 0; i < 12; i++) {
        m.run_sequential(10 + random() % 40 + model_operations(1) / 100, 100 + i);
        // 0: the process is killed, and what it wrote stays.
        for (const unsigned loss : {0u, 10u, 50u, 100u}) {
            CAPTURE(i, loss);
            auto copy = Disks::fresh("crash");
            const Bytes bytes = cache.after_power_cut(loss, random);
            copy->write(0, bytes.data(), bytes.size());
            CHECK(BlockFormat::check(*copy) == "");
            ModelRun after;
            after.open(blocks_definitions(c, "crash"), m.model);
            const auto got = after.run(node_read(&after.node("n"), 0, kSize));
            REQUIRE(got.has_value());
            CHECK(lost_bytes(*got, m) == 0);
        }
    }
}
