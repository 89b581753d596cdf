// Transmission over a real socket: commands, replies, errors.

#include <catch2/catch.hpp>

#include "tests/support/nbd_client.h"
#include "tests/support/nbd_daemon.h"

using namespace gantry;
using namespace gantry::nbd;
using test::Bytes;
using test::NbdClient;
using test::NbdDaemon;

namespace {

Bytes pattern(size_t size, uint8_t seed = 1) {
    Bytes b(size);
    for (size_t i = 0; i < size; ++i) b[i] = static_cast<uint8_t>(i * 31 + i / 251 + seed);
    return b;
}

}  // namespace

TEST_CASE("nbd session: what is written is read back, in every size and at every offset", "[nbd][session]") {
    const bool fast = GENERATE(true, false);
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 8 << 20}, {"fast", fast}});
    NbdClient client(daemon.socket_path());
    CHECK(client.enter("disk").size == 8u << 20);
    for (uint32_t size : {1u, 511u, 512u, 4096u, 4097u, 32768u, 32769u, 65536u, 262144u, 300001u, 1048577u, 4194304u}) {
        CAPTURE(size);
        const Bytes data = pattern(size, static_cast<uint8_t>(size));
        const uint64_t offset = size % 4096 ? 12345 : 8192;
        REQUIRE(client.write(offset, data) == 0);
        const auto back = client.read(offset, size);
        REQUIRE(back);
        REQUIRE(*back == data);
    }
    client.disconnect();
    CHECK(client.closed());
}

TEST_CASE("nbd session: structured reads of every size agree with the disk", "[nbd][session]") {
    const bool fast = GENERATE(true, false);
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 8 << 20}, {"fast", fast}});
    auto& disk = daemon.disk();
    disk.fill(0, 10000, 1);
    disk.fill(200000, 4096, 2);
    disk.fill(1 << 20, 300000, 3);
    disk.fill(3 << 20, 5 << 20, 4);
    const Bytes all = disk.contents();
    NbdClient client(daemon.socket_path());
    CHECK(client.enter("disk", true).flags & kSendDf);
    for (uint64_t offset : {0ull, 1ull, 511ull, 4096ull, 100000ull, 1048000ull, 3145000ull}) {
        for (uint32_t size : {1u, 4096u, 65535u, 65536u, 100003u, 1u << 20, 4u << 20}) {
            for (uint16_t flags : {uint16_t{0}, uint16_t{kCmdDf}}) {
                CAPTURE(offset, size, flags);
                client.request(kCmdRead, 5, offset, size, flags);
                const Bytes data = client.structured_data(offset, size);
                const Bytes wanted(all.begin() + static_cast<ptrdiff_t>(offset),
                                   all.begin() + static_cast<ptrdiff_t>(offset + size));
                REQUIRE(data == wanted);
            }
        }
    }
}

TEST_CASE("nbd session: large structured reads send holes as holes, DF sends one chunk", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 4 << 20}});
    daemon.disk().fill(256 << 10, 256 << 10, 7);
    NbdClient client(daemon.socket_path());
    client.enter("disk", true);
    client.request(kCmdRead, 9, 0, 1 << 20);
    auto chunks = client.chunks();
    REQUIRE(chunks.size() == 3);
    CHECK(chunks[0].type == kChunkOffsetHole);
    CHECK(chunks[1].type == kChunkOffsetData);
    CHECK(chunks[1].payload.size() == (256u << 10) + 8);
    CHECK(chunks[2].type == kChunkOffsetHole);
    CHECK(load_big<uint32_t>(&chunks[2].payload[8]) == 512u << 10);
    for (const auto& chunk : chunks) CHECK(chunk.cookie == 9);
    client.request(kCmdRead, 10, 0, 1 << 20, kCmdDf);
    chunks = client.chunks();
    REQUIRE(chunks.size() == 1);
    CHECK(chunks[0].type == kChunkOffsetData);
    client.request(kCmdRead, 11, 1 << 20, 3 << 20);
    chunks = client.chunks();
    REQUIRE(chunks.size() == 1);
    CHECK(chunks[0].type == kChunkOffsetHole);
}

