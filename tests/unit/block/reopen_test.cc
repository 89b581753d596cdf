#include <catch2/catch.hpp>

#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using Catch::Matchers::StartsWith;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;

namespace {

/// Stands on a file, with an optional backing node, like an image format.
class Overlay final : public Filter {
  public:
    Overlay(const OpenContext& context, const Node& file) : Filter("overlay", context.node_name(), context.flags()) {
        set_size(file.size());
    }
    Task<Result<ImageInfo>> image_info() override {
        ImageInfo info;
        info.virtual_size = size();
        info.backing_filename = schema::Options(options()).str("recorded");
        co_return info;
    }
};

Task<Result<std::shared_ptr<Node>>> open_overlay(OpenContext& context) {
    CO_TRY(Node * file, co_await context.open_child("file", ChildRole::kFile));
    if (context.child_given("backing")) CO_CHECK(co_await context.open_child("backing", ChildRole::kBacking));
    co_return std::make_shared<Overlay>(context, *file);
}

struct Fixture : GraphFixture {
    Fixture() {
        drivers.push_back({.name = "overlay", .open = open_overlay});
        graph = std::make_unique<Graph>(*runtime.runtime, drivers, nullptr);
        disk->resize(65536);
    }
    ~Fixture() { MemoryDisk::forget("reopen"); }
    std::shared_ptr<MemoryDisk> disk = MemoryDisk::named("reopen");
};

}  // namespace

TEST_CASE("reopen: the refusals of the reference", "[block][reopen]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','disk':'reopen','size':65536}") == "");
    REQUIRE(f.add("{'driver':'overlay','node-name':'o','file':'m'}") == "");
    REQUIRE(f.add("{'driver':'overlay','node-name':'named','recorded':'base.raw','file':{'driver':'null-co'},'backing':"
                  "null}") == "");
    auto [options, text] = GENERATE(table<std::string, std::string>({
        {"{'driver':'memory'}", "node-name not specified"},
        {"{'driver':'memory','node-name':'x'}", "Failed to find node with node-name='x'"},
        {"{'driver':'null-co','node-name':'m'}", "Cannot change the option 'driver'"},
        {"{'driver':'memory','node-name':'m','disk':'other','size':65536}", "Cannot change the option 'disk'"},
        {"{'driver':'memory','node-name':'m','size':65536}", "Cannot change the option 'disk'"},
        {"{'driver':'overlay','node-name':'o','file':'absent'}", "Cannot find device='' nor node-name='absent'"},
        {"{'driver':'overlay','node-name':'o','file':'m','backing':'o'}",
         "Making 'o' a backing child of 'o' would create a cycle"},
        {"{'driver':'overlay','node-name':'o','file':null}", "Cannot change the option 'file'"},
        {"{'driver':'overlay','node-name':'named','recorded':'base.raw','file':{'driver':'null-co'}}",
         "backing is missing for 'named'"},
        {"{'driver':'overlay','node-name':'o','file':'m','detect-zeroes':'unmap'}",
         "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"},
    }));
    CAPTURE(options);
    const std::string before = f.names();
    CHECK(f.reopen({options}) == text);
    CHECK(f.names() == before);
    CHECK(f.node("o").children().size() == 1);
}

TEST_CASE("reopen: options not given return to their defaults", "[block][reopen]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','disk':'reopen','latency-ns':1000,'read-only':true,'discard':'"
                  "unmap','detect-zeroes':'on',"
                  "'cache':{'direct':true}}") == "");
    CHECK(f.reopen({"{'driver':'memory','node-name':'m','disk':'reopen'}"}) == "");
    CHECK(f.node("m").flags() == NodeFlags());
    CHECK_FALSE(f.node("m").read_only());
    CHECK_FALSE(f.node("m").options().contains("latency-ns"));
    CHECK(std::ranges::find(f.disk->events, "commit_reopen") != f.disk->events.end());
}

TEST_CASE("reopen: several nodes change together or not at all", "[block][reopen]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','disk':'reopen'}") == "");
    REQUIRE(f.add("{'driver':'memory','node-name':'other','size':4096}") == "");
    f.disk->events.clear();
    SECTION("a later one cannot") {
        f.disk->reopen_error = "not today";
        CHECK(f.reopen({"{'driver':'memory','node-name':'other','size':4096,'read-only':true}",
                        "{'driver':'memory','node-name':'m','disk':'reopen','read-only':true}"}) == "not today");
        CHECK_FALSE(f.node("m").read_only());
        CHECK_FALSE(f.node("other").read_only());
    }
    SECTION("permissions do not allow it") {
        auto root = f.attach("other", GraphFixture::writer("NBD export 'e'"));
        f.disk->events.clear();
        CHECK_THAT(f.reopen({"{'driver':'memory','node-name':'m','disk':'reopen','read-only':true}",
                             "{'driver':'memory','node-name':'other','size':4096,'read-only':true}"}),
                   StartsWith("Image is read-only"));
        CHECK_FALSE(f.node("m").read_only());
        CHECK(f.disk->events == std::vector<std::string>{"quiesce", "prepare_reopen", "abort_reopen", "unquiesce"});
        f.detach(std::move(root));
    }
    SECTION("both do") {
        CHECK(f.reopen({"{'driver':'memory','node-name':'m','disk':'reopen','read-only':true}",
                        "{'driver':'memory','node-name':'other','size':4096,'read-only':true}"}) == "");
        CHECK(f.node("m").read_only());
        CHECK(f.node("other").read_only());
    }
}

