#include <catch2/catch.hpp>

#include <cerrno>
#include <limits>

#include "runtime/cross_loop.h"
#include "runtime/task_scope.h"
#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;
using gantry::test::wait_until;

namespace {

constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

struct IoBuffer {
    explicit IoBuffer(size_t size, int byte = 0) : memory(Buffer::alloc(size)), one(memory.iov()) {
        std::memset(memory.data(), byte, size);
    }
    IoVec view() const { return IoVec(one); }
    Buffer memory;
    iovec one;
};

Task<int> try_read(Channel* channel, uint64_t offset, IoVec iov) { co_return channel->try_read(offset, iov); }
Task<int> try_write(Channel* channel, uint64_t offset, IoVec iov, WriteFlags flags) {
    co_return channel->try_write(offset, iov, flags);
}

Task<void> store(Task<Result<>> task, Result<>* result, bool* done) {
    *result = co_await std::move(task);
    *done = true;
}

struct Events : Observer {
    void io_error(std::string_view user, const Node& node, std::string_view operation, std::string_view action,
                  bool nospace, std::string_view reason) override {
        seen.push_back(fmt::format("{} {} {} {} {}", user, node.name(), operation, action, nospace));
    }
    std::vector<std::string> seen;
};

}  // namespace

TEST_CASE("channel: bounds are checked without overflow, and who cannot write is told so", "[block][root]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    auto root = f.attach("m", GraphFixture::writer());
    auto reader = f.attach("m", GraphFixture::reader());
    Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
    Channel& reading = *f.run(reader->channel(f.runtime.io_loop()));
    IoBuffer data(512);

    const uint64_t offset = GENERATE(uint64_t{65536}, uint64_t{65025}, uint64_t{1} << 62, kMax - 511, kMax);
    CAPTURE(offset);
    CHECK(f.runtime.run_on_io(channel.read(offset, data.view())).error().kind() == ErrorKind::kInvalid);
    CHECK(f.runtime.run_on_io(channel.write(offset, data.view())).error().kind() == ErrorKind::kNoSpace);
    CHECK(f.runtime.run_on_io(channel.write_zeroes(offset, 512, WriteFlags::kNone)).error().kind() ==
          ErrorKind::kNoSpace);
    CHECK(f.runtime.run_on_io(channel.discard(offset, 512)).error().kind() == ErrorKind::kNoSpace);
    CHECK(f.runtime.run_on_io(channel.block_status(offset, 512)).error().kind() == ErrorKind::kInvalid);
    CHECK(f.runtime.run_on_io(channel.write_zeroes(0, kMax, WriteFlags::kNone)).error().kind() == ErrorKind::kNoSpace);
    CHECK(f.runtime.run_on_io(channel.block_status(0, 0)).error().kind() == ErrorKind::kInvalid);
    CHECK(f.runtime.run_on_io(reading.write(0, data.view())).error().kind() == ErrorKind::kReadOnly);
    CHECK(f.runtime.run_on_io(reading.discard(0, 512)).error().kind() == ErrorKind::kReadOnly);
    CHECK(f.runtime.run_on_io(try_read(&channel, offset, data.view())) == -EINVAL);
    CHECK(f.runtime.run_on_io(try_write(&channel, offset, data.view(), WriteFlags::kNone)) == -ENOSPC);
    CHECK(f.runtime.run_on_io(try_write(&reading, 0, data.view(), WriteFlags::kNone)) == -EROFS);
    CHECK(reading.read_only());
    CHECK_FALSE(channel.read_only());

    const ChannelStats stats = f.run(root->stats());
    CHECK(stats.ops[static_cast<size_t>(OpKind::kRead)].invalid == 2);
    CHECK(stats.ops[static_cast<size_t>(OpKind::kWrite)].invalid == 4);
    CHECK(stats.ops[static_cast<size_t>(OpKind::kRead)].operations == 0);
    f.detach(std::move(root));
    f.detach(std::move(reader));
}