TEST_CASE("nbd session: empty requests", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    SECTION("simple") {
        NbdClient client(daemon.socket_path());
        client.enter("disk");
        CHECK(client.command(kCmdRead, 0, 0) == 0);
        CHECK(client.command(kCmdWrite, 0, 0) == 0);
        CHECK(client.command(kCmdTrim, 0, 0) == 0);
        CHECK(client.command(kCmdCache, 0, 0) == 0);
        CHECK(client.command(kCmdWriteZeroes, 0, 0, kCmdFua) == 0);
        CHECK(client.command(kCmdBlockStatus, 0, 0) == kWireInval);
    }
    SECTION("structured") {
        NbdClient client(daemon.socket_path());
        client.enter("disk", true, true);
        client.request(kCmdRead, 1, 0, 0);
        const auto chunks = client.chunks();
        REQUIRE(chunks.size() == 1);
        CHECK(chunks[0].type == kChunkNone);
        CHECK(chunks[0].payload.empty());
        CHECK(client.command(kCmdBlockStatus, 0, 0) == kWireInval);
    }
}

TEST_CASE("nbd session: a read-only export refuses to be changed and swallows the payload", "[nbd][session]") {
    const bool structured = GENERATE(false, true);
    const uint32_t size = GENERATE(1u, 40000u, 3000000u);
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 4 << 20}}, false);
    NbdClient client(daemon.socket_path());
    const auto entered = client.enter("disk", structured);
    CHECK(entered.flags & kReadOnly);
    CHECK_FALSE(entered.flags & (kSendTrim | kSendWriteZeroes | kSendFastZero));
    CHECK(entered.flags & kCanMultiConn);
    CHECK(client.write(0, pattern(size)) == kWirePerm);
    CHECK(client.command(kCmdTrim, 0, 512) == kWirePerm);
    CHECK(client.command(kCmdWriteZeroes, 0, 512) == kWirePerm);
    CHECK(client.command(kCmdWriteZeroes, 0, 512, kCmdFastZero) == kWireInval);
    CHECK(client.command(kCmdFlush, 0, 0) == 0);
    CHECK(daemon.disk().writes == 0);
}

TEST_CASE("nbd session: refused writes of any size leave the stream in step", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 1 << 20}});
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    for (uint32_t size : {1u, 4096u, 100000u, 5000000u, kMaxPayload}) {
        CHECK(client.write(1 << 20, pattern(size)) == kWireNoSpace);
        CHECK(client.write(0, pattern(size), kCmdDf) == kWireInval);
    }
    CHECK(client.write(0, pattern(4096)) == 0);
    CHECK(client.read(0, 4096) == pattern(4096));
}

TEST_CASE("nbd session: a WRITE above the maximum payload ends the connection", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    client.request(kCmdWrite, 1, 0, kMaxPayload + 1);
    CHECK(client.ends());
    NbdClient other(daemon.socket_path());
    CHECK(other.enter("disk").size == 1u << 20);
}

TEST_CASE("nbd session: a READ above the maximum payload is an error, a huge TRIM is none", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 40 << 20}});
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    CHECK(client.command(kCmdRead, 0, kMaxPayload + 1) == kWireInval);
    CHECK(client.command(kCmdTrim, 0, 40 << 20) == 0);
    CHECK(client.command(kCmdWriteZeroes, 0, 40 << 20) == 0);
    CHECK(client.command(kCmdCache, 0, 40 << 20) == 0);
    const auto data = client.read(0, kMaxPayload);
    REQUIRE(data);
    CHECK(data->size() == kMaxPayload);
}

