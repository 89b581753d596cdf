// The handshake state machine without sockets.

#include <catch2/catch.hpp>

#include "nbd/handshake/handshake.h"
#include "nbd/handshake/payload.h"
#include "tests/support/nbd_client.h"

using namespace gantry;
using namespace gantry::nbd;
using test::Bytes;
using test::context_payload;
using test::info_payload;
using test::put;
using test::put_text;

namespace {

struct TwoExports final : ExportDirectory {
    std::optional<ExportFacts> find(std::string_view name) const override {
        if (name == "disk")
            return ExportFacts{"disk", "a disk", 1u << 20, kHasFlags | kSendFlush, 1, 4096, kMaxPayload};
        if (name == "aligned")
            return ExportFacts{"aligned", "", 1u << 20, kHasFlags | kReadOnly, 512, 4096, kMaxPayload};
        return std::nullopt;
    }
    std::vector<Listed> list() const override { return {{"disk", "a disk"}, {"aligned", ""}}; }
};

struct Reply {
    uint32_t option, type;
    Bytes payload;
    bool operator==(const Reply&) const = default;
};

/// A handshake and its last answers.
struct Talk {
    TwoExports exports;
    Handshake handshake;
    HandshakeStep step = HandshakeStep::kContinue;
    Bytes raw;

    explicit Talk(uint32_t flags = kFlagFixedNewstyle | kFlagNoZeroes, TlsMode tls = TlsMode::kNone)
        : handshake(exports, tls) {
        REQUIRE(handshake.client_flags(flags));
    }
    std::vector<Reply> say(uint32_t option, const Bytes& payload = {}) {
        raw.clear();
        step = handshake.option(option, payload, raw);
        return parse();
    }
    std::vector<Reply> parse() const {
        std::vector<Reply> all;
        for (size_t at = 0; at < raw.size();) {
            REQUIRE(raw.size() - at >= kOptionReplySize);
            REQUIRE(load_big<uint64_t>(&raw[at]) == kOptionReplyMagic);
            const auto size = load_big<uint32_t>(&raw[at + 16]);
            REQUIRE(raw.size() - at - kOptionReplySize >= size);
            const auto begin = raw.begin() + static_cast<ptrdiff_t>(at + kOptionReplySize);
            all.push_back({load_big<uint32_t>(&raw[at + 8]), load_big<uint32_t>(&raw[at + 12]), {begin, begin + size}});
            at += kOptionReplySize + size;
        }
        return all;
    }
    /// The type of the only reply.
    uint32_t one(uint32_t option, const Bytes& payload = {}) {
        const auto replies = say(option, payload);
        REQUIRE(replies.size() == 1);
        CHECK(replies[0].option == option);
        return replies[0].type;
    }
};

Bytes bytes(std::string_view text) { return {text.begin(), text.end()}; }

const Reply* info(const std::vector<Reply>& replies, uint16_t type) {
    for (const Reply& r : replies) {
        if (r.type == kRepInfo && load_big<uint16_t>(r.payload.data()) == type) return &r;
    }
    return nullptr;
}

}  // namespace

TEST_CASE("nbd handshake: unknown client flags end the connection", "[nbd][handshake]") {
    TwoExports exports;
    Handshake handshake(exports);
    CHECK(handshake.client_flags(0));
    CHECK(handshake.client_flags(3));
    CHECK_FALSE(handshake.client_flags(4));
    CHECK_FALSE(handshake.client_flags(0x80000003));
}

TEST_CASE("nbd handshake: a client without fixed newstyle may only send EXPORT_NAME", "[nbd][handshake]") {
    for (uint32_t option : {kOptList, kOptGo, kOptAbort, kOptInfo, Option(999)}) {
        Talk talk(0);
        CHECK(talk.say(option).empty());
        CHECK(talk.step == HandshakeStep::kClose);
    }
    Talk talk(0);
    talk.raw.clear();
    talk.step = talk.handshake.option(kOptExportName, bytes("disk"), talk.raw);
    CHECK(talk.step == HandshakeStep::kEnter);
    CHECK(talk.raw.size() == 134);
}

