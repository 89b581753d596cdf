// Random calls against a plain array. GANTRY_TEST_MODEL_OPS sets how many.

#include <catch2/catch.hpp>

#include <fmt/format.h>

#include <random>

#include "runtime/task_scope.h"
#include "tests/support/fuse_service.h"
#include "tests/support/model_run.h"
#include "tests/support/node_io.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"

using namespace gantry;
using namespace gantry::fuse;
using namespace gantry::test;

namespace {

constexpr uint64_t kSize = (1 << 20) + 12345;
constexpr uint64_t kMaxSize = 3 << 20;

struct Model {
    FuseServiceFixture& f;
    Bytes bytes;
    uint64_t unit = 1;  // of the node's size
    bool growable = true;

    uint64_t round(uint64_t size) const { return (size + unit - 1) / unit * unit; }
    /// Whether a change of [offset, offset + length) may go on; the file is long enough for it then.
    bool grow(uint64_t end) {
        if (end > bytes.size() && !growable) return false;
        if (end > bytes.size()) bytes.resize(round(end));
        return true;
    }
};

/// Calls inside [begin, end) through one loop. `resizes`: it is alone and may change the length.
struct Worker {
    Model& model;
    size_t loop;
    std::mt19937_64 random;
    uint64_t begin, end;
    bool resizes;
    std::string failure;