TEST_CASE("nbd session: a wrong request magic ends the connection", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    for (uint32_t magic : {0u, 0x21e41c71u, 0x12560953u, 0x25609514u}) {
        NbdClient client(daemon.socket_path());
        client.enter("disk");
        Bytes request = NbdClient::request_bytes(kCmdRead, 1, 0, 512);
        store_big(request.data(), magic);
        client.send(request);
        CHECK(client.ends());
    }
}

TEST_CASE("nbd session: FUA reaches the node and TRIM with FUA flushes", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    auto& disk = daemon.disk();
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    CHECK(client.write(0, pattern(512), kCmdFua) == 0);
    CHECK(disk.fua_writes + disk.flushes >= 1u);
    const uint64_t before = disk.flushes;
    CHECK(client.command(kCmdTrim, 0, 4096, kCmdFua) == 0);
    CHECK(disk.flushes > before);
    for (uint16_t command : {kCmdRead, kCmdFlush, kCmdCache, kCmdWriteZeroes}) {
        CHECK(client.command(command, 0, 0, kCmdFua) == 0);
    }
}

TEST_CASE("nbd session: WRITE_ZEROES of the whole export, with and without holes", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 1000001}, {"discard", "unmap"}});
    auto& disk = daemon.disk();
    disk.fill(0, 1000001, 0xff);
    NbdClient client(daemon.socket_path());
    CHECK(client.enter("disk").size == 1000001);
    const uint16_t flags = GENERATE(uint16_t{0}, uint16_t{kCmdNoHole});
    CHECK(client.command(kCmdWriteZeroes, 0, 1000001, flags) == 0);
    CHECK(disk.contents() == Bytes(1000001));
    CHECK(disk.last_zero_may_unmap == (flags == 0));
}

TEST_CASE("nbd session: FAST_ZERO is ENOTSUP where zeroing is not fast", "[nbd][session]") {
    const bool fast_zero = GENERATE(true, false);
    NbdDaemon daemon;
    daemon.serve_disk({{"zeroes", fast_zero}});
    auto& disk = daemon.disk();
    disk.fill(0, 8192, 0xff);
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    CHECK(client.command(kCmdWriteZeroes, 0, 4096, kCmdFastZero) == (fast_zero ? kWireOk : kWireNotSup));
    CHECK(disk.contents()[0] == (fast_zero ? 0 : 0xff));
    CHECK(client.command(kCmdWriteZeroes, 0, 4096) == 0);
    CHECK(disk.contents()[0] == 0);
}

TEST_CASE("nbd session: BLOCK_STATUS merges, clips and honours REQ_ONE", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 1 << 20}});
    daemon.disk().fill(8192, 8192, 1);
    NbdClient client(daemon.socket_path());
    client.enter("disk", true, true);
    const auto status = [&](uint64_t offset, uint32_t length, uint16_t flags) {
        client.request(kCmdBlockStatus, 3, offset, length, flags);
        const auto chunks = client.chunks();
        REQUIRE(chunks.size() == 1);
        REQUIRE(chunks[0].type == kChunkBlockStatus);
        CHECK(load_big<uint32_t>(chunks[0].payload.data()) == 1);
        std::vector<std::pair<uint32_t, uint32_t>> extents;
        for (size_t at = 4; at < chunks[0].payload.size(); at += 8) {
            extents.emplace_back(load_big<uint32_t>(&chunks[0].payload[at]),
                                 load_big<uint32_t>(&chunks[0].payload[at + 4]));
        }
        return extents;
    };
    using Extents = std::vector<std::pair<uint32_t, uint32_t>>;
    CHECK(status(0, 1 << 20, 0) == Extents{{8192, 3}, {8192, 0}, {(1 << 20) - 16384, 3}});
    CHECK(status(0, 1 << 20, kCmdReqOne) == Extents{{8192, 3}});
    CHECK(status(10000, 100, 0) == Extents{{100, 0}});
    CHECK(status(8191, 2, 0) == Extents{{1, 3}, {1, 0}});
    daemon.disk().fail_status = EIO;
    client.request(kCmdBlockStatus, 3, 0, 4096);
    const auto failed = client.reply();
    CHECK(failed.error == kWireIo);
    CHECK(failed.done());
}

