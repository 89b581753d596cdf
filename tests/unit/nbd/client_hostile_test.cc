// The client node and servers that lie: nothing but an error comes of it. Names of CVEs say which bug of another client
// a case would find here (spec/nbd.md section 15).

#include <catch2/catch.hpp>

#include "tests/unit/nbd/client_fixture.h"

using namespace gantry;
using namespace gantry::test;
using Catch::Matchers::Contains;

namespace {

constexpr const char* kBroken = "the server breaks the NBD protocol: ";

/// Serves one READ (or whatever comes first) by `answer`, then nothing.
NbdScriptServer::Script once(ScriptExport offer, std::function<void(ScriptPeer&, const ScriptPeer::Request&)> answer) {
    return [offer, answer](ScriptPeer& peer, int) {
        peer.negotiate(offer);
        answer(peer, peer.request());
        peer.wait_for_end();
    };
}

/// The error of a READ of 4096 bytes at 8192.
std::string read_error(const ScriptExport& offer, std::function<void(ScriptPeer&, const ScriptPeer::Request&)> answer) {
    ClientFixture f(once(offer, std::move(answer)));
    REQUIRE(f.open() == "");
    std::string error = f.read(8192, 4096);
    // The connection is given up for good: the next request is not sent.
    if (error.find(kBroken) != std::string::npos) {
        CHECK_THAT(f.read(0, 4096), Contains(kBroken));
        CHECK(f.server->connections() == 1);
    }
    return error;
}

}  // namespace

TEST_CASE("nbd client: chunks outside of the request are refused (libnbd 2019)", "[nbd][client]") {
    const bool extended = GENERATE(false, true);
    const auto at = [&](uint64_t offset, size_t length) {
        return read_error({.extended = extended}, [=](ScriptPeer& peer, const ScriptPeer::Request& rq) {
            peer.send(peer.chunk(rq, 1, nbd::kChunkOffsetData, ScriptPeer::data_payload(offset, length, 1)));
        });
    };
    for (const auto& [offset, length] : std::vector<std::pair<uint64_t, size_t>>{
             {8191, 4096}, {8193, 4096}, {0, 1}, {12288, 1}, {UINT64_MAX, 1}, {UINT64_MAX - 4095, 4096}, {12287, 2}}) {
        CAPTURE(offset, length);
        CHECK_THAT(at(offset, length), Contains("to a READ of 4096 bytes at 8192"));
    }
    CHECK_THAT(at(8192, 4097), Contains("a chunk of 4105 bytes answers a READ of 4096"));
    CHECK_THAT(at(8192, 0), Contains("a chunk of 8 bytes answers a READ"));
}

TEST_CASE("nbd client: holes outside of the request are refused", "[nbd][client]") {
    const auto at = [&](uint64_t offset, uint32_t length) {
        return read_error({}, [=](ScriptPeer& peer, const ScriptPeer::Request& rq) {
            peer.send(peer.chunk(rq, 1, nbd::kChunkOffsetHole, ScriptPeer::hole_payload(offset, length)));
        });
    };
    CHECK_THAT(at(8192, UINT32_MAX), Contains("it answers 4294967295 bytes at 8192"));
    CHECK_THAT(at(0, 4096), Contains("it answers 4096 bytes at 0"));
    CHECK_THAT(at(8192, 0), Contains("a chunk of an answer is empty"));
    CHECK_THAT(at(UINT64_MAX, 4096), Contains("to a READ of 4096 bytes at 8192"));
}

TEST_CASE("nbd client: what chunks overlap or leave out is no answer", "[nbd][client]") {
    const auto with = [&](std::vector<std::pair<uint64_t, uint32_t>> holes) {
        return read_error({}, [=](ScriptPeer& peer, const ScriptPeer::Request& rq) {
            for (const auto& [offset, length] : holes) {
                peer.send(peer.chunk(rq, 0, nbd::kChunkOffsetHole, ScriptPeer::hole_payload(offset, length)));
            }
            peer.send(peer.chunk(rq, 1, nbd::kChunkNone, {}));
        });
    };
    CHECK(with({{8192, 4096}}) == "");
    CHECK(with({{10240, 2048}, {8192, 2048}}) == "");
    CHECK(with({{9216, 1024}, {11264, 1024}, {8192, 1024}, {10240, 1024}}) == "");
    CHECK_THAT(with({{8192, 2048}, {10239, 2049}}), Contains("twice"));
    CHECK_THAT(with({{10240, 2048}, {8192, 2049}}), Contains("twice"));
    CHECK_THAT(with({{8192, 4096}, {8192, 1}}), Contains("twice"));
    CHECK_THAT(with({{8192, 4095}}), Contains("lacks some of them"));
    CHECK_THAT(with({{8193, 4095}}), Contains("lacks some of them"));
    CHECK_THAT(with({}), Contains("lacks some of them"));
}