TEST_CASE("reopen: children are replaced by reference, detached with null", "[block][reopen]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    REQUIRE(f.add("{'driver':'memory','node-name':'m2','size':131072}") == "");
    REQUIRE(f.add("{'driver':'null-co','node-name':'base','read-only':true}") == "");
    REQUIRE(f.add("{'driver':'overlay','node-name':'o','file':'m','backing':'base'}") == "");

    CHECK(f.reopen({"{'driver':'overlay','node-name':'o','file':'m','backing':null}"}) == "");
    CHECK(f.node("o").child("backing") == nullptr);
    CHECK(f.remove("base") == "");
    CHECK(f.reopen({"{'driver':'overlay','node-name':'o','file':'m2','backing':null}"}) == "");
    CHECK(f.node("o").child("file")->node.get() == &f.node("m2"));
    CHECK(f.node("m").cumulative_perms() == EdgePerms{Perm::kNone, Perm::kAll});
    CHECK(f.node("m2").cumulative_perms().need == (Perm::kConsistentRead | Perm::kWrite | Perm::kResize));
    CHECK(f.reopen(
              {"{'driver':'overlay','node-name':'o','file':'m2','backing':{'driver':'null-co','node-name':'b2'}}"}) ==
          "");
    REQUIRE(f.node("o").child("backing") != nullptr);
    CHECK(f.node("b2").read_only());
    CHECK(f.node("o").child("backing")->is_inline);
    CHECK(f.reopen({"{'driver':'overlay','node-name':'o','file':'m2','backing':null}"}) == "");
    CHECK(f.graph->find("b2") == nullptr);
}

TEST_CASE("reopen: a failed one closes what it opened", "[block][reopen]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','disk':'reopen'}") == "");
    REQUIRE(f.add("{'driver':'overlay','node-name':'o','file':'m'}") == "");
    f.disk->reopen_error = "no";
    CHECK(f.reopen({"{'driver':'overlay','node-name':'o','file':'m','backing':{'driver':'null-co','node-name':'b'}}",
                    "{'driver':'memory','node-name':'m','disk':'reopen'}"}) == "no");
    CHECK(f.names() == "o m");
    CHECK(f.node("o").child("backing") == nullptr);
}

TEST_CASE("reopen: going read-only takes inline and sole-user children along", "[block][reopen]") {
    Fixture f;
    SECTION("an inline child, both ways") {
        REQUIRE(f.add("{'driver':'overlay','node-name':'o','file':{'driver':'memory','node-name':'m','size':4096}}") ==
                "");
        CHECK(f.reopen(
                  {"{'driver':'overlay','node-name':'o','read-only':true,'file':{'driver':'memory','size':4096}}"}) ==
              "");
        CHECK(f.node("m").read_only());
        CHECK(f.node("m").cumulative_perms().need == Perm::kConsistentRead);
        CHECK(f.reopen({"{'driver':'overlay','node-name':'o','file':{'driver':'memory','size':4096}}"}) == "");
        CHECK_FALSE(f.node("m").read_only());
    }
    SECTION("a referenced one; the way back names both") {
        REQUIRE(f.add("{'driver':'memory','node-name':'m','size':4096}") == "");
        REQUIRE(f.add("{'driver':'overlay','node-name':'o','file':'m'}") == "");
        CHECK(f.reopen({"{'driver':'overlay','node-name':'o','read-only':true,'file':'m'}"}) == "");
        CHECK(f.node("m").read_only());
        CHECK_THAT(f.reopen({"{'driver':'overlay','node-name':'o','file':'m'}"}),
                   StartsWith("Block node is read-only"));
        CHECK(f.node("o").read_only());
        CHECK(f.reopen({"{'driver':'memory','node-name':'m','size':4096}",
                        "{'driver':'overlay','node-name':'o','file':'m'}"}) == "");
        CHECK_FALSE(f.node("m").read_only());
        CHECK_FALSE(f.node("o").read_only());
    }
}