TEST_CASE("nbd session: BLOCK_STATUS without a selected context is refused", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    const bool structured = GENERATE(false, true);
    NbdClient client(daemon.socket_path());
    client.enter("disk", structured);
    CHECK(client.command(kCmdBlockStatus, 0, 512) == kWireInval);
    CHECK(client.command(kCmdFlush, 0, 0) == 0);
}

TEST_CASE("nbd session: errors of the disk are answered and the connection lives on", "[nbd][session]") {
    const bool fast = GENERATE(true, false);
    const bool structured = GENERATE(false, true);
    NbdDaemon daemon;
    daemon.serve_disk({{"fast", fast}});
    auto& disk = daemon.disk();
    NbdClient client(daemon.socket_path());
    client.enter("disk", structured);
    disk.fail_reads = EIO;
    disk.fail_writes = ENOSPC;
    disk.fail_flush = EIO;
    for (uint32_t size : {512u, 40000u, 200000u}) {
        client.request(kCmdRead, 1, 0, size);
        const auto reply = client.reply();
        // An unwritten disk has holes, which need no reading.
        if (!structured || size < 65536) CHECK(reply.error == kWireIo);
        CHECK(reply.done());
        CHECK(client.write(0, pattern(size)) == kWireNoSpace);
    }
    CHECK(client.command(kCmdFlush, 0, 0) == kWireIo);
    disk.fail_reads = disk.fail_writes = disk.fail_flush = 0;
    CHECK(client.write(0, pattern(4096)) == 0);
    // What a failed flush did not write down stays lost.
    CHECK(client.command(kCmdFlush, 0, 0) == kWireIo);
}

TEST_CASE("nbd session: a structured READ that fails in one part says which", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 4 << 20}});
    daemon.disk().fill(256 << 10, 256 << 10, 7);
    NbdClient client(daemon.socket_path());
    client.enter("disk", true);
    daemon.disk().fail_reads = EIO;
    client.request(kCmdRead, 9, 4096, 1 << 20);
    const auto chunks = client.chunks();
    REQUIRE(chunks.size() == 1);
    CHECK(chunks[0].type == kChunkErrorOffset);
    const auto& payload = chunks[0].payload;
    REQUIRE(payload.size() >= 14);
    const size_t text = load_big<uint16_t>(&payload[4]);
    CHECK(load_big<uint32_t>(&payload[0]) == kWireIo);
    REQUIRE(payload.size() == 6 + text + 8);
    CHECK(text > 0);
    CHECK(load_big<uint64_t>(&payload[6 + text]) == 256u << 10);
    daemon.disk().fail_reads = 0;
    client.request(kCmdRead, 10, 256 << 10, 4096);
    CHECK(client.chunks().back().type == kChunkOffsetData);
}

TEST_CASE("nbd session: pipelined requests are all answered, also those before DISC", "[nbd][session]") {
    const bool fast = GENERATE(true, false);
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 4 << 20}, {"fast", fast}});
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    Bytes batch;
    constexpr unsigned kCount = 200;
    for (unsigned i = 0; i < kCount; ++i) {
        const Bytes one =
            NbdClient::request_bytes(kCmdWrite, i, i * 8192, 8192, 0, pattern(8192, static_cast<uint8_t>(i)));
        batch.insert(batch.end(), one.begin(), one.end());
    }
    const Bytes end = NbdClient::request_bytes(kCmdDisc, 0, ~0ull, ~0u, 0xffff);
    batch.insert(batch.end(), end.begin(), end.end());
    client.send(batch);
    std::vector<bool> seen(kCount);
    for (unsigned i = 0; i < kCount; ++i) {
        const auto reply = client.reply();
        REQUIRE(reply.error == 0);
        REQUIRE(reply.cookie < kCount);
        CHECK_FALSE(seen[reply.cookie]);
        seen[reply.cookie] = true;
    }
    CHECK(client.closed());
    const Bytes all = daemon.disk().contents();
    for (unsigned i = 0; i < kCount; ++i) {
        REQUIRE(std::equal(all.begin() + i * 8192, all.begin() + (i + 1) * 8192,
                           pattern(8192, static_cast<uint8_t>(i)).begin()));
    }
}