TEST_CASE("nbd handshake: EXPORT_NAME answers size and flags, and zeroes unless both sides left them out",
          "[nbd][handshake]") {
    auto [flags, size] = GENERATE(table<uint32_t, size_t>({{1, 134}, {3, 10}, {2, 10}}));
    Talk talk(flags);
    talk.step = talk.handshake.option(kOptExportName, bytes("disk"), talk.raw);
    CHECK(talk.step == HandshakeStep::kEnter);
    REQUIRE(talk.raw.size() == size);
    CHECK(load_big<uint64_t>(talk.raw.data()) == 1u << 20);
    CHECK(load_big<uint16_t>(&talk.raw[8]) == (kHasFlags | kSendFlush));
    CHECK(talk.handshake.result().export_name == "disk");
}

TEST_CASE("nbd handshake: EXPORT_NAME of an unknown or overlong name closes without a byte", "[nbd][handshake]") {
    auto name = GENERATE(std::string("nope"), std::string(), std::string(4097, 'x'), std::string("disk\0", 5));
    Talk talk;
    CHECK(talk.say(kOptExportName, bytes(name)).empty());
    CHECK(talk.step == HandshakeStep::kClose);
}

TEST_CASE("nbd handshake: ABORT is acknowledged whatever its payload", "[nbd][handshake]") {
    Talk talk;
    CHECK(talk.one(kOptAbort, bytes("bye")) == kRepAck);
    CHECK(talk.step == HandshakeStep::kClose);
}

TEST_CASE("nbd handshake: options that are unknown or not offered answer ERR_UNSUP with their own number",
          "[nbd][handshake]") {
    auto option = GENERATE(uint32_t(kOptPeekExport), 0u, 12u, 0xffffffffu);
    Talk talk;
    CHECK(talk.one(option, bytes("anything")) == kRepErrUnsup);
    CHECK(talk.step == HandshakeStep::kContinue);
    CHECK(talk.one(kOptAbort) == kRepAck);
}

TEST_CASE("nbd handshake: LIST names every export with its description", "[nbd][handshake]") {
    Talk talk;
    const auto replies = talk.say(kOptList);
    REQUIRE(replies.size() == 3);
    CHECK(replies[0].payload == Bytes{0, 0, 0, 4, 'd', 'i', 's', 'k', 'a', ' ', 'd', 'i', 's', 'k'});
    CHECK(replies[1].payload == Bytes{0, 0, 0, 7, 'a', 'l', 'i', 'g', 'n', 'e', 'd'});
    CHECK(replies[2].type == kRepAck);
    CHECK(talk.one(kOptList, bytes("x")) == kRepErrInvalid);
}

TEST_CASE("nbd handshake: STARTTLS without credentials is refused by policy", "[nbd][handshake]") {
    Talk talk;
    CHECK(talk.one(kOptStartTls) == kRepErrPolicy);
    CHECK(talk.one(kOptStartTls, bytes("x")) == kRepErrInvalid);
    CHECK(talk.say(kOptGo, info_payload("disk")).back().type == kRepAck);
}