TEST_CASE("nbd client: an answer in endless little pieces is cut short", "[nbd][client]") {
    ClientFixture f(once({}, [](ScriptPeer& peer, const ScriptPeer::Request& rq) {
        for (uint64_t at = 0; at + 2 < rq.length; at += 2) {
            peer.send(peer.chunk(rq, 0, nbd::kChunkOffsetHole, ScriptPeer::hole_payload(rq.offset + at + 1, 1)));
        }
    }));
    REQUIRE(f.open() == "");
    CHECK_THAT(f.read(0, 64 << 10), Contains("in more than 8192 separate pieces"));
}

TEST_CASE("nbd client: answers to nothing are refused", "[nbd][client]") {
    const bool structured = GENERATE(false, true);
    CHECK_THAT(read_error({.structured = structured},
                          [](ScriptPeer& peer, const ScriptPeer::Request& rq) {
                              peer.send(ScriptPeer::simple(rq.cookie + 1, 5));
                          }),
               Contains("it answers a request that was not sent"));
    CHECK_THAT(
        read_error({.structured = structured},
                   [](ScriptPeer& peer, const ScriptPeer::Request&) { peer.send(ScriptPeer::simple(UINT64_MAX, 0)); }),
        Contains("it answers a request that was not sent"));
}

TEST_CASE("nbd client: one answer is not given twice", "[nbd][client]") {
    ClientFixture f(once({.structured = false}, [](ScriptPeer& peer, const ScriptPeer::Request& rq) {
        Wire twice = ScriptPeer::simple(rq.cookie, 5);
        const Wire second = twice;
        twice.insert(twice.end(), second.begin(), second.end());
        peer.send(twice);
        peer.wait_for_end();
    }));
    REQUIRE(f.open() == "");
    CHECK_THAT(f.read(0, 4096), Contains("Input/output error"));
    CHECK_THAT(f.read(0, 4096), Contains("a request that was not sent"));
}

TEST_CASE("nbd client: replies of a kind that was not negotiated are refused", "[nbd][client]") {
    const Wire nothing;
    CHECK_THAT(read_error({.structured = false},
                          [](ScriptPeer& peer, const ScriptPeer::Request& rq) {
                              Wire out;
                              append(out, nbd::kStructuredReplyMagic);
                              append(out, uint32_t{0x00010001});
                              append(out, rq.cookie);
                              append(out, uint32_t{0});
                              peer.send(out);
                          }),
               Contains("begins with the magic number 0x668e33ef"));
    CHECK_THAT(read_error({.extended = true},
                          [](ScriptPeer& peer, const ScriptPeer::Request& rq) {
                              peer.send(ScriptPeer::simple(rq.cookie, 0));
                          }),
               Contains("begins with the magic number 0x67446698"));
    CHECK_THAT(
        read_error({}, [](ScriptPeer& peer,
                          const ScriptPeer::Request& rq) { peer.send(ScriptPeer::simple(rq.cookie, 0, Wire(4096))); }),
        Contains("with a simple reply after STRUCTURED_REPLY"));
    CHECK_THAT(read_error({}, [](ScriptPeer& peer, const ScriptPeer::Request&) { peer.send(Wire(20, 0)); }),
               Contains("begins with the magic number 0x00000000"));
}