TEST_CASE("channel: data goes down and comes back, and is counted", "[block][root]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    auto root = f.attach("m", GraphFixture::writer());
    Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
    CHECK(f.run(root->channel(f.runtime.io_loop())) == &channel);
    IoBuffer out(4096, 7), in(4096);
    REQUIRE(f.runtime.run_on_io(channel.write(100, out.view())));
    REQUIRE(f.runtime.run_on_io(channel.read(100, in.view())));
    CHECK(std::memcmp(in.memory.data(), out.memory.data(), 4096) == 0);
    REQUIRE(f.runtime.run_on_io(channel.flush()));
    REQUIRE(f.runtime.run_on_io(channel.write_zeroes(100, 4096, WriteFlags::kNone)));
    REQUIRE(f.runtime.run_on_io(try_read(&channel, 100, in.view())) == 0);
    CHECK(memory_is_zero(in.memory.data(), 4096));
    CHECK(f.runtime.run_on_io(try_write(&channel, 0, out.view(), WriteFlags::kNone)) == 0);
    CHECK(f.runtime.run_on_io(try_write(&channel, 0, out.view(), WriteFlags::kFua)) == -EAGAIN);

    const ChannelStats stats = f.run(root->stats());
    const auto& reads = stats.ops[static_cast<size_t>(OpKind::kRead)];
    const auto& writes = stats.ops[static_cast<size_t>(OpKind::kWrite)];
    CHECK(reads.operations == 2);
    CHECK(reads.bytes == 8192);
    CHECK(writes.operations == 3);
    CHECK(writes.bytes == 12288);
    CHECK(stats.ops[static_cast<size_t>(OpKind::kFlush)].operations == 1);
    uint64_t histogram = 0;
    for (uint64_t n : reads.latency_log2_ns) histogram += n;
    CHECK(histogram == 2);
    CHECK(reads.total_time_ns > 0);
    f.detach(std::move(root));
}

TEST_CASE("channel: writethrough makes every write stable before it is answered", "[block][root]") {
    GraphFixture f;
    auto disk = MemoryDisk::named("through");
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536,'disk':'through'}") == "");
    RootOptions options = GraphFixture::writer();
    options.writethrough = true;
    auto root = f.attach("m", options);
    Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
    IoBuffer data(512, 1);
    CHECK(f.runtime.run_on_io(try_write(&channel, 0, data.view(), WriteFlags::kNone)) == -EAGAIN);
    REQUIRE(f.runtime.run_on_io(channel.write(0, data.view())));
    CHECK(disk->count(MemoryDisk::Op::kFlush) == 1);
    f.detach(std::move(root));
    MemoryDisk::forget("through");
}

TEST_CASE("channel: the error policy decides what a client sees", "[block][root]") {
    Events events;
    GraphFixture f(&events);
    auto disk = MemoryDisk::named("policy");
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536,'disk':'policy'}") == "");
    RootOptions options = GraphFixture::writer("NBD export 'e'");
    IoBuffer data(512, 9);
    disk->set_fault([](MemoryDisk::Op op, uint64_t, uint64_t) { return op == MemoryDisk::Op::kWrite ? ENOSPC : EIO; });

    SECTION("report, without an event when no policy is set") {
        auto root = f.attach("m", options);
        Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
        CHECK(f.runtime.run_on_io(channel.read(0, data.view())).error().kind() == ErrorKind::kIo);
        CHECK(f.run(root->stats()).ops[static_cast<size_t>(OpKind::kRead)].failed == 1);
        CHECK(events.seen.empty());
        f.detach(std::move(root));
    }
    SECTION("ignore: a read gives zeroes, not old memory") {
        options.on_read_error = OnError::kIgnore;
        auto root = f.attach("m", options);
        Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
        CHECK(f.runtime.run_on_io(channel.read(0, data.view())));
        CHECK(memory_is_zero(data.memory.data(), 512));
        CHECK(f.run(wait_until([&] { return !events.seen.empty(); })));
        CHECK(events.seen.at(0) == "NBD export 'e' m read ignore false");
        f.detach(std::move(root));
    }
    SECTION("enospc: a full disk parks, other errors are reported") {
        options.on_write_error = OnError::kEnospc;
        auto root = f.attach("m", options);
        Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
        CHECK(f.run(channel.flush()).error().kind() == ErrorKind::kIo);
        Result<> result;
        bool done = false;
        TaskScope scope;
        f.run([](TaskScope* s, Task<void> t) -> Task<void> {
            s->spawn(std::move(t));
            co_return;
        }(&scope, store(channel.write(0, data.view()), &result, &done)));
        CHECK(f.run(wait_until([&] { return root->parked() == 1; })));
        CHECK_FALSE(done);
        CHECK(channel.in_flight() == 0);
        // Still full: it parks again.
        f.run(root->resume_parked());
        CHECK(f.run(wait_until([&] { return events.seen.size() == 3; })));
        CHECK(events.seen.back() == "NBD export 'e' m write stop true");
        CHECK(root->parked() == 1);
        // A drain does not wait for it.
        f.run(root->drain_begin());
        f.run(root->drain_end());
        disk->set_fault(nullptr);
        f.run(root->resume_parked());
        CHECK(f.run(wait_until([&] { return done; })));
        CHECK(result.has_value());
        CHECK(disk->bytes(0, 1)[0] == 9);
        f.run(scope.join());
        f.detach(std::move(root));
    }
    SECTION("stop: who goes away gets its errors") {
        options.on_read_error = OnError::kStop;
        auto root = f.attach("m", options);
        Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
        Result<> result;
        bool done = false;
        TaskScope scope;
        f.run([](TaskScope* s, Task<void> t) -> Task<void> {
            s->spawn(std::move(t));
            co_return;
        }(&scope, store(channel.read(0, data.view()), &result, &done)));
        CHECK(f.run(wait_until([&] { return root->parked() == 1; })));
        f.run(root->fail_parked());
        CHECK(f.run(wait_until([&] { return done; })));
        CHECK(result.error().kind() == ErrorKind::kIo);
        f.run(scope.join());
        f.detach(std::move(root));
    }
    disk->set_fault(nullptr);
    MemoryDisk::forget("policy");
}

