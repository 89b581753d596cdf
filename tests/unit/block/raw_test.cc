#include <catch2/catch.hpp>

#include <limits>

#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;

namespace {

struct Fixture : GraphFixture {
    Fixture() {
        disk->resize(1 << 20);
        if (!add("{'driver':'memory','node-name':'m','disk':'raw'}").empty())
            throw std::runtime_error("no memory node");
    }
    ~Fixture() { MemoryDisk::forget("raw"); }
    std::shared_ptr<MemoryDisk> disk = MemoryDisk::named("raw");
};

}  // namespace

TEST_CASE("raw: a window shows the bytes of its place, and nothing beyond it is touched", "[block][raw]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'raw','node-name':'r','offset':1000,'size':8192,'file':'m'}") == "");
    CHECK(f.node("r").size() == 8192);
    std::vector<uint8_t> all(1 << 20, 0xee);
    f.disk->write(0, all.data(), all.size());
    auto root = f.attach("r", GraphFixture::writer());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    Buffer memory = Buffer::alloc(8192);
    const iovec iov = memory.iov();
    std::memset(memory.data(), 0x11, 8192);

    SECTION("write and read, both ways") {
        REQUIRE(f.run(channel.write(0, IoVec(iov))));
        std::memset(memory.data(), 0, 8192);
        REQUIRE(channel.try_read(0, IoVec(iov)) == 0);
        CHECK(std::ranges::all_of(memory.span(), [](uint8_t b) { return b == 0x11; }));
        REQUIRE(channel.try_write(0, IoVec(iov), WriteFlags::kNone) == 0);
    }
    SECTION("zeroes") { REQUIRE(f.run(channel.write_zeroes(0, 8192, WriteFlags::kNone))); }
    SECTION("the end is the window's") {
        CHECK(f.run(channel.write(1, IoVec(iov))).error().kind() == ErrorKind::kNoSpace);
        CHECK(f.run(channel.read(1, IoVec(iov))).error().kind() == ErrorKind::kInvalid);
    }
    CHECK(f.disk->bytes(999, 1)[0] == 0xee);
    CHECK(f.disk->bytes(9192, 1)[0] == 0xee);

    Result<BlockStatus> status = f.run(channel.block_status(4096, 4096));
    REQUIRE(status);
    CHECK(status->length == 4096);
    REQUIRE(status->has_offset);
    CHECK(status->host_offset == 5096);
    CHECK(status->file == &f.node("m"));
    f.detach(std::move(root));
}

TEST_CASE("raw: a window beyond the file is refused in the reference's words", "[block][raw]") {
    Fixture f;
    auto [options, text] = GENERATE(table<std::string, std::string>({
        {"'offset':2097152", "Offset (2097152) cannot be greater than size of the containing file (1048576)"},
        {"'size':2097152",
         "The sum of offset (0) and size (2097152) has to be smaller or equal to the  actual size of the containing "
         "file (1048576)"},
        {"'offset':1048576,'size':1",
         "The sum of offset (1048576) and size (1) has to be smaller or equal to the  actual size of the containing "
         "file (1048576)"},
        {"'offset':512,'size':9223372036854775807",
         "The sum of offset (512) and size (9223372036854775807) has to be smaller or equal to the  actual size of the "
         "containing file (1048576)"},
        {"'offset':-1", "Parameter 'offset' expects a >=0 value"},
        {"'size':-1", "Parameter 'size' expects a >=0 value"},
    }));
    CAPTURE(options);
    CHECK(f.add("{'driver':'raw','node-name':'r','file':'m'," + options + "}") == text);
    REQUIRE(f.add("{'driver':'raw','node-name':'ok','file':'m'}") == "");
    CHECK(f.reopen({"{'driver':'raw','node-name':'ok','file':'m'," + options + "}"}) == text);
    CHECK(f.node("ok").size() == 1 << 20);
}

