// Operations on images: what they need of the graph, and the commit of an image into its backing file.

#include "block/image_control.h"

#include <catch2/catch.hpp>
#include <fstream>

#include "block/formats/qcow2/be.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/node_io.h"
#include "tests/unit/block/qcow2_ops_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::CheckRepair;

namespace {

/// A filter with operations that say what the graph was like when they ran.
class Operated final : public block::Filter, public block::ImageOperations {
  public:
    explicit Operated(const block::OpenContext& context, const block::Node& file)
        : Filter("operated", context.node_name(), context.flags()) {
        set_size(file.size());
    }
    void children_changed() override { set_size(below().size()); }
    Task<void> quiesce() override {
        quiet = true;
        co_return;
    }
    void unquiesce() override { quiet = false; }
    block::ImageOperations* image_operations() override { return this; }
    Task<Result<block::ImageCheck>> check(CheckRepair repair, block::Progress) override {
        seen.push_back(quiet ? "check drained" : "check in use");
        if (repair == CheckRepair::kAll) co_return fail(ErrorKind::kIo, "broken medium");
        block::ImageCheck result;
        result.leaks = 7;
        co_return result;
    }
    Task<Result<>> resize(uint64_t new_size, block::Preallocation, bool allow_shrink, block::Progress) override {
        seen.push_back(quiet ? "resize drained" : "resize in use");
        if (new_size < size() && !allow_shrink) co_return fail(ErrorKind::kInvalid, "shrinking");
        CO_CHECK(co_await below().do_resize(new_size));
        set_size(new_size);
        co_return Result<>();
    }

    bool quiet = false;
    std::vector<std::string> seen;
};

Task<Result<std::shared_ptr<block::Node>>> open_operated(block::OpenContext& context) {
    CO_TRY(block::Node * file, co_await context.open_child("file", block::ChildRole::kFiltered));
    co_return std::shared_ptr<block::Node>(std::make_shared<Operated>(context, *file));
}
constexpr block::Driver kOperatedDriver{.name = "operated", .open = open_operated};

struct Fixture : GraphFixture {
    Fixture() : GraphFixture(nullptr, {kOperatedDriver}) {
        REQUIRE(add("{'driver': 'operated', 'node-name': 'o', 'file': {'driver': 'memory', 'size': 65536}}").empty());
        REQUIRE(add("{'driver': 'raw', 'node-name': 'r', 'file': {'driver': 'memory', 'size': 65536}}").empty());
    }
    Operated& operated() { return dynamic_cast<Operated&>(node("o")); }
};

}  // namespace

TEST_CASE("image control: operations run drained and hand on what they say", "[block][image-control]") {
    Fixture f;
    auto checked = f.run(block::check_image(*f.graph, f.node("o"), CheckRepair::kNone));
    REQUIRE(checked);
    CHECK(checked->leaks == 7);
    auto failed = f.run(block::check_image(*f.graph, f.node("o"), CheckRepair::kAll));
    REQUIRE_FALSE(failed);
    CHECK(failed.error().message() == "broken medium");
    CHECK(f.operated().seen == std::vector<std::string>{"check drained", "check drained"});
    CHECK_FALSE(f.operated().quiet);
    CHECK(f.graph->mutex().try_lock());
}

TEST_CASE("image control: a format without operations says so", "[block][image-control]") {
    Fixture f;
    CHECK(Fixture::text_of(f.run(block::check_image(*f.graph, f.node("r"), CheckRepair::kNone))) ==
          "Block format 'raw' used by node 'r' does not support checks");
    CHECK(Fixture::text_of(f.run(block::create_snapshot(*f.graph, f.node("r"), {.name = "s"}))) ==
          "Block format 'raw' used by node 'r' does not support internal snapshots");
    CHECK(Fixture::text_of(f.run(block::compact_image(*f.graph, f.node("r")))) ==
          "Block format 'raw' used by node 'r' does not support being compacted");
    CHECK(Fixture::text_of(f.run(block::commit_image(*f.graph, f.node("r"), false))) ==
          "Image of node 'r' does not have a backing file");
}