TEST_CASE("nbd client: chunks that make no sense are refused", "[nbd][client]") {
    const auto with = [](uint16_t flags, uint16_t type, Wire payload) {
        return read_error({}, [=](ScriptPeer& peer, const ScriptPeer::Request& rq) {
            peer.send(peer.chunk(rq, flags, type, payload));
        });
    };
    CHECK_THAT(with(2, nbd::kChunkOffsetData, ScriptPeer::data_payload(8192, 4096, 1)), Contains("has the flags 0x2"));
    CHECK_THAT(with(1, 3, Wire(8)), Contains("with a chunk of type 3"));
    CHECK_THAT(with(1, nbd::kChunkBlockStatus, Wire(12)), Contains("answers READ with a chunk of type 5"));
    CHECK_THAT(with(0, nbd::kChunkNone, {}), Contains("an empty chunk is not the last one"));
    CHECK_THAT(with(1, nbd::kChunkNone, Wire(1)), Contains("an empty chunk has 1 bytes"));
    CHECK_THAT(with(1, nbd::kChunkOffsetHole, Wire(11)), Contains("the description of a hole has 11 bytes"));
    CHECK_THAT(with(1, nbd::kChunkError, Wire(5)), Contains("an error of 5 bytes"));
    CHECK_THAT(with(1, nbd::kChunkError, Wire(5000)), Contains("an error of 5000 bytes"));
    CHECK_THAT(with(1, nbd::kChunkError, ScriptPeer::error_payload(0, "x")), Contains("an error is none"));
    Wire lying = ScriptPeer::error_payload(5, "text");
    lying[5] = 200;
    CHECK_THAT(with(1, nbd::kChunkError, lying), Contains("has a text of 200"));
    Wire outside = ScriptPeer::error_payload(5, "");
    append(outside, uint64_t{12289});
    CHECK_THAT(with(1, nbd::kChunkErrorOffset, outside), Contains("an error at 12289"));

    // An error of an unknown kind, as long as it may be, and longer.
    Wire longest = ScriptPeer::error_payload(nbd::kWireIo, std::string(4096, 'y'));
    longest.resize(4096 + 6 + 64);
    CHECK_THAT(with(1, 0x80ff, longest), Contains("Input/output error (it says: yyy"));
    longest.push_back(0);
    CHECK_THAT(with(1, 0x80ff, longest), Contains("an error of 4167 bytes"));
}

TEST_CASE("nbd client: errors arrive with their reason, and the connection lives on (nbdcopy CVE-2022-0485)",
          "[nbd][client]") {
    const bool extended = GENERATE(false, true);
    ClientFixture f([extended](ScriptPeer& peer, int) {
        peer.negotiate({.extended = extended});
        peer.fail(peer.request(), nbd::kWireNoSpace, "the tank\n is full");
        const ScriptPeer::Request poisoned = peer.request();
        peer.send(peer.chunk(poisoned, 0, nbd::kChunkOffsetData, ScriptPeer::data_payload(0, 4096, 1)));
        peer.send(peer.chunk(poisoned, 1, nbd::kChunkError, ScriptPeer::error_payload(nbd::kWireIo, "")));
        peer.fail(peer.request(), 4711);
        peer.send(peer.chunk(peer.request(), 1, 0x80ff, ScriptPeer::error_payload(nbd::kWirePerm, "of a new kind")));
        peer.serve();
    });
    REQUIRE(f.open() == "");
    CHECK_THAT(f.write(0, 4096), Contains("answers WRITE of 4096 bytes at 0: No space left on device (it says: the "
                                          "tank? is full)"));
    CHECK_THAT(f.read(0, 4096), Contains("Input/output error"));
    CHECK_THAT(f.read(0, 4096), Contains("Invalid argument"));
    CHECK_THAT(f.read(0, 4096), Contains("Operation not permitted (it says: of a new kind)"));
    Bytes data;
    CHECK(f.read(0, 4096, &data) == "");
    CHECK(data == Bytes(4096, 0x5a));
}