    uint64_t pick(uint64_t n) { return n ? random() % n : 0; }
    uint64_t offset() {
        const uint64_t limit = resizes ? model.bytes.size() + (pick(4) ? 0 : 100'000) : end;
        uint64_t at = begin + pick(limit - begin + 1);
        if (pick(3) == 0) at = std::max(begin, at & ~uint64_t{4095});
        return std::min(at, limit);
    }
    uint64_t length(uint64_t offset) {
        uint64_t n = 1 + pick(pick(10) < 7 ? 5000 : 200'000);
        if (pick(3) == 0) n = (n + 4095) & ~uint64_t{4095};
        return resizes ? n : std::min(n, end - offset);
    }
    Task<void> ask(FuseRequest* request) {
        return FuseRequest::answer(request, model.f.service.get(), model.f.channels[loop]);
    }
    void expect(bool good, std::string_view what, uint64_t offset, uint64_t length, const FuseRequest& r) {
        if (!good && failure.empty())
            failure = fmt::format("{} of {} bytes at {} of {}: error {}", what, length, offset, model.bytes.size(),
                                  r.error());
    }

    Task<void> read(uint64_t at, uint64_t n) {
        FuseRequest r(Opcode::kRead, ReadIn{.offset = at, .size = static_cast<uint32_t>(n)}, {}, 1 << 20);
        co_await ask(&r);
        const Bytes& m = model.bytes;
        const uint64_t first = std::min<uint64_t>(at, m.size()), last = std::min<uint64_t>(at + n, m.size());
        const bool same = r.error() == 0 && r.call.in_room && r.call.reply_size == last - first &&
                          std::memcmp(r.call.room, m.data() + first, last - first) == 0;
        expect(same, "read", at, n, r);
    }
    Task<void> write(uint64_t at, uint64_t n) {
        const Bytes data = pattern(n, static_cast<uint8_t>(random()));
        FuseRequest r(Opcode::kWrite, WriteIn{.offset = at, .size = static_cast<uint32_t>(n)}, data);
        co_await ask(&r);
        uint64_t stored = n;
        if (!model.grow(at + n)) stored = at >= model.bytes.size() ? 0 : model.bytes.size() - at;
        if (stored == 0) {
            expect(r.error() == ENOSPC, "write", at, n, r);
        } else {
            expect(r.error() == 0 && r.out<WriteOut>().size == stored, "write", at, n, r);
            std::copy_n(data.begin(), stored, model.bytes.begin() + static_cast<ptrdiff_t>(at));
        }
    }
    Task<void> fallocate(uint64_t at, uint64_t n) {
        const uint32_t modes[] = {0, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE,
                                  FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE};
        const uint32_t mode = modes[pick(4)];
        FuseRequest r(Opcode::kFallocate, FallocateIn{.offset = at, .length = n, .mode = mode});
        co_await ask(&r);
        if (mode == 0 && at < model.bytes.size()) {
            expect(r.error() == EOPNOTSUPP, "preallocation", at, n, r);
            co_return;
        }
        if (!(mode & FALLOC_FL_KEEP_SIZE) && !model.grow(at + n)) {
            expect(r.error() == ENOSPC, "fallocate", at, n, r);
            co_return;
        }
        expect(r.error() == 0, "fallocate", at, n, r);
        const uint64_t last = std::min<uint64_t>(at + n, model.bytes.size());
        if (at < last) std::fill_n(model.bytes.begin() + static_cast<ptrdiff_t>(at), last - at, 0);
    }
    Task<void> truncate() {
        const uint64_t size = model.round(pick(3) ? pick(kMaxSize) : pick(model.bytes.size() + 1));
        FuseRequest r(Opcode::kSetattr, SetattrIn{.valid = kSetSize, .size = size});
        co_await ask(&r);
        expect(r.error() == 0 && r.out<AttrOut>().attr.size == size, "truncation", size, 0, r);
        model.bytes.resize(size);
    }
    Task<void> seek(uint64_t at) {
        const bool data = pick(2);
        FuseRequest r(Opcode::kLseek,
                      LseekIn{.offset = at, .whence = static_cast<uint32_t>(data ? SEEK_DATA : SEEK_HOLE)});
        co_await ask(&r);
        const uint64_t size = model.bytes.size();
        if (r.error()) {
            // No data from here on: then it reads as zeroes.
            bool good = r.error() == ENXIO && (data || at >= size);
            for (uint64_t i = at; good && i < std::min(size, resizes ? size : end); ++i) good = model.bytes[i] == 0;
            expect(good, "seek", at, data, r);
            co_return;
        }
        const uint64_t place = r.out<LseekOut>().offset;
        bool good = place >= at && place <= size && at < size && (!data || place < size);
        // What was jumped over on the way to data is a hole.
        for (uint64_t i = at; data && good && i < std::min(place, resizes ? size : end); ++i)
            good = model.bytes[i] == 0;
        expect(good, "seek", at, data, r);
    }
    Task<void> sync() {
        FuseRequest r = pick(2) ? FuseRequest(Opcode::kFsync, FsyncIn{}) : FuseRequest(Opcode::kFlush, FlushIn{});
        co_await ask(&r);
        expect(r.error() == 0, "flush", 0, 0, r);
        FuseRequest a(Opcode::kGetattr, GetattrIn{});
        co_await ask(&a);
        expect(a.error() == 0 && a.out<AttrOut>().attr.size == model.bytes.size(), "getattr", 0, 0, a);
    }

    Task<void> one() {
        const uint64_t kind = pick(100);
        const uint64_t at = offset();
        const uint64_t n = length(at);
        if (kind < 38) return read(at, n);
        if (kind >= 90 && kind < 95) return seek(at);
        if (kind >= 95 && kind < 98) return sync();
        if (kind >= 98) return resizes ? truncate() : sync();
        if (n == 0) return read(at, n);
        if (kind < 75) return write(at, n);
        return fallocate(at, n);
    }
};

/// On the worker's loop.
Task<void> work(Worker* worker, uint64_t operations) {
    for (uint64_t i = 0; i < operations && worker->failure.empty(); ++i) {
        co_await worker->one();
        if (i % 16 == 15) co_await yield_turn();
    }
}

Task<void> drain_while(FuseServiceFixture* f, const std::atomic<unsigned>* running) {
    while (*running) {
        {
            auto guard = co_await f->graph->mutex().lock();
            block::Node* nodes[] = {&f->node("n")};
            co_await f->graph->drain(nodes);
            co_await f->graph->undrain(nodes);
        }
        co_await sleep_for(std::chrono::milliseconds(2));
    }
}

Task<void> counted(Task<void> task, std::atomic<unsigned>* running) {
    co_await std::move(task);
    running->fetch_sub(1);
}

Task<void> together(FuseServiceFixture* f, std::vector<std::unique_ptr<Worker>>* workers, uint64_t operations) {
    TaskScope scope;
    std::atomic<unsigned> running{static_cast<unsigned>(workers->size())};
    for (const auto& worker : *workers) {
        scope.spawn(counted(run_on(f->runtime.io_loop(worker->loop), work(worker.get(), operations)), &running));
    }
    scope.spawn(drain_while(f, &running));
    co_await scope.join();
}

/// One after the other over the whole file with changes of its length, then all loops on parts of their own.
void run_model(Model& model, uint64_t operations, uint64_t seed) {
    FuseServiceFixture& f = model.f;
    std::vector<std::unique_ptr<Worker>> workers;
    for (unsigned round = 0; round < 4; ++round) {
        const size_t loop = round % f.channels.size();
        workers.clear();
        workers.push_back(std::make_unique<Worker>(model, loop, std::mt19937_64(seed + round), 0, 0, true, ""));
        f.run(together(&f, &workers, operations / 8));
        REQUIRE(workers[0]->failure == "");
    }
    if (model.bytes.size() < 500'000) {
        REQUIRE(f.truncate(model.round(500'001)).error() == 0);
        model.bytes.resize(model.round(500'001));
    }
    workers.clear();
    constexpr unsigned kWorkers = 8;
    uint64_t begin = 0;
    for (unsigned i = 0; i < kWorkers; ++i) {
        const uint64_t end = i + 1 == kWorkers ? model.bytes.size() : model.bytes.size() / kWorkers * (i + 1) - i * 77;
        workers.push_back(std::make_unique<Worker>(model, i % f.channels.size(), std::mt19937_64(seed * 1000 + i),
                                                   begin, end, false, ""));
        begin = end;
    }
    f.run(together(&f, &workers, operations / 2 / kWorkers));
    for (const auto& worker : workers) REQUIRE(worker->failure == "");
    for (uint64_t at = 0; at < model.bytes.size(); at += 1 << 20) {
        const uint64_t last = std::min<uint64_t>(at + (1 << 20), model.bytes.size());
        REQUIRE(f.read(at, 1 << 20).data() == Bytes(model.bytes.begin() + static_cast<ptrdiff_t>(at),
                                                    model.bytes.begin() + static_cast<ptrdiff_t>(last)));
    }
}

}  // namespace

TEST_CASE("fuse model: disks in memory of all alignments", "[fuse][model]") {
    const auto [limits, growable] = GENERATE(table<std::string, bool>({
        {"", true},
        {"", false},
        {",'request-alignment':512,'memory-alignment':512", true},
        {",'request-alignment':4096,'memory-alignment':512,'zeroes-alignment':8192,'max-transfer':65536", true},
        {",'no-inline':true,'latency-ns':1000", true},
    }));
    CAPTURE(limits, growable);
    MemoryDisk::forget("fuse");
    FuseServiceFixture f;
    f.open({fmt::format("{{'driver':'memory','node-name':'n','disk':'fuse','size':{}{}}}", kSize, limits)},
           {.writable = true, .growable = growable});
    Model model{.f = f, .bytes = Bytes(kSize), .growable = growable};
    run_model(model, model_operations(4), 11);
}

TEST_CASE("fuse model: raw files and qcow2 images", "[fuse][model]") {
    const bool qcow2 = GENERATE(false, true);
    const std::string cache = GENERATE(as<std::string>(), "", ",'cache':{'direct':true}");
    const bool growable = GENERATE(true, false);
    CAPTURE(qcow2, cache, growable);
    const TempDir dir;
    const std::string path = dir.file("image");
    const uint64_t unit = qcow2 ? 512 : 1;
    const uint64_t size = (kSize + unit - 1) / unit * unit;
    REQUIRE(shell(fmt::format("qemu-img create -q -f {} {} {}", qcow2 ? "qcow2" : "raw", path, size)).status == 0);
    // qemu-img counts in sectors, files need not.
    if (!qcow2) REQUIRE(::truncate(path.c_str(), static_cast<off_t>(size)) == 0);
    const std::string file = fmt::format("'driver':'file','filename':'{}','discard':'unmap'{}", path, cache);
    FuseServiceFixture f;
    f.open({qcow2 ? fmt::format("{{'driver':'qcow2','node-name':'n','discard':'unmap','file':{{{}}}}}", file)
                  : fmt::format("{{'driver':'raw','node-name':'n','discard':'unmap','file':{{{}}}}}", file)},
           {.writable = true, .growable = growable});
    Model model{.f = f, .bytes = Bytes(f.node("n").size()), .unit = unit, .growable = growable};
    run_model(model, model_operations(2), 12);
    f.close();
    REQUIRE(f.remove("n") == "");
    if (qcow2) CHECK(shell("qemu-img check -q -f qcow2 " + path).status == 0);
}