TEST_CASE("nbd handshake: where TLS is required nothing else is told", "[nbd][handshake]") {
    Talk talk(kFlagFixedNewstyle | kFlagNoZeroes, TlsMode::kRequired);
    for (uint32_t option = 0; option < 20; ++option) {
        if (option == kOptExportName || option == kOptAbort || option == kOptStartTls) continue;
        INFO(option);
        const auto replies = talk.say(option, info_payload("disk"));
        REQUIRE(replies.size() == 1);
        CHECK(replies[0].type == kRepErrTlsRequired);
        CHECK(talk.step == HandshakeStep::kContinue);
        talk.raw.clear();
        CHECK(talk.handshake.oversized_option(option, talk.raw) == HandshakeStep::kContinue);
        CHECK(talk.parse().at(0).type == kRepErrTlsRequired);
    }
    CHECK(talk.one(kOptStartTls, bytes("x")) == kRepErrInvalid);
    CHECK(talk.step == HandshakeStep::kContinue);
    CHECK(talk.one(kOptStartTls) == kRepAck);
    CHECK(talk.step == HandshakeStep::kStartTls);
    talk.handshake.enter_tls();
    CHECK(talk.one(kOptStartTls) == kRepErrInvalid);
    CHECK(talk.step == HandshakeStep::kContinue);
    CHECK(talk.say(kOptGo, info_payload("disk")).back().type == kRepAck);
    CHECK(talk.step == HandshakeStep::kEnter);
    Talk other(kFlagFixedNewstyle, TlsMode::kRequired);
    CHECK(other.say(kOptExportName, bytes("disk")).empty());
    CHECK(other.step == HandshakeStep::kClose);
    Talk old(0, TlsMode::kRequired);
    CHECK(old.say(kOptExportName, bytes("disk")).empty());
    CHECK(old.step == HandshakeStep::kClose);
}

TEST_CASE("nbd handshake: what was negotiated in the clear is forgotten inside TLS", "[nbd][handshake]") {
    Talk talk(kFlagFixedNewstyle | kFlagNoZeroes, TlsMode::kOptional);
    CHECK(talk.one(kOptStructuredReply) == kRepAck);
    CHECK(talk.say(kOptSetMetaContext, context_payload("disk", {"base:allocation"})).back().type == kRepAck);
    CHECK(talk.one(kOptStartTls) == kRepAck);
    talk.handshake.enter_tls();
    CHECK_FALSE(talk.handshake.structured());
    CHECK(talk.say(kOptGo, info_payload("disk")).back().type == kRepAck);
    CHECK_FALSE(talk.handshake.result().structured);
    CHECK(talk.handshake.result().contexts.empty());
}

TEST_CASE("nbd handshake: INFO and GO answer the same and INFO changes nothing", "[nbd][handshake]") {
    Talk talk;
    const Bytes request = info_payload("disk", {kInfoBlockSize, kInfoName, kInfoName, 77});
    const auto about = talk.say(kOptInfo, request);
    CHECK(talk.step == HandshakeStep::kContinue);
    CHECK(about.back().type == kRepAck);
    CHECK(about.size() == 5);
    REQUIRE(info(about, kInfoExport));
    CHECK(info(about, kInfoExport)->payload.size() == 12);
    CHECK(load_big<uint64_t>(&info(about, kInfoExport)->payload[2]) == 1u << 20);
    REQUIRE(info(about, kInfoBlockSize));
    CHECK(info(about, kInfoBlockSize)->payload == Bytes{0, 3, 0, 0, 0, 1, 0, 0, 0x10, 0, 2, 0, 0, 0});
    REQUIRE(info(about, kInfoName));
    REQUIRE(info(about, kInfoDescription));
    CHECK(talk.say(kOptInfo, info_payload("nope")).back().type == kRepErrUnknown);
    auto gone = talk.say(kOptGo, request);
    CHECK(talk.step == HandshakeStep::kEnter);
    REQUIRE(gone.size() == about.size());
    for (size_t i = 0; i < gone.size(); ++i) CHECK(gone[i].payload == about[i].payload);
}

TEST_CASE("nbd handshake: GO of an unknown export is an error without information, and the session goes on",
          "[nbd][handshake]") {
    Talk talk;
    CHECK(talk.one(kOptGo, info_payload("nope")) == kRepErrUnknown);
    CHECK(talk.step == HandshakeStep::kContinue);
    CHECK(talk.say(kOptGo, info_payload("disk")).back().type == kRepAck);
}