TEST_CASE("nbd session: requests that wait are bounded and all answered when the disk goes on", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 4 << 20}});
    auto& disk = daemon.disk();
    disk.hold = true;
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    Bytes batch;
    constexpr unsigned kCount = 1000;
    for (unsigned i = 0; i < kCount; ++i) {
        const Bytes one = NbdClient::request_bytes(kCmdRead, i, i * 512, 512);
        batch.insert(batch.end(), one.begin(), one.end());
    }
    client.send(batch);
    REQUIRE(daemon.eventually([&] { return disk.held == 128; }));
    disk.hold = false;
    std::vector<bool> seen(kCount);
    for (unsigned i = 0; i < kCount; ++i) {
        const auto reply = client.reply();
        REQUIRE(reply.error == 0);
        CHECK_FALSE(seen[reply.cookie]);
        seen[reply.cookie] = true;
        client.receive(512);
    }
}

TEST_CASE("nbd session: requests sent byte by byte are understood", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    const Bytes write = NbdClient::request_bytes(kCmdWrite, 1, 100, 50, 0, pattern(50));
    for (uint8_t byte : write) client.send({byte});
    CHECK(client.reply().error == 0);
    const Bytes read = NbdClient::request_bytes(kCmdRead, 2, 100, 50);
    for (uint8_t byte : read) client.send({byte});
    CHECK(client.reply().cookie == 2);
    CHECK(client.receive(50) == pattern(50));
}

TEST_CASE("nbd session: a client that stops reading stalls only itself", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 32 << 20}});
    daemon.disk().fill(0, 32 << 20, 9);
    NbdClient lazy(daemon.socket_path());
    lazy.enter("disk");
    Bytes batch;
    constexpr unsigned kCount = 100;
    for (unsigned i = 0; i < kCount; ++i) {
        const Bytes one = NbdClient::request_bytes(kCmdRead, i, 0, 1 << 20);
        batch.insert(batch.end(), one.begin(), one.end());
    }
    lazy.send(batch);
    NbdClient busy(daemon.socket_path());
    busy.enter("disk");
    for (int i = 0; i < 100; ++i) REQUIRE(busy.read(0, 4096) == Bytes(4096, 9));
    // The server did not read on and on for it: far from all hundred requests were begun.
    const json::object details = daemon.on_main([&] { return daemon.registry().find("disk")->details(); });
    uint64_t least = ~uint64_t{0};
    for (const auto& c : details.at("clients").as_array()) {
        least = std::min(least, c.as_object().at("requests").to_number<uint64_t>());
    }
    CHECK(least < 60);
    for (unsigned i = 0; i < kCount; ++i) {
        CHECK(lazy.reply().error == 0);
        REQUIRE(lazy.receive(1 << 20) == Bytes(1 << 20, 9));
    }
}

TEST_CASE("nbd session: a half-closed client gets the replies it is owed", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    daemon.disk().hold = true;
    client.request(kCmdRead, 4, 0, 512);
    client.half_close();
    REQUIRE(daemon.eventually([&disk = daemon.disk()] { return disk.held == 1; }));
    daemon.disk().hold = false;
    CHECK(client.reply().cookie == 4);
    client.receive(512);
    CHECK(client.closed());
}

