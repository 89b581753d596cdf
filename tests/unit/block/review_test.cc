// Corners of the engine that lose data or memory when they are wrong: what happens between two steps.

#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "block/bitmap.h"
#include "block/protocols/file.h"
#include "runtime/task_scope.h"
#include "tests/support/block_format.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/node_io.h"
#include "tests/support/temp_dir.h"
#include "tests/unit/block/file_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;

namespace {

constexpr uint64_t kKiB = 1024;

struct Files : GraphFixture {
    Files() : GraphFixture(nullptr, {kFileDriver}) { write_file(path, std::string(4096, 'a')); }
    std::string read(std::string_view name, uint64_t offset, size_t length) {
        auto text = run(read_text(&node(name), offset, length));
        return text ? *text : text.error().message();
    }
    /// As another program would.
    void append(const std::string& bytes) { std::ofstream(path, std::ios::binary | std::ios::app) << bytes; }
    uint64_t length() const { return std::filesystem::file_size(path); }

    TempDir dir;
    const std::string path = dir.file("img");
};

/// Whose holes are finer than its request alignment.
struct FineHoles : Node {
    FineHoles() : Node("fine", "fine", {}) {
        set_size(65536);
        limits_.request_alignment = 4096;
    }
    Task<Result<>> do_read(Request&, uint64_t, IoVec) override { co_return Result<>(); }
    Task<Result<BlockStatus>> do_block_status(Request&, uint64_t offset, uint64_t length) override {
        BlockStatus status;
        status.length = std::min<uint64_t>(length, 1024);
        status.data = offset / 1024 % 2 != 0;
        status.zero = !status.data;
        status.allocated = true;
        co_return status;
    }
};

}  // namespace

TEST_CASE("request layer: what changes inside an alignment unit is told as data", "[block][status]") {
    TestRuntime rt;
    FineHoles node;
    auto first = rt.run(node_status(&node, 8192, 512));
    REQUIRE(first);
    CHECK((first->zero && first->length == 512));
    auto second = rt.run(node_status(&node, 8192 + 1536, 16384));
    REQUIRE(second);
    CHECK((second->data && !second->zero && second->length == 4096 - 1536));
}

TEST_CASE("root: statistics are answered although the root goes meanwhile", "[block][root]") {
    RuntimeOptions runtime = runtime_options_from_env();
    runtime.io_loops = 4;
    TestRuntime rt(runtime);
    const std::vector<Driver> drivers{kNullCoDriver};
    Graph graph(*rt.runtime, drivers, nullptr);
    constexpr auto sum = [](Root* root, uint64_t* operations) -> Task<void> {
        ChannelStats stats = co_await root->stats();
        *operations = stats.ops[static_cast<size_t>(OpKind::kFlush)].operations;
    };
    constexpr auto leave = [](Graph* g, std::unique_ptr<Root> root) -> Task<void> {
        co_await g->detach(std::move(root));
    };
    constexpr auto flush_once = [](Channel* channel) -> Task<Result<>> { co_return co_await channel->flush(); };
    constexpr auto body = [](TestRuntime* r, Graph* g, decltype(sum) ask, decltype(leave) go,
                             decltype(flush_once) use) -> Task<uint64_t> {
        auto root = co_await g->attach(*g->find("n"), GraphFixture::reader());
        if (!root) co_return 0;
        for (size_t i = 0; i < r->io_loop_count(); ++i) {
            Channel* channel = co_await (*root)->channel(r->io_loop(i));
            (void)co_await run_on(r->io_loop(i), use(channel));
        }
        uint64_t operations = 0;
        TaskScope scope;
        scope.spawn(ask(root->get(), &operations));
        scope.spawn(go(g, std::move(*root)));
        co_await scope.join();
        co_return operations;
    };
    REQUIRE(rt.run(graph.add(options_of("{'driver':'null-co','node-name':'n'}"))));
    CHECK(rt.run(body(&rt, &graph, sum, leave, flush_once)) == 4);
    rt.run(graph.close_all());
}