TEST_CASE("nbd handshake: block sizes bind only who asked for them", "[nbd][handshake]") {
    Talk talk;
    const auto minimum = [](const std::vector<Reply>& replies) {
        const Reply* r = info(replies, kInfoBlockSize);
        return r ? load_big<uint32_t>(&r->payload[2]) : 0;
    };
    const auto unasked = talk.say(kOptInfo, info_payload("aligned"));
    CHECK(minimum(unasked) == 512);
    CHECK(unasked.back().type == kRepErrBlockSizeRequired);
    const auto asked = talk.say(kOptInfo, info_payload("aligned", {kInfoBlockSize}));
    CHECK(minimum(asked) == 512);
    CHECK(asked.back().type == kRepAck);
    CHECK(minimum(talk.say(kOptGo, info_payload("aligned"))) == 1);
    CHECK(minimum(talk.say(kOptGo, info_payload("aligned", {kInfoBlockSize}))) == 512);
}

TEST_CASE("nbd handshake: malformed INFO and GO payloads are refused and the session goes on", "[nbd][handshake]") {
    Bytes huge_name;
    put(huge_name, uint32_t{0xffffffff});
    put(huge_name, uint16_t{0});
    Bytes past_end = info_payload("disk");
    past_end[3] = 5;
    Bytes more = info_payload("disk");
    more.push_back(0);
    Bytes fewer = info_payload("disk", {1, 2});
    fewer.pop_back();
    Bytes count = info_payload("disk");
    count[count.size() - 1] = 1;
    for (const Bytes& payload :
         {Bytes{}, Bytes{0, 0, 0}, huge_name, past_end, more, fewer, count, info_payload(std::string(4097, 'n'))}) {
        for (uint32_t option : {kOptInfo, kOptGo}) {
            Talk talk;
            CHECK(talk.one(option, payload) == kRepErrInvalid);
            CHECK(talk.step == HandshakeStep::kContinue);
            CHECK(talk.say(kOptGo, info_payload("disk")).back().type == kRepAck);
        }
    }
}

TEST_CASE("nbd handshake: names in error texts are short, printable ASCII", "[nbd][handshake]") {
    Talk talk;
    const auto replies = talk.say(kOptGo, info_payload("\xff\xfe\n" + std::string(4000, 'a')));
    const std::string text(replies[0].payload.begin(), replies[0].payload.end());
    CHECK(text.size() < 200);
    CHECK(text.find("\\xff\\xfe\\x0a") != std::string::npos);
    for (char c : text) CHECK((c >= 0x20 && c < 0x7f));
}

TEST_CASE("nbd handshake: structured replies turn SEND_DF on and may not be asked for twice", "[nbd][handshake]") {
    Talk talk;
    const auto flags = [&] {
        return load_big<uint16_t>(&info(talk.say(kOptInfo, info_payload("disk")), kInfoExport)->payload[10]);
    };
    CHECK_FALSE(flags() & kSendDf);
    CHECK(talk.one(kOptStructuredReply, bytes("x")) == kRepErrInvalid);
    CHECK_FALSE(flags() & kSendDf);
    CHECK(talk.one(kOptStructuredReply) == kRepAck);
    CHECK(flags() & kSendDf);
    CHECK(talk.one(kOptStructuredReply) == kRepErrInvalid);
    CHECK(flags() & kSendDf);
    talk.say(kOptGo, info_payload("disk"));
    CHECK(talk.handshake.result().structured);
}

TEST_CASE("nbd handshake: LIST_META_CONTEXT lists by wildcard, each context once, with id 0", "[nbd][handshake]") {
    Talk talk;
    using Queries = std::vector<std::string>;
    auto [queries, count] = GENERATE(table<Queries, size_t>({{{}, 1},
                                                             {{"base:"}, 1},
                                                             {{"base:allocation"}, 1},
                                                             {{"base:", "base:allocation", "base:"}, 1},
                                                             {{"base:alloc"}, 0},
                                                             {{"qemu:"}, 0},
                                                             {{"base"}, 0},
                                                             {{""}, 0},
                                                             {{":"}, 0},
                                                             {{std::string(5000, 'q')}, 0}}));
    CAPTURE(queries);
    const auto replies = talk.say(kOptListMetaContext, context_payload("disk", queries));
    REQUIRE(replies.size() == count + 1);
    CHECK(replies.back().type == kRepAck);
    if (count) CHECK(load_big<uint32_t>(replies[0].payload.data()) == 0);
}

