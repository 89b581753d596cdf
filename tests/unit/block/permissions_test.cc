#include <catch2/catch.hpp>

#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using Catch::Matchers::StartsWith;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;

namespace {

constexpr Perm kChanging = Perm::kWrite | Perm::kResize;

/// A format that takes on its file what formats take.
class FileUser final : public Filter {
  public:
    FileUser(const OpenContext& context, const Node& file) : Filter("file-user", context.node_name(), context.flags()) {
        set_size(file.size());
    }
};

Task<Result<std::shared_ptr<Node>>> open_file_user(OpenContext& context) {
    CO_TRY(Node * file, co_await context.open_child("file", ChildRole::kFile));
    if (context.child_given("backing")) CO_CHECK(co_await context.open_child("backing", ChildRole::kBacking));
    co_return std::make_shared<FileUser>(context, *file);
}

struct Fixture : GraphFixture {
    Fixture() {
        drivers.push_back({.name = "file-user", .open = open_file_user});
        graph = std::make_unique<Graph>(*runtime.runtime, drivers, nullptr);
    }
};

}  // namespace

TEST_CASE("permissions: names are the reference's", "[block][permissions]") {
    CHECK(perm_names(Perm::kNone) == "");
    CHECK(perm_names(Perm::kResize) == "resize");
    CHECK(perm_names(Perm::kAll) == "consistent read, write, write unchanged, resize");
}

TEST_CASE("permissions: an edge takes and shares what its role asks for", "[block][permissions]") {
    const EdgePerms unused{Perm::kNone, Perm::kAll};
    const EdgePerms writing{Perm::kConsistentRead | Perm::kWrite, ~Perm::kResize};
    const EdgePerms alone{Perm::kConsistentRead, Perm::kConsistentRead};
    CHECK(default_child_perms(ChildRole::kFiltered, false, writing) == writing);
    CHECK(default_child_perms(ChildRole::kFile, false, unused) ==
          EdgePerms{Perm::kConsistentRead | kChanging, ~kChanging});
    CHECK(default_child_perms(ChildRole::kFile, true, unused) == EdgePerms{Perm::kConsistentRead, ~kChanging});
    CHECK(default_child_perms(ChildRole::kBacking, true, unused) == EdgePerms{Perm::kNone, Perm::kAll});
    CHECK(default_child_perms(ChildRole::kBacking, true, writing) == EdgePerms{Perm::kConsistentRead, Perm::kAll});
    CHECK(default_child_perms(ChildRole::kBacking, true, alone) == EdgePerms{Perm::kConsistentRead, ~kChanging});
}

TEST_CASE("permissions: a writable format holds write and resize without any user", "[block][permissions]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':4096}") == "");
    REQUIRE(f.add("{'driver':'file-user','node-name':'q','file':'m'}") == "");
    CHECK(f.node("m").cumulative_perms() == EdgePerms{Perm::kConsistentRead | kChanging, ~kChanging});

    SECTION("so a second one is refused, and nothing is left of it") {
        CHECK(f.add("{'driver':'file-user','node-name':'q2','file':'m'}") ==
              "Permission conflict on node 'm': permissions 'write, resize' are both required by node 'q2' (uses node "
              "'m' as "
              "'file' child) and unshared by node 'q' (uses node 'm' as 'file' child).");
        CHECK(f.names() == "q m");
    }
    SECTION("also a read-only one") {
        CHECK_THAT(
            f.add("{'driver':'file-user','node-name':'q2','read-only':true,'file':'m'}"),
            StartsWith("Permission conflict on node 'm': permissions 'write, resize' are both required by node 'q'"));
    }
    SECTION("and a writer of the file, named with its own words") {
        CHECK(GraphFixture::text_of(f.run(f.graph->attach(f.node("m"), GraphFixture::writer("NBD export 'e'")))) ==
              "Permission conflict on node 'm': permissions 'write' are both required by an unnamed block device (uses "
              "node 'm' as 'root' child) "
              "and unshared by node 'q' (uses node 'm' as 'file' child).; required by NBD export 'e'");
        CHECK(f.node("m").roots().empty());
    }
    SECTION("but raw above the file may be opened, and only its reader is refused") {
        REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'m'}") == "");
        CHECK_THAT(GraphFixture::text_of(f.run(f.graph->attach(f.node("r"), GraphFixture::reader()))),
                   StartsWith("Permission conflict on node 'm': permissions 'resize' are both required by node 'q' "
                              "(uses node 'm' as 'file' "
                              "child) and unshared by node 'r' (uses node 'm' as 'file' child)."));
    }
    SECTION("removing the format gives the file back") {
        CHECK(f.remove("q") == "");
        CHECK(f.node("m").cumulative_perms() == EdgePerms{Perm::kNone, Perm::kAll});
    }
}