TEST_CASE("nbd client: block status is believed only as far as it can be true (libnbd CVE-2023-5871)",
          "[nbd][client]") {
    const bool extended = GENERATE(false, true);
    const auto with = [&](std::function<Wire(const ScriptPeer&)> payload) {
        ClientFixture f(once({.extended = extended}, [=](ScriptPeer& peer, const ScriptPeer::Request& rq) {
            CHECK(rq.flags == nbd::kCmdReqOne);
            peer.send(peer.chunk(rq, 1, extended ? nbd::kChunkBlockStatusExt : nbd::kChunkBlockStatus, payload(peer)));
        }));
        REQUIRE(f.open() == "");
        auto status = f.status(0, 1 << 20);
        return status ? fmt::format("{} {} {}", status->length, status->data, status->zero) : status.error().message();
    };
    using Extents = std::vector<std::pair<uint64_t, uint64_t>>;
    const auto extents = [&](Extents list, uint32_t context = 7) {
        return with([=](const ScriptPeer& peer) { return peer.status_payload(list, context); });
    };
    CHECK(extents({{65536, 0}}) == "65536 true false");
    CHECK(extents({{65536, 3}}) == "65536 false true");
    CHECK(extents({{65536, 1}}) == "65536 false false");
    CHECK(extents({{65536, 2}, {65536, 0}, {1, 3}}) == "65536 true true");  // more than was asked for
    CHECK(extents({{0xffff0000, 3}}) == "1048576 false true");              // beyond the request
    CHECK_THAT(extents({{0, 0}}), Contains("an extent of a block status is empty"));
    CHECK_THAT(extents({{4096, 0}}, 8), Contains("a block status of the unknown context 8"));
    CHECK_THAT(extents({}), Contains("a block status of"));
    CHECK_THAT(with([&](const ScriptPeer& peer) {
                   Wire odd = peer.status_payload({{4096, 0}});
                   odd.push_back(0);
                   return odd;
               }),
               Contains("a block status of"));
    if (extended) {
        CHECK(extents({{uint64_t{1} << 60, 3}}) == "1048576 false true");
        CHECK_THAT(with([&](const ScriptPeer& peer) {
                       Wire lying = peer.status_payload({{4096, 0}});
                       lying[7] = 2;
                       return lying;
                   }),
                   Contains("a block status of 2 extents"));
    }
}

TEST_CASE("nbd client: many extents come in one answer, and the last one is cut", "[nbd][client]") {
    const bool extended = GENERATE(false, true);
    ClientFixture f(
        once({.extended = extended, .block_sizes = {512, 4096, 1 << 25}},
             [=](ScriptPeer& peer, const ScriptPeer::Request& rq) {
                 CHECK(rq.flags == 0);
                 peer.send(peer.chunk(rq, 1, extended ? nbd::kChunkBlockStatusExt : nbd::kChunkBlockStatus,
                                      peer.status_payload({{4096, 0}, {8192, 3}, {512, 1}, {700, 2}, {1 << 20, 3}})));
             }));
    REQUIRE(f.open() == "");
    const auto ask = [](block::Node* node, std::vector<block::BlockStatus>* out) -> Task<Result<size_t>> {
        block::Request rq = block::Request::internal();
        auto count = co_await node->block_statuses(rq, 0, 1 << 20, *out);
        co_return count;
    };
    std::vector<block::BlockStatus> out(100);
    auto count = f.runtime.run_on_io(ask(&f.node("n"), &out));
    REQUIRE(count);
    std::string text;
    for (size_t i = 0; i < *count; ++i) {
        text += fmt::format("{}+{}:{}{} ", out[i].host_offset, out[i].length, out[i].data, out[i].zero);
    }
    // What does not end with a block is cut there, and is the last.
    CHECK(text == "0+4096:truefalse 4096+8192:falsetrue 12288+512:falsefalse 12800+512:truetrue ");
}

TEST_CASE("nbd client: a block status without the context, or with it twice, is refused", "[nbd][client]") {
    const int times = GENERATE(0, 2);
    ClientFixture f(once({}, [times](ScriptPeer& peer, const ScriptPeer::Request& rq) {
        for (int i = 0; i < times; ++i) {
            peer.send(peer.chunk(rq, 0, nbd::kChunkBlockStatus, peer.status_payload({{4096, 0}})));
        }
        peer.send(peer.chunk(rq, 1, nbd::kChunkNone, {}));
    }));
    REQUIRE(f.open() == "");
    auto status = f.status(0, 1 << 20);
    REQUIRE_FALSE(status);
    CHECK_THAT(status.error().message(), Contains(times == 0 ? "lacks the context" : "two block statuses"));
}

TEST_CASE("nbd client: a lie on one of several connections ends the use of all", "[nbd][client]") {
    std::atomic<int> up{0};
    ClientFixture f([&up](ScriptPeer& peer, int) {
        peer.negotiate({.flags = nbd::kHasFlags | nbd::kCanMultiConn});
        ++up;
        const auto rq = peer.request();
        peer.send(peer.chunk(rq, 1, 99, {}));
        peer.serve();
    });
    REQUIRE(f.open(", 'multi-conn': 3") == "");
    CHECK(f.run(wait_until([&] { return up == 3; })));
    CHECK_THAT(f.read(0, 512), Contains("with a chunk of type 99"));
    CHECK_THAT(f.read(0, 512), Contains("is used any more") && Contains("with a chunk of type 99"));
    CHECK(f.server->connections() == 3);
}