TEST_CASE("raw: offset and size may be reopened, the users are told", "[block][raw][reopen]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'raw','node-name':'r','offset':512,'file':'m'}") == "");
    CHECK(f.node("r").size() == (1 << 20) - 512);
    RootOptions options = GraphFixture::reader();
    uint64_t told = 0;
    options.on_resize = [&](uint64_t size) { told = size; };
    auto root = f.attach("r", options);
    CHECK(f.reopen({"{'driver':'raw','node-name':'r','offset':4096,'size':8192,'file':'m'}"}) == "");
    CHECK(f.node("r").size() == 8192);
    CHECK(told == 8192);
    const uint8_t mark = 0x77;
    f.disk->write(4096, &mark, 1);
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    uint8_t byte = 0;
    const iovec iov{&byte, 1};
    REQUIRE(f.run(channel.read(0, IoVec(iov))));
    CHECK(byte == mark);
    CHECK(f.reopen({"{'driver':'raw','node-name':'r','file':'m'}"}) == "");
    CHECK(f.node("r").size() == 1 << 20);
    f.detach(std::move(root));
}

TEST_CASE("raw: it is resized with its file, unless its size is fixed", "[block][raw][resize]") {
    Fixture f;
    SECTION("an open end") {
        REQUIRE(f.add("{'driver':'raw','node-name':'r','offset':4096,'file':'m'}") == "");
        REQUIRE(f.run(f.graph->resize(f.node("r"), 8192)));
        CHECK(f.node("m").size() == 12288);
        CHECK(GraphFixture::text_of(f.run(f.graph->resize(f.node("r"), std::numeric_limits<int64_t>::max()))) ==
              "Disk size too large for the chosen offset");
    }
    SECTION("a fixed one") {
        REQUIRE(f.add("{'driver':'raw','node-name':'r','size':4096,'file':'m'}") == "");
        CHECK(GraphFixture::text_of(f.run(f.graph->resize(f.node("r"), 8192))) == "Cannot resize fixed-size raw disks");
        CHECK(f.node("m").size() == 1 << 20);
    }
}

TEST_CASE("raw: alignment is left to the file, in step with it or not", "[block][raw]") {
    Fixture f;
    REQUIRE(
        f.add("{'driver':'memory','node-name':'big','size':65536,'request-alignment':4096,'memory-alignment':512}") ==
        "");
    REQUIRE(f.add("{'driver':'raw','node-name':'aligned','offset':8192,'file':'big'}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'odd','offset':512,'file':'big'}") == "");
    CHECK(f.node("aligned").limits().request_alignment == 1);
    CHECK(f.node("aligned").limits().optimal_transfer == 4096);
    auto root = f.attach("odd", GraphFixture::writer());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    std::vector<uint8_t> data(5000, 0x42), back(5000);
    const iovec out{data.data(), data.size()}, in{back.data(), back.size()};
    REQUIRE(f.run(channel.write(100, IoVec(out))));
    REQUIRE(f.run(channel.read(100, IoVec(in))));
    CHECK(back == data);
    f.detach(std::move(root));
}

TEST_CASE("raw: its name is the file's, or says the window", "[block][raw]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'m'}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'w','offset':512,'read-only':true,'file':'r'}") == "");
    CHECK(f.node("r").filename() == "memory://raw");
    CHECK(
        f.node("w").filename() ==
        R"(json:{"driver": "raw", "offset": 512, "file": {"driver": "raw", "file": {"driver": "memory", "disk": "raw"}}})");
    const std::string long_name(2000, 'x');
    REQUIRE(f.add("{'driver':'raw','node-name':'l','offset':512,'file':{'driver':'memory','size':4096,'disk':'" +
                  long_name + "'}}") == "");
    CHECK(f.node("l").filename().size() == 1023);
    CHECK(f.node("l").filename().ends_with("..."));
    MemoryDisk::forget(long_name);
}