TEST_CASE("image control: a resize takes the permission and tells the users", "[block][image-control]") {
    Fixture f;
    uint64_t told = 0;
    block::RootOptions options = Fixture::reader();
    options.perms.share = block::Perm::kAll;
    options.on_resize = [&told](uint64_t size) { told = size; };
    auto root = f.attach("o", std::move(options));
    CHECK(f.run(block::resize_image(*f.graph, f.node("o"), 131072, block::Preallocation::kOff, false)));
    CHECK(told == 131072);
    CHECK(f.node("o").size() == 131072);
    CHECK(f.operated().seen == std::vector<std::string>{"resize drained"});
    CHECK_FALSE(f.run(block::resize_image(*f.graph, f.node("o"), 512, block::Preallocation::kOff, false)));
    CHECK(f.run(block::resize_image(*f.graph, f.node("o"), 512, block::Preallocation::kOff, true)));
    CHECK(told == 512);
    f.detach(std::move(root));

    auto fixed = f.attach("o", Fixture::reader("a client with a disk of one size"));
    auto refused = f.run(block::resize_image(*f.graph, f.node("o"), 4096, block::Preallocation::kOff, false));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind() == ErrorKind::kPermission);
    CHECK(f.node("o").size() == 512);
    f.detach(std::move(fixed));

    CHECK(f.run(block::resize_image(*f.graph, f.node("r"), 131072, block::Preallocation::kOff, false)));
    CHECK(f.node("r").size() == 131072);
    CHECK_FALSE(f.run(block::resize_image(*f.graph, f.node("r"), 512, block::Preallocation::kOff, false)));
    CHECK_FALSE(f.run(block::resize_image(*f.graph, f.node("r"), 262144, block::Preallocation::kFull, false)));
}

TEST_CASE("image control: numbers of a check in the words of QMP", "[block][image-control]") {
    block::ImageCheck check;
    check.corruptions = 2;
    check.leaks_fixed = 3;
    check.total_clusters = 16;
    check.fragmented_clusters = 0;
    CHECK(
        json::serialize(block::to_json(check, "disk", "qcow2")) ==
        R"({"filename":"disk","format":"qcow2","check-errors":0,"corruptions":2,"leaks-fixed":3,"total-clusters":16})");
}

TEST_CASE("image control: an image in use is checked and repaired", "[qcow2][image-control][interop]") {
    OpsFixture f;
    if (f.tools_missing()) return;
    f.create("cluster_size=4k", 4 << 20);
    REQUIRE(f.open().empty());
    f.write(0, 300000, 1);
    f.write(1 << 20, 5000, 2);
    f.snapshot("one");
    f.write(4096, 70000, 3);
    auto checked = f.rt.run(block::check_image(*f.graph, *f.node, CheckRepair::kNone));
    REQUIRE(checked);
    INFO((checked->findings.empty() ? std::string() : checked->findings.front()));
    CHECK(checked->corruptions == 0);
    CHECK(checked->leaks == 0);
    CHECK(checked->check_errors == 0);
    CHECK(checked->allocated_clusters.value_or(0) == 74 + 2);
    f.write(2 << 20, 100000, 4);
    f.verify_file();

    SECTION("leaks and missing flags") {
        f.close();
        std::fstream file(f.path, std::ios::in | std::ios::out | std::ios::binary);
        const auto word_at = [&file](uint64_t at) {
            std::array<uint8_t, 8> raw{};
            file.seekg(static_cast<std::streamoff>(at));
            file.read(reinterpret_cast<char*>(raw.data()), 8);
            return block::qcow2::load_be64(raw.data());
        };
        const uint64_t block = word_at(word_at(48));
        file.seekp(static_cast<std::streamoff>(block + 2 * 600));
        const char two[2] = {0, 2};
        file.write(two, 2);
        file.close();
        REQUIRE(f.open().empty());
        auto found = f.rt.run(block::check_image(*f.graph, *f.node, CheckRepair::kNone));
        REQUIRE(found);
        CHECK(found->leaks == 1);
        auto fixed = f.rt.run(block::check_image(*f.graph, *f.node, CheckRepair::kAll));
        REQUIRE(fixed);
        CHECK(fixed->leaks == 0);
        CHECK(fixed->leaks_fixed == 1);
        f.write(3 << 20, 100000, 5);
        f.write(0, 5000, 6);
        f.verify_file();
    }
}

TEST_CASE("image control: a read-only image is checked, not repaired", "[qcow2][image-control]") {
    OpsFixture f;
    if (f.tools_missing()) return;
    f.create("", 1 << 20);
    json::object options{{"driver", "qcow2"},
                         {"node-name", "ro"},
                         {"read-only", true},
                         {"file", json::object{{"driver", "file"}, {"filename", f.path}}}};
    auto added = f.rt.run(f.graph->add(std::move(options)));
    REQUIRE(added);
    CHECK(f.rt.run(block::check_image(*f.graph, **added, CheckRepair::kNone)));
    auto refused = f.rt.run(block::check_image(*f.graph, **added, CheckRepair::kAll));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind() == ErrorKind::kReadOnly);
    REQUIRE(f.rt.run(f.graph->remove("ro")));
}