TEST_CASE("nbd client: several connections are made again only where a flush is for all of them",
          "[nbd][client][reconnect][once]") {
    const bool several = GENERATE(false, true);
    std::atomic<int> up{0};
    ClientFixture f([&, several](ScriptPeer& peer, int number) {
        const int first = several ? 2 : 1;
        constexpr uint16_t kFlags = nbd::kHasFlags | nbd::kSendFlush;
        peer.negotiate({.flags = static_cast<uint16_t>(number < first ? kFlags | nbd::kCanMultiConn : kFlags)});
        ++up;
        if (number < first) {
            peer.request();
            return;
        }
        peer.serve();
    });
    REQUIRE(f.open(std::string(", 'reconnect-delay': 1, 'multi-conn': ") + (several ? "2" : "1")) == "");
    CHECK(f.run(wait_until([&] { return up == (several ? 2 : 1); })));
    const std::string error = f.read(0, 512);
    if (several) {
        CHECK_THAT(error, Contains("the server has no CAN_MULTI_CONN any more"));
    } else {
        CHECK(error == "");
    }
}

// ---- Negotiation ----

namespace {

std::string open_error(NbdScriptServer::Script script, const std::string& more = "") {
    ClientFixture f(std::move(script));
    return f.open(more);
}

/// Goes along until GO, then does as told.
NbdScriptServer::Script at_go(std::function<void(ScriptPeer&)> then) {
    return [then](ScriptPeer& peer, int) {
        peer.greet();
        for (;;) {
            const auto asked = peer.option();
            if (asked.number == nbd::kOptGo) break;
            peer.reply(asked.number, nbd::kRepErrUnsup);
        }
        then(peer);
        peer.wait_for_end();
    };
}

}  // namespace

TEST_CASE("nbd client: sizes that look negative are refused (libnbd CVE-2023-5215)", "[nbd][client]") {
    const uint64_t size = GENERATE(uint64_t{1} << 63, UINT64_MAX, static_cast<uint64_t>(INT64_MAX));
    CHECK_THAT(open_error([size](ScriptPeer& peer, int) {
                   peer.negotiate({.size = size});
                   peer.wait_for_end();
               }),
               Contains(fmt::format("the export has {} bytes, more than", size)));
}

TEST_CASE("nbd client: lengths of a server are checked before memory is taken (QEMU CVE-2017-2630)", "[nbd][client]") {
    const uint32_t length = GENERATE(65537u, 0x7fffffffu, 0xffffffffu);
    CHECK_THAT(open_error(at_go([length](ScriptPeer& peer) {
                   Wire out;
                   append(out, nbd::kOptionReplyMagic);
                   append(out, uint32_t{nbd::kOptGo});
                   append(out, uint32_t{nbd::kRepErrPolicy});
                   append(out, length);
                   peer.send(out);
               })),
               Contains(fmt::format("its answer to GO has {} bytes", length)));
}

TEST_CASE("nbd client: repeated and strange answers to GO change nothing (libnbd CVE-2021-20286)", "[nbd][client]") {
    ClientFixture f([](ScriptPeer& peer, int) {
        peer.greet();
        for (;;) {
            const auto asked = peer.option();
            if (asked.number == nbd::kOptGo) break;
            peer.reply(asked.number, nbd::kRepErrUnsup);
        }
        peer.reply(nbd::kOptGo, nbd::kRepInfo, ScriptPeer::export_info(5, 1));
        Wire unknown;
        append(unknown, uint16_t{99});
        peer.reply(nbd::kOptGo, nbd::kRepInfo, unknown);
        peer.reply(nbd::kOptGo, nbd::kRepInfo, ScriptPeer::export_info(1 << 20, 1));
        peer.reply(nbd::kOptGo, nbd::kRepAck);
        peer.serve();
    });
    CHECK(f.open() == "");
    CHECK(f.node("n").size() == 1 << 20);
}

TEST_CASE("nbd client: TLS that was asked for is not given up (libnbd CVE-2019-14842)", "[nbd][client]") {
    // The object is needed to ask at all; that it is required is what the option says.
    CHECK(open_error([](ScriptPeer& peer, int) { peer.negotiate(); }, ", 'tls-creds': 'none'") != "");
    CHECK_THAT(open_error([](ScriptPeer& peer, int) { peer.negotiate(); }, ", 'tls-hostname': 'x'"),
               Contains("tls-hostname needs tls-creds"));
}