TEST_CASE("root: a plain descriptor is lent only while nobody needs to see the requests",
          "[block][root][passthrough]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'r','offset':4096,'file':'m'}") == "");
    RootOptions options = GraphFixture::reader("FUSE export 'e'");

    SECTION("lent, and changes below are refused until it is returned") {
        auto root = f.attach("r", options);
        auto lease = root->lease_passthrough();
        REQUIRE(lease);
        CHECK(lease->offset == 4096);
        REQUIRE(f.add("{'driver':'null-co','node-name':'n','size':65536}") == "");
        const std::string busy =
            "Node 'm' is busy: FUSE export 'e' reads and writes its file directly; remove that first";
        CHECK(GraphFixture::text_of(f.run(f.graph->replace(f.node("m"), f.node("n")))) == busy);
        CHECK(GraphFixture::text_of(f.run(f.graph->resize(f.node("m"), 4096))) == busy);
        CHECK(f.reopen({"{'driver':'memory','node-name':'m','size':65536}"}) == busy);
        CHECK(GraphFixture::text_of(f.run(f.graph->attach(f.node("m"), GraphFixture::writer()))) == busy);
        root->release_passthrough();
        CHECK(f.run(f.graph->replace(f.node("m"), f.node("n"))));
        f.detach(std::move(root));
    }
    SECTION("not with writethrough") {
        options.writethrough = true;
        auto root = f.attach("r", options);
        CHECK(root->lease_passthrough().error().kind() == ErrorKind::kUnsupported);
        f.detach(std::move(root));
    }
    SECTION("not of a window that ends before its file") {
        REQUIRE(f.add("{'driver':'raw','node-name':'w','size':4096,'file':'m'}") == "");
        auto root = f.attach("w", options);
        CHECK(root->lease_passthrough().error().kind() == ErrorKind::kUnsupported);
        CHECK_FALSE(root->passthrough_leased());
        f.detach(std::move(root));
    }
    SECTION("not while zeroes are looked for") {
        REQUIRE(f.add("{'driver':'raw','node-name':'z','detect-zeroes':'on','file':'m'}") == "");
        auto root = f.attach("z", options);
        CHECK(root->lease_passthrough().error().kind() == ErrorKind::kUnsupported);
        f.detach(std::move(root));
    }
}

TEST_CASE("root: changing what it takes is checked like attaching", "[block][root]") {
    GraphFixture f;
    REQUIRE(f.add("{'driver':'memory','node-name':'m','size':65536}") == "");
    auto root = f.attach("m", GraphFixture::reader());
    Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
    RootOptions jealous = GraphFixture::reader("block job 'b'");
    jealous.perms.share = ~Perm::kWrite;
    auto other = f.attach("m", jealous);
    CHECK(channel.read_only());
    const EdgePerms wanted = GraphFixture::writer().perms;
    CHECK(f.run(f.graph->set_perms(*root, wanted)).error().kind() == ErrorKind::kPermission);
    CHECK(channel.read_only());
    f.detach(std::move(other));
    CHECK(f.run(f.graph->set_perms(*root, wanted)));
    CHECK_FALSE(channel.read_only());
    f.detach(std::move(root));
}
