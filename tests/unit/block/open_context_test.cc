#include <catch2/catch.hpp>

#include "block/bitmap.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/temp_dir.h"

using namespace gantry;
using namespace gantry::block;
using Catch::Matchers::StartsWith;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;

namespace {

class Image final : public Filter {
  public:
    Image(const OpenContext& context, const Node& file, std::string_view driver = "image")
        : Filter(driver, context.node_name(), context.flags()) {
        set_size(file.size());
    }
};

/// An image whose "header" (an option here) names a backing file.
Task<Result<std::shared_ptr<Node>>> open_image(OpenContext& context) {
    CO_TRY(Node * file, co_await context.open_child("file", ChildRole::kFile));
    const schema::Options o = context.options();
    if (context.child_given("backing")) {
        CO_CHECK(co_await context.open_child("backing", ChildRole::kBacking));
    } else if (!context.child_refused("backing") && o.has("recorded")) {
        json::object definition = o.object("recorded");
        CO_CHECK(co_await context.open_implicit("backing", ChildRole::kBacking, std::move(definition)));
    }
    co_return std::make_shared<Image>(context, *file);
}

/// Reads its file while it is being opened, and counts what the file was asked for until then.
Task<Result<std::shared_ptr<Node>>> open_curious(OpenContext& context) {
    CO_TRY(Node * file, co_await context.open_child("file", ChildRole::kFile));
    uint8_t byte = 0;
    const iovec iov{&byte, 1};
    Request rq = Request::internal();
    CO_CHECK(co_await file->read(rq, 0, IoVec(iov)));
    if (byte != 'M') co_return fail(ErrorKind::kInvalid, "Image is not in curious format");
    co_return std::make_shared<Image>(context, *file, "curious");
}

Task<Result<std::shared_ptr<Node>>> open_list(OpenContext& context) {
    CO_TRY(Node * first, co_await context.open_child("children.0", ChildRole::kFiltered));
    CO_CHECK(co_await context.open_child("children.1", ChildRole::kFiltered));
    Result<Node*> third = co_await context.open_child("children.2", ChildRole::kFiltered);
    if (third) co_return fail(ErrorKind::kInvalid, "there is no third");
    co_return std::make_shared<Image>(context, *first);
}

int probe_m(const uint8_t* head, size_t size, std::string_view) { return size > 0 && head[0] == 'M' ? 100 : 0; }

/// Stands for the file driver: the policy looks at names, not at what is behind them.
Task<Result<std::shared_ptr<Node>>> open_as_file(OpenContext& context) { return test::kMemoryDriver.open(context); }

struct Fixture : GraphFixture {
    Fixture() {
        drivers.push_back({.name = "image", .open = open_image});
        drivers.push_back({.name = "curious", .open = open_curious, .probe = probe_m});
        drivers.push_back({.name = "list", .open = open_list});
        drivers.push_back({.name = "file", .open = open_as_file, .is_protocol = true});
        graph = std::make_unique<Graph>(*runtime.runtime, drivers, nullptr);
        disk->resize(4096);
        disk->write(0, "M", 1);
    }
    ~Fixture() { MemoryDisk::forget("context"); }
    std::shared_ptr<MemoryDisk> disk = MemoryDisk::named("context");
};

}  // namespace

