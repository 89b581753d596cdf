#include <catch2/catch.hpp>

#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using Catch::Matchers::StartsWith;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;

TEST_CASE("graph: a node is added, found and removed by name", "[block][graph]") {
    GraphFixture f;
    CHECK(f.add("{'driver':'null-co','node-name':'n','size':4096}") == "");
    REQUIRE(f.graph->find("n") != nullptr);
    CHECK(f.node("n").size() == 4096);
    CHECK(f.node("n").monitor_owned());
    CHECK(f.add("{'driver':'raw','node-name':'r','file':'n'}") == "");
    CHECK(f.names() == "r n");
    CHECK_THAT(f.remove("n"), StartsWith("Block device n is in use"));
    CHECK(f.remove("x") == "Failed to find node with node-name='x'");
    CHECK(f.remove("r") == "");
    CHECK(f.remove("n") == "");
    CHECK(f.names() == "");
}

TEST_CASE("graph: wrong definitions are refused with the reference's words and change nothing", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    const std::string long_name(32, 'a');
    auto [definition, text] = GENERATE_COPY(table<std::string, std::string>({
        {"{'driver':'null-co'}", "'node-name' must be specified for the root node"},
        {"{'driver':'null-co','node-name':'1x'}", "Invalid node-name: '1x'"},
        {"{'driver':'null-co','node-name':''}", "Invalid node-name: ''"},
        {"{'driver':'null-co','node-name':'#block1'}", "Invalid node-name: '#block1'"},
        {"{'driver':'null-co','node-name':'" + long_name + "'}", "Node name too long"},
        {"{'driver':'null-co','node-name':'n'}", "Duplicate nodes with node-name='n'"},
        {"{'driver':'raw','node-name':'r','file':{'driver':'null-co','node-name':'r'}}",
         "Duplicate nodes with node-name='r'"},
        {"{'driver':'raw','node-name':'r','file':{'driver':'null-co','node-name':'n'}}",
         "Duplicate nodes with node-name='n'"},
        {"{'driver':'raw','node-name':'r','file':'absent'}", "Cannot find device='absent' nor node-name='absent'"},
        {"{'driver':'raw','node-name':'r','file':'r'}", "Cannot find device='r' nor node-name='r'"},
        {"{'driver':'null-co','node-name':'z','detect-zeroes':'unmap'}",
         "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"},
        {"{'driver':'null-co','node-name':'z','force-share':true}",
         "force-share=on can only be used with read-only images"},
        {"{'driver':'raw','node-name':'r','offset':8192,'file':{'driver':'null-co','node-name':'i','size':4096}}",
         "Offset (8192) cannot be greater than size of the containing file (4096)"},
    }));
    CAPTURE(definition);
    CHECK(f.add(definition) == text);
    CHECK(f.names() == "n");
}

TEST_CASE("graph: an inline child is owned by its parent and vanishes with it", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':{'driver':'null-co','node-name':'i'}}") == "");
    CHECK_FALSE(f.node("i").monitor_owned());
    CHECK_THAT(f.remove("i"), StartsWith("Node i is not owned by the monitor"));
    CHECK(f.remove("r") == "");
    CHECK(f.names() == "");
}

TEST_CASE("graph: unnamed inline children get names that users cannot type", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':{'driver':'null-co'}}") == "");
    CHECK_THAT(f.names(), Catch::Matchers::Matches("r #block[0-9]+"));
}