TEST_CASE("format node: zero edges of a used place are stable before the mapping names it", "[block][format][crash]") {
    GraphFixture f(nullptr, {kBlockFormatDriver});
    MemoryDisk::forget("img");
    const auto disk = MemoryDisk::named("img");
    BlockFormat::create(*disk, 1 << 20, 8 << 20);
    REQUIRE(f.add("{'driver':'blocks','node-name':'img','discard':'unmap','write-through':true,"
                  "'file':{'driver':'memory','disk':'img','growable':true}}") == "");
    Node& img = f.node("img");
    REQUIRE(f.run(node_write(&img, 0, Bytes(BlockFormat::kBlock, 0xff))));
    REQUIRE(f.run(node_discard(&img, 0, BlockFormat::kBlock)));
    REQUIRE(f.run(node_flush(&img)));
    REQUIRE(dynamic_cast<BlockFormat&>(img).free_blocks() == 1);

    std::atomic<bool> unstable{false};
    std::atomic<int> violations{0}, pages{0};
    disk->set_fault([&](MemoryDisk::Op op, uint64_t offset, uint64_t) {
        if (op == MemoryDisk::Op::kFlush) unstable = false;
        if (op != MemoryDisk::Op::kWrite && op != MemoryDisk::Op::kZeroes) return 0;
        if (offset >= BlockFormat::Header{1 << 20, 128, 0}.data_offset()) {
            unstable = true;
        } else {
            pages++;
            if (unstable) violations++;
        }
        return 0;
    });
    REQUIRE(f.run(node_write(&img, 300 * kKiB + 10, Bytes(10, 0x11))));
    disk->set_fault(nullptr);
    CHECK(pages > 0);
    CHECK(violations == 0);
}

TEST_CASE("file: its size is taken again when it gets a user after a time without", "[file][perms]") {
    Files f;
    REQUIRE(f.add("{'driver':'file','node-name':'f','filename':'" + f.path + "'}") == "");
    const bool through_raw = GENERATE(false, true);
    if (through_raw) REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'f'}") == "");
    const char* top = through_raw ? "r" : "f";
    f.append(std::string(4096, 'b'));

    auto root = f.attach(top, f.writer());
    CHECK(f.node("f").size() == 8192);
    CHECK(f.node(top).size() == 8192);
    CHECK(f.read(top, 4090, 12) == "aaaaaabbbbbb");
    // Now it is in use: what others do is noticed when somebody says so.
    f.append(std::string(4096, 'c'));
    auto second = f.attach(top, f.reader());
    CHECK(f.node(top).size() == 8192);
    f.detach(std::move(second));
    f.detach(std::move(root));
}

TEST_CASE("file: the padding of an O_DIRECT write goes with the writer, what others add stays", "[file][perms]") {
    Files f;
    write_file(f.path, std::string(1000, 'a'));
    if (UniqueFd(::open(f.path.c_str(), O_RDONLY | O_DIRECT | O_CLOEXEC)).get() < 0) {
        WARN("skipped: no O_DIRECT in " << f.dir.path());
        return;
    }
    REQUIRE(f.add("{'driver':'file','node-name':'f','auto-read-only':true,'cache':{'direct':true},'filename':'" +
                  f.path + "'}") == "");
    auto root = f.attach("f", f.writer());
    REQUIRE(f.run(write_text(&f.node("f"), 995, "tail!")));
    REQUIRE(f.length() > 1000);
    const bool grown = GENERATE(false, true);
    if (grown) REQUIRE(::truncate(f.path.c_str(), 1 << 20) == 0);
    f.detach(std::move(root));
    CHECK(f.length() == (grown ? 1 << 20 : 1000));
    auto reader = f.attach("f", f.reader());
    CHECK(f.read("f", 990, 10) == "aaaaatail!");
    f.detach(std::move(reader));
    REQUIRE(f.remove("f") == "");
    CHECK(f.length() == (grown ? 1 << 20 : 1000));
}

TEST_CASE("bitmap: a node that grew by a write has its growth dirty after the next change", "[block][bitmap]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536,'growable':true}") == "");
    Node& node = f.node("m");
    auto bitmap = DirtyBitmap::create("b", node.size(), 4096);
    REQUIRE(bitmap);
    node.add_bitmap(*bitmap);
    REQUIRE(f.run(node_write(&node, 131072, Bytes(4096, 1))));
    REQUIRE(node.size() == 135168);
    REQUIRE(f.reopen({"{'driver':'memory','node-name':'m','size':65536,'growable':true}"}) == "");
    CHECK((*bitmap)->size() == 135168);
    CHECK((*bitmap)->is_dirty(131072));
    CHECK_FALSE((*bitmap)->is_dirty(0));
    node.remove_bitmap(**bitmap);
}