TEST_CASE("open: locks are held before the first byte is read", "[block][open]") {
    Fixture f;
    SECTION("and the format opens") {
        REQUIRE(
            f.add("{'driver':'curious','node-name':'c','file':{'driver':'memory','node-name':'m','disk':'context'}}") ==
            "");
        CHECK(f.disk->events.at(0) == "prepare_perms");
        CHECK(f.disk->events.at(1) == "commit_perms");
        CHECK(f.node("m").cumulative_perms().need == (Perm::kConsistentRead | Perm::kWrite | Perm::kResize));
    }
    SECTION("a lock refused means nothing was read") {
        f.disk->perms_error = "Failed to get \"write\" lock";
        CHECK(f.add("{'driver':'curious','node-name':'c','file':{'driver':'memory','disk':'context'}}") ==
              "Failed to get \"write\" lock");
        CHECK(f.disk->count(MemoryDisk::Op::kRead) == 0);
        CHECK(f.names() == "");
    }
    SECTION("a failed open leaves a referenced file as it was") {
        f.disk->write(0, "x", 1);
        REQUIRE(f.add("{'driver':'memory','node-name':'m','disk':'context'}") == "");
        CHECK(f.add("{'driver':'curious','node-name':'c','file':'m'}") == "Image is not in curious format");
        CHECK(f.names() == "m");
        CHECK(f.node("m").cumulative_perms() == EdgePerms{Perm::kNone, Perm::kAll});
        auto writer = f.attach("m", GraphFixture::writer());
        f.detach(std::move(writer));
    }
}

TEST_CASE("open: a recorded backing file is opened read-only, its format probed when none is recorded",
          "[block][open]") {
    Fixture f;
    SECTION("with a format") {
        REQUIRE(f.add("{'driver':'image','node-name':'o','file':{'driver':'null-co'},"
                      "'recorded':{'driver':'raw','node-name':'b','file':{'driver':'memory','disk':'context'}}}") ==
                "");
        CHECK(f.node("b").read_only());
        CHECK(f.node("o").child("backing")->is_inline);
    }
    SECTION("without") {
        REQUIRE(f.add("{'driver':'image','node-name':'o','file':{'driver':'null-co'},"
                      "'recorded':{'node-name':'b','file':{'driver':'memory','disk':'context'}}}") == "");
        CHECK(f.node("b").driver() == "curious");
    }
    SECTION("not when it is given, or refused") {
        REQUIRE(f.add("{'driver':'image','node-name':'o','file':{'driver':'null-co'},'backing':null,"
                      "'recorded':{'driver':'raw','node-name':'b','file':'absent'}}") == "");
        CHECK(f.node("o").child("backing") == nullptr);
        REQUIRE(f.add("{'driver':'image','node-name':'o2','file':{'driver':'null-co'},'backing':{'driver':'null-co','"
                      "node-name':'g'},"
                      "'recorded':{'driver':'raw','node-name':'b','file':'absent'}}") == "");
        CHECK(f.node("o2").child("backing")->node->name() == "g");
        CHECK(f.node("g").read_only());
    }
    SECTION("an absent one fails the open") {
        CHECK(f.add("{'driver':'image','node-name':'o','file':{'driver':'null-co'},'recorded':{'driver':'raw','file':'"
                    "absent'}}") == "Cannot find device='absent' nor node-name='absent'");
        CHECK(f.names() == "");
    }
}

TEST_CASE("open: an image that names itself as its backing file ends with an error", "[block][open]") {
    Fixture f;
    f.drivers.push_back({.name = "loop", .open = [](OpenContext& context) -> Task<Result<std::shared_ptr<Node>>> {
                             json::object again = test::options_of("{'driver':'loop'}");
                             CO_TRY(Node * below,
                                    co_await context.open_implicit("backing", ChildRole::kBacking, std::move(again)));
                             co_return std::make_shared<Image>(context, *below);
                         }});
    Graph graph(*f.runtime.runtime, f.drivers, nullptr);
    Result<Node*> node = f.run(graph.add(test::options_of("{'driver':'loop','node-name':'l'}")));
    REQUIRE_FALSE(node);
    CHECK(node.error().kind() == ErrorKind::kTooLarge);
    CHECK(graph.nodes().empty());
    f.run(graph.close_all());
}