TEST_CASE("graph: an inline child inherits what its definition leaves open", "[block][graph]") {
    GraphFixture f;
    SECTION("everything") {
        REQUIRE(f.add("{'driver':'raw','node-name':'r','read-only':true,'force-share':true,'discard':'unmap','detect-"
                      "zeroes':'on',"
                      "'cache':{'direct':true,'no-flush':true},'file':{'driver':'null-co','node-name':'i'}}") == "");
        const NodeFlags& flags = f.node("i").flags();
        CHECK(flags.read_only);
        CHECK(flags.force_share);
        CHECK(flags.cache_direct);
        CHECK(flags.cache_no_flush);
        CHECK(flags.discard == DiscardMode::kUnmap);
        CHECK(flags.detect_zeroes == DetectZeroes::kOff);
    }
    SECTION("not what it says itself") {
        REQUIRE(f.add("{'driver':'raw','node-name':'r','auto-read-only':true,'cache':{'direct':true,'no-flush':true},"
                      "'file':{'driver':'null-co','node-name':'i','read-only':true,'cache':{'direct':false}}}") == "");
        const NodeFlags& flags = f.node("i").flags();
        CHECK(flags.read_only);
        CHECK(flags.auto_read_only);
        CHECK_FALSE(flags.cache_direct);
        CHECK(flags.cache_no_flush);
    }
    SECTION("a reference inherits nothing") {
        REQUIRE(f.add("{'driver':'null-co','node-name':'i'}") == "");
        REQUIRE(f.add("{'driver':'raw','node-name':'r','read-only':true,'file':'i'}") == "");
        CHECK_FALSE(f.node("i").read_only());
    }
}

TEST_CASE("graph: what a failed add opened is closed again", "[block][graph]") {
    GraphFixture f;
    auto disk = MemoryDisk::named("failed-add");
    disk->resize(4096);
    CHECK_THAT(
        f.add("{'driver':'raw','node-name':'r','offset':1000000,'file':{'driver':'memory','disk':'failed-add'}}"),
        StartsWith("Offset (1000000)"));
    CHECK(f.names() == "");
    REQUIRE_FALSE(disk->events.empty());
    CHECK(disk->events.back() == "close");
    MemoryDisk::forget("failed-add");
}

TEST_CASE("graph: a driver that is not there is refused by name", "[block][graph]") {
    GraphFixture f;
    CHECK_THAT(f.add("{'driver':'vmdk','node-name':'v','file':'x'}"), Catch::Matchers::Contains("'vmdk'"));
}

TEST_CASE("graph: removal is refused while somebody uses the node", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    RootOptions options = GraphFixture::reader("NBD export 'e'");
    SECTION("an export") {
        auto root = f.attach("n", options);
        CHECK(f.remove("n") == "Node n is in use; NBD export 'e' uses it");
        f.detach(std::move(root));
    }
    SECTION("a job") {
        options.busy_text = "block device is in use by block job: backup";
        auto root = f.attach("n", options);
        CHECK(f.remove("n") == "Node 'n' is busy: block device is in use by block job: backup");
        f.detach(std::move(root));
    }
    CHECK(f.remove("n") == "");
}

TEST_CASE("graph: a removed node lives on while an inner edge holds it no longer than that", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'raw','node-name':'top','file':{'driver':'raw','node-name':'mid','file':{'driver':'null-"
                  "co','node-name':'low'}}}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'other','file':'mid'}") == "");
    CHECK(f.remove("top") == "");
    CHECK(f.names() == "other mid low");
    CHECK(f.remove("other") == "");
    CHECK(f.names() == "");
}

TEST_CASE("graph: replace moves every parent and tells the roots", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'a','size':4096}") == "");
    REQUIRE(f.add("{'driver':'null-co','node-name':'b','size':8192}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'a'}") == "");
    uint64_t told_size = 0;
    std::string told_node;
    RootOptions options = GraphFixture::reader();
    options.on_resize = [&](uint64_t size) { told_size = size; };
    options.on_node_changed = [&](Node& node) { told_node = node.name(); };
    auto direct = f.attach("a", options);
    auto above = f.attach("r", GraphFixture::reader());
    REQUIRE(f.run(f.graph->replace(f.node("a"), f.node("b"))));
    CHECK(told_size == 8192);
    CHECK(told_node == "b");
    CHECK(f.node("r").size() == 8192);
    CHECK(f.node("a").parents().empty());
    CHECK(f.remove("a") == "");
    f.detach(std::move(direct));
    f.detach(std::move(above));
}

TEST_CASE("graph: a filter is put in between, under every user but itself", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    auto root = f.attach("m", GraphFixture::writer());
    REQUIRE(f.add("{'driver':'raw','node-name':'f','file':'m'}") == "");
    REQUIRE(f.run(f.graph->insert_above(f.node("m"), f.node("f"))));
    CHECK(&root->node() == &f.node("f"));
    REQUIRE(f.node("m").parents().size() == 1);
    CHECK(f.node("m").parents()[0]->parent == &f.node("f"));
    CHECK(f.node("m").cumulative_perms().need == (Perm::kConsistentRead | Perm::kWrite));
    f.detach(std::move(root));
}