TEST_CASE("image control: a commit moves everything into the backing file", "[qcow2][image-control][commit][interop]") {
    OpsFixture f;
    if (f.tools_missing()) return;
    const std::string format = GENERATE(as<std::string>(), "raw", "qcow2");
    const bool shorter = GENERATE(false, true);
    INFO(format << (shorter ? ", shorter" : ""));
    const std::string base = f.dir.file("base." + format);
    const uint64_t size = 4 << 20, base_size = shorter ? 1 << 20 : size;
    f.sh("qemu-img create -q -f " + format + " " + base + " " + std::to_string(base_size));
    f.sh("qemu-io -f " + format + " -c 'write -P 9 0 512k' " + base);
    f.sh("qemu-img create -q -f qcow2 -b " + base + " -F " + format + " " + f.path + " " + std::to_string(size));
    f.disk.assign(size, 0);
    std::fill_n(f.disk.begin(), 512 << 10, uint8_t{9});
    REQUIRE(f.open().empty());
    f.write(100000, 300000, 1);
    f.write((3 << 20) + 17, 5000, 2);
    f.zero(0, 65536, false);
    f.rt.run(f.graph->detach(std::move(f.root)));

    block::Node* backing = f.node->child("backing")->node.get();
    CHECK(backing->read_only());
    uint64_t last = 0;
    const Result<> done = f.rt.run(block::commit_image(*f.graph, *f.node, true, [&last](uint64_t now, uint64_t) {
        last = now;
        return true;
    }));
    INFO((done ? std::string() : done.error().message()));
    REQUIRE(done);
    CHECK(last == size);
    CHECK(backing->read_only());
    CHECK(backing->size() == size);
    f.verify();
    auto checked = f.rt.run(block::check_image(*f.graph, *f.node, CheckRepair::kNone));
    REQUIRE(checked);
    CHECK(checked->allocated_clusters.value_or(9) == 0);
    f.close();
    f.sh("qemu-img check -f qcow2 " + f.path);
    const std::string raw = f.dir.file("base.raw.out");
    f.sh("qemu-img convert -f " + format + " -O raw " + base + " " + raw);
    std::ifstream in(raw, std::ios::binary);
    const std::vector<uint8_t> bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    CHECK((bytes == f.disk));
}

TEST_CASE("image control: a commit into an image of a chain", "[qcow2][image-control][commit][interop]") {
    OpsFixture f;
    if (f.tools_missing()) return;
    const uint64_t size = 2 << 20;
    std::string below;
    for (int i = 0; i < 4; i++) {
        const std::string name = i == 3 ? f.path : f.dir.file("l" + std::to_string(i) + ".qcow2");
        f.sh("qemu-img create -q -f qcow2 " + (below.empty() ? "" : "-b " + below + " -F qcow2 ") + name + " " +
             std::to_string(size));
        f.sh("qemu-io -f qcow2 -c 'write -P " + std::to_string(i + 1) + " " + std::to_string(i * 256) + "k 256k' " +
             name);
        below = name;
    }
    f.disk.assign(size, 0);
    for (size_t i = 0; i < 4; i++)
        std::fill_n(f.disk.begin() + static_cast<ptrdiff_t>(i << 18), 1 << 18, uint8_t(i + 1));
    REQUIRE(f.open().empty());
    f.rt.run(f.graph->detach(std::move(f.root)));
    const Result<> stopped =
        f.rt.run(block::commit_image(*f.graph, *f.node, true, [](uint64_t, uint64_t) { return false; }));
    REQUIRE_FALSE(stopped);
    CHECK(stopped.error().kind() == ErrorKind::kCancelled);
    CHECK(f.node->child("backing")->node->read_only());
    f.verify();
    const Result<> done = f.rt.run(block::commit_image(*f.graph, *f.node, true));
    INFO((done ? std::string() : done.error().message()));
    REQUIRE(done);
    f.verify();
    f.close();
    for (int i = 0; i < 3; i++) f.sh("qemu-img check -f qcow2 " + f.dir.file("l" + std::to_string(i) + ".qcow2"));
    f.sh("qemu-img check -f qcow2 " + f.path);
}