TEST_CASE("open: files that an image names must lie where the operator allows", "[block][open]") {
    Fixture f;
    test::TempDir inside;
    f.graph->image_references().allow_all = false;
    f.graph->image_references().allowed_directories = {inside.path()};
    auto with = [](const std::string& filename) {
        return "{'driver':'image','node-name':'o','file':{'driver':'null-co'},'recorded':{'driver':'raw','file':{'"
               "driver':'file','filename':'" +
               filename + "','size':512}}}";
    };
    CHECK(f.add(with(inside.path() + "/base.raw")) == "");
    CHECK(f.remove("o") == "");
    CHECK_THAT(f.add(with("/etc/passwd")), StartsWith("node 'o': the image names '/etc/passwd' as its backing file"));
    CHECK_THAT(f.add(with(inside.path() + "/../base.raw")), StartsWith("node 'o': the image names"));
    CHECK_THAT(f.add(with(inside.path() + "x/base.raw")), StartsWith("node 'o': the image names"));
    CHECK_THAT(f.add("{'driver':'image','node-name':'o','file':{'driver':'null-co'},'recorded':{'driver':'null-co'}}"),
               StartsWith("node 'o': the image names"));
    // Every file that a description names counts, wherever in it the child stands.
    const std::string good = "{'driver':'file','filename':'" + inside.path() + "/base.raw','size':512}";
    const std::string bad = "{'driver':'file','filename':'/etc/passwd'}";
    const auto described = [&](const std::string& children) {
        return f.add("{'driver':'image','node-name':'o','file':{'driver':'null-co'},'recorded':" + children + "}");
    };
    CHECK(described("{'driver':'image','file':" + good + ",'backing':" + good + "}") == "");
    CHECK(f.remove("o") == "");
    for (const std::string& children : {
             "{'driver':'image','file':" + good + ",'backing':" + bad + "}",
             "{'driver':'image','file':" + good + ",'backing':{'driver':'raw','file':" + bad + "}}",
             "{'driver':'image','file':" + good + ",'data-file':{'driver':'null-co'}}",
             "{'driver':'list','children':[" + good + "," + bad + "]}",
             "{'driver':'raw','file':{'driver':'nbd','server':{'type':'unix','path':'" + inside.path() + "/s'}}}",
             std::string("{'driver':'raw','file':'image'}"),
         }) {
        INFO(children);
        CHECK_THAT(described(children), StartsWith("node 'o': the image names"));
    }
    CHECK(f.names() == "");
}

TEST_CASE("open: children may stand in a list", "[block][open]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    REQUIRE(f.add("{'driver':'list','node-name':'l','children':['n',{'driver':'null-co','node-name':'i'}]}") == "");
    CHECK(f.node("l").child("children.0")->node->name() == "n");
    CHECK(f.node("l").child("children.1")->node->name() == "i");
}

TEST_CASE("graph: dirty bitmaps follow the size of their node", "[block][graph][resize][bitmap]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'m'}") == "");
    auto upper = DirtyBitmap::create("u", 65536, 4096);
    auto lower = DirtyBitmap::create("l", 65536, 4096);
    REQUIRE(upper);
    REQUIRE(lower);
    f.node("r").add_bitmap(*upper);
    f.node("m").add_bitmap(*lower);
    (*upper)->mark(0, 1);
    REQUIRE(f.run(f.graph->resize(f.node("r"), 131072)));
    CHECK((*upper)->size() == 131072);
    CHECK((*lower)->size() == 131072);
    CHECK((*upper)->is_dirty(0));
    CHECK((*upper)->is_dirty(70000));
    CHECK_FALSE((*upper)->is_dirty(8192));
    REQUIRE(f.run(f.graph->resize(f.node("r"), 4096)));
    CHECK((*upper)->size() == 4096);
    CHECK((*lower)->size() == 4096);
    // A resize that the driver refuses leaves them alone.
    CHECK_FALSE(f.run(f.graph->resize(f.node("r"), int64_t{1} << 40)));
    CHECK((*upper)->size() == 4096);
    CHECK((*upper)->dirty_bytes() == 4096);
    f.node("r").remove_bitmap(**upper);
    f.node("m").remove_bitmap(**lower);
}