TEST_CASE("permissions: two writable exports of one node are fine, through raw as well", "[block][permissions]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':4096}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'m'}") == "");
    auto a = f.attach("r", GraphFixture::writer("a"));
    auto b = f.attach("r", GraphFixture::writer("b"));
    auto c = f.attach("m", GraphFixture::writer("c"));
    CHECK(f.node("m").cumulative_perms() == GraphFixture::writer().perms);
    f.detach(std::move(a));
    f.detach(std::move(b));
    CHECK(f.node("r").cumulative_perms().need == Perm::kNone);
    f.detach(std::move(c));
    CHECK(f.node("m").cumulative_perms() == EdgePerms{Perm::kNone, Perm::kAll});
}

TEST_CASE("permissions: a job's target is nobody else's", "[block][permissions]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':4096}") == "");
    RootOptions target;
    target.perms = {kChanging, Perm::kWriteUnchanged};
    target.user = "block job 'mirror0'";
    auto job = f.attach("m", target);
    CHECK(GraphFixture::text_of(f.run(f.graph->attach(f.node("m"), GraphFixture::reader("NBD export 'e'")))) ==
          "Permission conflict on node 'm': permissions 'resize' are both required by block job 'mirror0' (uses node "
          "'m' as 'root' child) and "
          "unshared by an unnamed block device (uses node 'm' as 'root' child).; unshared by NBD export 'e'");
    f.detach(std::move(job));
}

TEST_CASE("permissions: writers of something read-only are refused", "[block][permissions]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':4096,'read-only':true}") == "");
    CHECK_THAT(f.add("{'driver':'file-user','node-name':'q','file':'m'}"), StartsWith("Block node is read-only"));
    CHECK_THAT(GraphFixture::text_of(f.run(f.graph->attach(f.node("m"), GraphFixture::writer()))),
               StartsWith("Image is read-only"));
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'m'}") == "");
    CHECK_THAT(GraphFixture::text_of(f.run(f.graph->attach(f.node("r"), GraphFixture::writer()))),
               StartsWith("Block node is read-only"));
    CHECK(f.add("{'driver':'file-user','node-name':'q','read-only':true,'file':'m'}") == "");
}

TEST_CASE("permissions: force-share excludes nobody", "[block][permissions]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':4096,'read-only':true,'force-share':true}") == "");
    REQUIRE(f.add("{'driver':'file-user','node-name':'q','read-only':true,'file':'m'}") == "");
    CHECK(f.node("m").cumulative_perms().share == Perm::kAll);
}

TEST_CASE("permissions: a backing file is read, and may not be removed", "[block][permissions]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'base','read-only':true}") == "");
    REQUIRE(f.add("{'driver':'file-user','node-name':'o','file':{'driver':'memory','size':4096},'backing':'base'}") ==
            "");
    CHECK(f.remove("base") == "Node 'base' is busy: node is used as backing hd of 'o'");
    CHECK(f.node("base").cumulative_perms().need == Perm::kNone);
    auto root = f.attach("o", GraphFixture::reader());
    CHECK(f.node("base").cumulative_perms().need == Perm::kConsistentRead);
    f.detach(std::move(root));
}

TEST_CASE("permissions: what one node cannot prepare is taken back on all", "[block][permissions]") {
    GraphFixture f;
    auto disk = MemoryDisk::named("prepare");
    disk->resize(4096);
    REQUIRE(f.add("{'driver':'memory','node-name':'m','disk':'prepare'}") == "");
    auto reader = f.attach("m", GraphFixture::reader());
    disk->events.clear();
    disk->perms_error = "Failed to get \"write\" lock";
    CHECK(GraphFixture::text_of(f.run(f.graph->attach(f.node("m"), GraphFixture::writer()))) ==
          "Failed to get \"write\" lock");
    CHECK(f.node("m").cumulative_perms().need == Perm::kConsistentRead);
    // The reader is live: its requests were held while the node prepared.
    CHECK(disk->events == std::vector<std::string>{"quiesce", "prepare_perms", "unquiesce"});
    disk->events.clear();
    auto writer = f.attach("m", GraphFixture::writer());
    CHECK(disk->events == std::vector<std::string>{"quiesce", "prepare_perms", "commit_perms", "unquiesce"});
    disk->events.clear();
    auto second = f.attach("m", GraphFixture::writer());
    CHECK(disk->events.empty());
    f.detach(std::move(second));
    f.detach(std::move(writer));
    f.detach(std::move(reader));
    MemoryDisk::forget("prepare");
}
