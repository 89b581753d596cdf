#include <catch2/catch.hpp>

#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;

TEST_CASE("null: reads are zeroes whatever was written or stood in memory", "[block][null]") {
    GraphFixture f;
    const std::string driver = GENERATE("null-co", "null-aio");
    REQUIRE(f.add("{'driver':'" + driver + "','node-name':'n','size':65536}") == "");
    auto root = f.attach("n", GraphFixture::writer());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    Buffer memory = Buffer::alloc(4096);
    std::memset(memory.data(), 0x5a, 4096);
    const iovec iov = memory.iov();
    CHECK(f.run(channel.write(0, IoVec(iov))));
    CHECK(f.run(channel.read(0, IoVec(iov))));
    CHECK(memory_is_zero(memory.data(), 4096));
    std::memset(memory.data(), 0x5a, 4096);
    CHECK(channel.try_read(0, IoVec(iov)) == 0);
    CHECK(memory_is_zero(memory.data(), 4096));
    CHECK(f.run(channel.flush()));
    CHECK(f.run(channel.discard(0, 65536)));
    CHECK(f.run(channel.write_zeroes(0, 65536, WriteFlags::kNoFallback)));
    f.detach(std::move(root));
}

TEST_CASE("null: a gigabyte of data unless told otherwise", "[block][null]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    CHECK(f.node("n").size() == uint64_t{1} << 30);
    auto root = f.attach("n", GraphFixture::reader());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    Result<BlockStatus> status = f.run(channel.block_status(512, 4096));
    REQUIRE(status);
    CHECK(status->data);
    CHECK_FALSE(status->zero);
    CHECK(status->length == 4096);
    f.detach(std::move(root));
}

TEST_CASE("null: read-zeroes says so", "[block][null]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-aio','node-name':'n','read-zeroes':true}") == "");
    auto root = f.attach("n", GraphFixture::reader());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    Result<BlockStatus> status = f.run(channel.block_status(0, 4096));
    REQUIRE(status);
    CHECK(status->zero);
    CHECK_FALSE(status->data);
    f.detach(std::move(root));
}

TEST_CASE("null: a delay is kept, and never answered inline", "[block][null]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n','latency-ns':2000000}") == "");
    auto root = f.attach("n", GraphFixture::reader());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    Buffer memory = Buffer::alloc(512);
    const iovec iov = memory.iov();
    CHECK(channel.try_read(0, IoVec(iov)) == -EAGAIN);
    const auto began = Clock::now();
    CHECK(f.run(channel.read(0, IoVec(iov))));
    CHECK(Clock::now() - began >= std::chrono::milliseconds(2));
    f.detach(std::move(root));
}

TEST_CASE("null: wrong numbers are refused, the name is plain when the driver says it all", "[block][null]") {
    GraphFixture f;
    CHECK(f.add("{'driver':'null-co','node-name':'n','latency-ns':-1}") == "latency-ns is invalid");
    CHECK(f.add("{'driver':'null-co','node-name':'n','size':-1}") == "Parameter 'size' expects a >0 size");
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    CHECK(f.node("n").filename() == "null-co://");
    REQUIRE(f.add("{'driver':'null-aio','node-name':'s','size':4096}") == "");
    CHECK(f.node("s").filename() == "json:{\"driver\": \"null-aio\", \"size\": 4096}");
    REQUIRE(f.add("{'driver':'raw','node-name':'r','file':'n'}") == "");
    CHECK(f.node("r").filename() == "null-co://");
}