TEST_CASE("nbd session: clients may vanish at any byte", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 1 << 20}, {"fast", GENERATE(true, false)}});
    Bytes talk = NbdClient::option_bytes(kOptStructuredReply);
    const auto append = [&](const Bytes& more) { talk.insert(talk.end(), more.begin(), more.end()); };
    Bytes start;
    test::put(start, uint32_t{3});
    talk.insert(talk.begin(), start.begin(), start.end());
    append(NbdClient::option_bytes(kOptSetMetaContext, test::context_payload("disk", {"base:allocation"})));
    append(NbdClient::option_bytes(kOptGo, test::info_payload("disk", {3})));
    append(NbdClient::request_bytes(kCmdRead, 1, 0, 100000));
    append(NbdClient::request_bytes(kCmdBlockStatus, 2, 0, 1 << 20));
    append(NbdClient::request_bytes(kCmdWrite, 3, 0, 60, 0, pattern(60)));
    append(NbdClient::request_bytes(kCmdWriteZeroes, 4, 8192, 4096));
    append(NbdClient::request_bytes(kCmdFlush, 5, 0, 0));
    append(NbdClient::request_bytes(kCmdDisc, 6, 0, 0));
    for (size_t cut = 0; cut <= talk.size(); ++cut) {
        NbdClient client(daemon.socket_path());
        client.send({talk.begin(), talk.begin() + static_cast<ptrdiff_t>(cut)});
        client.close();
    }
    // The same talk up to each byte, but listening to the end.
    for (size_t cut = 0; cut <= talk.size(); cut += cut < talk.size() - 40 ? 13 : 1) {
        NbdClient client(daemon.socket_path());
        client.send({talk.begin(), talk.begin() + static_cast<ptrdiff_t>(cut)});
        client.half_close();
        REQUIRE(client.ends());
    }
    NbdClient client(daemon.socket_path());
    CHECK(client.enter("disk").size == 1u << 20);
    CHECK(client.read(0, 60) == pattern(60));
    REQUIRE(daemon.eventually([&] { return daemon.server().connections() == 1; }));
}

TEST_CASE("nbd session: a client that vanishes in the middle of a request disturbs nobody", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    auto& disk = daemon.disk();
    NbdClient stays(daemon.socket_path());
    stays.enter("disk");
    disk.hold = true;
    {
        NbdClient goes(daemon.socket_path());
        goes.enter("disk");
        goes.request(kCmdWrite, 1, 0, 4096, 0, pattern(4096));
        goes.request(kCmdRead, 2, 0, 4096);
        goes.request(kCmdWrite, 3, 0, 100000, 0, pattern(5));
        REQUIRE(daemon.eventually([&] { return disk.held == 2; }));
    }
    disk.hold = false;
    CHECK(stays.write(0, pattern(512)) == 0);
    REQUIRE(daemon.eventually([&] { return daemon.server().connections() == 1; }));
}

TEST_CASE("nbd session: a writethrough export makes every write stable", "[nbd][session]") {
    NbdDaemon daemon;
    REQUIRE(daemon.start_server() == "");
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "e"}, {"node-name", "disk"}, {"writable", true}, {"writethrough", true}}) == "");
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    CHECK(client.write(0, pattern(512)) == 0);
    CHECK(daemon.disk().fua_writes + daemon.disk().flushes >= 1u);
}

TEST_CASE("nbd session: requests wait while the node is drained and go on afterwards", "[nbd][session]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"fast", GENERATE(true, false)}});
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    CHECK(client.write(0, pattern(512)) == 0);
    block::Node* node = &daemon.disk();
    daemon.call([&] { return daemon.graph().drain({&node, 1}); });
    const uint64_t before = daemon.disk().reads;
    client.request(kCmdRead, 8, 0, 512);
    NbdClient other(daemon.socket_path());
    CHECK(other.enter("disk").size == 1u << 20);  // the handshake is not held up
    CHECK(daemon.disk().reads == before);
    daemon.call([&] { return daemon.graph().undrain({&node, 1}); });
    CHECK(client.reply().cookie == 8);
    CHECK(client.receive(512) == pattern(512));
}