TEST_CASE("graph: a change that would close a circle is refused and undone", "[block][graph]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'a','file':'n'}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'b','file':'a'}") == "");
    Result<> done = f.run(f.graph->replace(f.node("n"), f.node("b")));
    CHECK(GraphFixture::text_of(done) == "Making 'b' a file child of 'a' would create a cycle");
    CHECK(f.node("a").child("file")->node.get() == &f.node("n"));
}

TEST_CASE("graph: resize changes the node, what stands on it, and tells the roots", "[block][graph][resize]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'m'}") == "");
    uint64_t told = 0;
    RootOptions options = GraphFixture::reader("NBD export 'e'");
    options.perms.share = Perm::kAll;
    options.on_resize = [&](uint64_t size) { told = size; };
    SECTION("through the node above") {
        auto root = f.attach("r", options);
        REQUIRE(f.run(f.graph->resize(f.node("r"), 131072)));
        CHECK(f.node("m").size() == 131072);
        CHECK(f.node("r").size() == 131072);
        CHECK(told == 131072);
        f.detach(std::move(root));
    }
    SECTION("below") {
        auto root = f.attach("r", options);
        REQUIRE(f.run(f.graph->resize(f.node("m"), 4096)));
        CHECK(f.node("r").size() == 4096);
        CHECK(told == 4096);
        f.detach(std::move(root));
    }
    SECTION("size 0 is legal") {
        REQUIRE(f.run(f.graph->resize(f.node("m"), 0)));
        CHECK(f.node("r").size() == 0);
    }
    SECTION("a negative size is not") {
        CHECK(GraphFixture::text_of(f.run(f.graph->resize(f.node("m"), -1))) == "Parameter 'size' expects a >0 size");
    }
    SECTION("nor under an export that does not share it") {
        options.perms.share = ~Perm::kResize;
        auto root = f.attach("r", options);
        CHECK_THAT(GraphFixture::text_of(f.run(f.graph->resize(f.node("m"), 4096))),
                   StartsWith("Permission conflict on node 'm': permissions 'resize' are both required by an unnamed "
                              "block device (uses node "
                              "'m' as 'root' child) and unshared by node 'r' (uses node 'm' as 'file' child)."));
        CHECK(f.node("m").size() == 65536);
        CHECK(f.node("m").cumulative_perms().need == Perm::kConsistentRead);
        f.detach(std::move(root));
    }
    SECTION("nor of a driver that cannot") {
        REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
        CHECK_THAT(GraphFixture::text_of(f.run(f.graph->resize(f.node("n"), 4096))),
                   StartsWith("Image format driver does not support resize"));
    }
    SECTION("nor of a read-only node") {
        REQUIRE(f.add("{'driver':'memory','node-name':'ro','size':512,'read-only':true}") == "");
        CHECK_THAT(GraphFixture::text_of(f.run(f.graph->resize(f.node("ro"), 4096))), StartsWith("Image is read-only"));
    }
}

namespace {

int probe_magic(const uint8_t* head, size_t size, std::string_view) {
    return size >= 4 && std::string_view(reinterpret_cast<const char*>(head), 4) == "MAGI" ? 100 : 0;
}

}  // namespace

TEST_CASE("graph: probing reads the head and takes the surest driver, raw when none is sure", "[block][graph]") {
    GraphFixture f;
    f.drivers.push_back({.name = "magic", .open = nullptr, .probe = probe_magic});
    Graph graph(*f.runtime.runtime, f.drivers, nullptr);
    auto disk = MemoryDisk::named("probe");
    disk->resize(2048);
    Result<Node*> node = f.run(graph.add(test::options_of("{'driver':'memory','node-name':'m','disk':'probe'}")));
    REQUIRE(node);
    CHECK(*f.run(graph.probe(**node)) == "raw");
    disk->write(0, "MAGI", 4);
    CHECK(*f.run(graph.probe(**node)) == "magic");
    f.run(graph.close_all());
    MemoryDisk::forget("probe");
}