TEST_CASE("nbd client: each refusal has its sentence", "[nbd][client]") {
    struct Row {
        NbdScriptServer::Script script;
        const char* text;
    };
    const auto bytes = [](Wire out) {
        return [out](ScriptPeer& peer, int) {
            peer.send(out);
            peer.wait_for_end();
        };
    };
    Wire oldstyle, other, strange;
    append(oldstyle, nbd::kNbdMagic);
    append(oldstyle, uint64_t{0x0000420281861253});
    append(strange, nbd::kNbdMagic);
    append(strange, uint64_t{1});
    other.resize(18, 'x');
    const auto info = [](Wire payload) {
        return at_go([payload](ScriptPeer& peer) { peer.reply(nbd::kOptGo, nbd::kRepInfo, payload); });
    };
    const auto refusal = [](uint32_t type, std::string text) {
        return at_go([=](ScriptPeer& peer) { peer.reply(nbd::kOptGo, type, Wire(text.begin(), text.end())); });
    };
    const auto sizes = [](std::vector<uint32_t> list) {
        return [list](ScriptPeer& peer, int) {
            peer.negotiate({.block_sizes = list});
            peer.wait_for_end();
        };
    };
    const std::vector<Row> rows = {
        {bytes(oldstyle), "the server speaks the oldstyle protocol"},
        {bytes(other), "what answers there is not an NBD server"},
        {bytes(strange), "its greeting has the magic number 0x1"},
        {[](ScriptPeer&, int) {}, "the server closed the connection while it was to greet"},
        {info({}), "an information about the export has no type"},
        {info(Wire(11)), "the size of the export comes in 11 bytes"},
        {info({0, 3, 0}), "the block sizes come in 3 bytes"},
        {at_go([](ScriptPeer& peer) { peer.reply(nbd::kOptGo, nbd::kRepAck); }), "without the size of the export"},
        {at_go([](ScriptPeer& peer) { peer.reply(nbd::kOptGo, 77); }), "its answer to GO is of type 77"},
        {at_go([](ScriptPeer& peer) { peer.reply(nbd::kOptList, nbd::kRepAck); }), "it answers option 3"},
        {refusal(nbd::kRepErrUnknown, "none here"),
         "Requested export not available; the server has no export '' (it says: none here)"},
        {refusal(nbd::kRepErrTlsRequired, ""), "the server refuses GO: it requires TLS; give this node tls-creds"},
        {refusal(nbd::kRepErrPolicy,
                 "go\x01"
                 "away"),
         "its policy forbids it (it says: go?away)"},
        {refusal(nbd::kRepErrShutdown, ""), "it is shutting down"},
        {sizes({3, 4096, 65536}), "3 is not a minimum block size"},
        {sizes({131072, 131072, 1 << 20}), "131072 is not a minimum block size"},
        {sizes({0, 4096, 65536}), "0 is not a minimum block size"},
        {sizes({4096, 512, 65536}), "512 is not a preferred block size"},
        {sizes({4096, 4096, 512}), "its largest request, 512, is smaller"},
        {[](ScriptPeer& peer, int) {
             peer.negotiate({.size = (1 << 20) + 100, .block_sizes = {4096, 4096, 65536}});
             peer.wait_for_end();
         },
         "export length 1048676 is not multiple of minimum block size 4096"},
    };
    for (const Row& row : rows) {
        INFO(row.text);
        const std::string error = open_error(row.script);
        CHECK_THAT(error, Contains(row.text) && Contains("NBD server '/"));
    }
    CHECK_THAT(open_error(
                   [](ScriptPeer& peer, int) {
                       peer.negotiate({.context = false});
                       peer.wait_for_end();
                   },
                   ", 'x-dirty-bitmap': 'qemu:dirty-bitmap:b'"),
               Contains("requested x-dirty-bitmap qemu:dirty-bitmap:b not found"));
    CHECK_THAT(open_error([](ScriptPeer& peer, int) {
                   peer.negotiate({.flags = nbd::kHasFlags | nbd::kReadOnly});
                   peer.wait_for_end();
               }),
               Contains("is read-only; open the node with read-only=on"));
    CHECK_THAT(open_error([](ScriptPeer&, int) {}, ", 'multi-conn': 17"), Contains("multi-conn is 17"));
    CHECK_THAT(open_error([](ScriptPeer&, int) {}, ", 'export': '" + std::string(4097, 'x') + "'"),
               Contains("export name too long"));
}