TEST_CASE("nbd handshake: SET_META_CONTEXT selects for one export and replaces what was selected", "[nbd][handshake]") {
    Talk talk;
    const Bytes allocation = context_payload("disk", {"base:allocation", "base:allocation"});
    CHECK(talk.one(kOptSetMetaContext, allocation) == kRepErrInvalid);  // not yet structured
    CHECK(talk.one(kOptStructuredReply) == kRepAck);
    const auto set = talk.say(kOptSetMetaContext, allocation);
    REQUIRE(set.size() == 2);
    CHECK(load_big<uint32_t>(set[0].payload.data()) != 0);
    const auto selected = [&](std::string_view name) {
        talk.say(kOptGo, info_payload(name, {kInfoBlockSize}));
        return talk.handshake.result().contexts.size();
    };
    SECTION("it counts for that export") { CHECK(selected("disk") == 1); }
    SECTION("it does not count for another one") { CHECK(selected("aligned") == 0); }
    SECTION("no queries select nothing") {
        CHECK(talk.one(kOptSetMetaContext, context_payload("disk", {})) == kRepAck);
        CHECK(selected("disk") == 0);
    }
    SECTION("a wildcard selects nothing") {
        CHECK(talk.one(kOptSetMetaContext, context_payload("disk", {"base:"})) == kRepAck);
        CHECK(selected("disk") == 0);
    }
    SECTION("a malformed one drops the selection") {
        Bytes bad = allocation;
        bad.push_back(0);
        CHECK(talk.one(kOptSetMetaContext, bad) == kRepErrInvalid);
        CHECK(selected("disk") == 0);
    }
    SECTION("an unknown export drops the selection") {
        CHECK(talk.one(kOptSetMetaContext, context_payload("nope", {"base:allocation"})) == kRepErrUnknown);
        CHECK(selected("disk") == 0);
    }
    SECTION("an overlong one drops the selection") {
        Bytes out;
        CHECK(talk.handshake.oversized_option(kOptSetMetaContext, out) == HandshakeStep::kContinue);
        CHECK(selected("disk") == 0);
    }
    SECTION("listing keeps it") {
        talk.say(kOptListMetaContext, context_payload("aligned", {}));
        CHECK(selected("disk") == 1);
    }
}

TEST_CASE("nbd handshake: malformed meta context payloads are refused", "[nbd][handshake]") {
    Bytes huge_count = context_payload("disk", {});
    huge_count[huge_count.size() - 4] = 0xff;
    Bytes query_past_end = context_payload("disk", {"base:"});
    query_past_end[12 + 3] = 6;
    Bytes left_over = context_payload("disk", {"base:"});
    put_text(left_over, "xyz");
    Bytes huge_name;
    put(huge_name, uint32_t{0xfffffffc});
    put(huge_name, uint32_t{0});
    for (const Bytes& payload : {Bytes{}, huge_count, query_past_end, left_over, huge_name}) {
        Talk talk;
        CHECK(talk.one(kOptListMetaContext, payload) == kRepErrInvalid);
        CHECK(talk.one(kOptAbort) == kRepAck);
    }
}

TEST_CASE("nbd handshake: overlong payloads are answered after they were skipped", "[nbd][handshake]") {
    Talk talk;
    Bytes out;
    const auto type = [&] { return load_big<uint32_t>(&out[12]); };
    CHECK(talk.handshake.oversized_option(kOptGo, out) == HandshakeStep::kContinue);
    CHECK(type() == kRepErrTooBig);
    out.clear();
    CHECK(talk.handshake.oversized_option(4711, out) == HandshakeStep::kContinue);
    CHECK(type() == kRepErrUnsup);
    out.clear();
    CHECK(talk.handshake.oversized_option(kOptAbort, out) == HandshakeStep::kClose);
    CHECK(type() == kRepAck);
    out.clear();
    CHECK(talk.handshake.oversized_option(kOptExportName, out) == HandshakeStep::kClose);
    CHECK(out.empty());
}
