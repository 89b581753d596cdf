// The log of acknowledged mappings: what a killed process leaves, and what its successor believes.

#include <catch2/catch.hpp>

#include <sys/mman.h>
#include <unistd.h>

#include <random>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/header.h"
#include "block/formats/qcow2/mapping_log.h"
#include "block/formats/qcow2/session_mark.h"

using namespace gantry;
using namespace gantry::block::qcow2;

namespace {

using Records = std::vector<MappingRecord>;

UniqueFd memory_file() { return UniqueFd(memfd_create("log", MFD_CLOEXEC)); }
UniqueFd again(const UniqueFd& fd) { return UniqueFd(dup(fd.get())); }

MappingRecord record(uint64_t i) {
    return {i % 5 == 0 ? MappingRecord::Kind::kL1 : MappingRecord::Kind::kL2, i, i * 512, ~i};
}

Records records(uint64_t first, uint64_t end) {
    Records out;
    for (uint64_t i = first; i < end; i++) out.push_back(record(i));
    return out;
}

/// What another process would replay.
Records seen_by_successor(const UniqueFd& fd) {
    MappingLog log;
    REQUIRE(log.attach(again(fd)));
    return log.records();
}

}  // namespace

TEST_CASE("qcow2: a log without a file takes everything and keeps nothing", "[qcow2][log]") {
    MappingLog log;
    CHECK_FALSE(log.attached());
    CHECK(log.append(records(0, 3)));
    log.start(1);
    log.clear_before(log.mark());
    CHECK(log.records().empty());
    CHECK(log.session() == 0);
    CHECK_FALSE(log.half_full());
}

TEST_CASE("qcow2: of each entry only the last record is replayed, and tables come before what is in them",
          "[qcow2][log]") {
    using Kind = MappingRecord::Kind;
    const Records all{{Kind::kL2, 5, 1, 0}, {Kind::kL2, 4, 2, 0}, {Kind::kL1, 5, 3, 0},
                      {Kind::kL2, 5, 4, 7}, {Kind::kL1, 5, 5, 0}, {Kind::kL2, 6, 6, 0}};
    CHECK(newest(all) == Records{all[4], all[1], all[3], all[5]});
    CHECK(newest({}).empty());
}

TEST_CASE("qcow2: the log outlives who wrote it", "[qcow2][log]") {
    const UniqueFd fd = memory_file();
    {
        MappingLog log;
        REQUIRE(log.attach(again(fd)));
        CHECK(log.session() == 0);
        CHECK(log.records().empty());
        log.start(77);
        CHECK(log.append(records(0, 3)));
        CHECK(log.append(records(3, 7)));
    }
    {
        MappingLog log;
        REQUIRE(log.attach(again(fd)));
        CHECK(log.session() == 77);
        CHECK(log.records() == records(0, 7));
        CHECK(log.records() == records(0, 7));  // reading empties nothing
        log.start(78);
        CHECK(log.records().empty());
        CHECK(log.append(records(9, 10)));
    }
    CHECK(seen_by_successor(fd) == records(9, 10));
}

TEST_CASE("qcow2: a write-back clears what came before its mark and nothing else", "[qcow2][log]") {
    const UniqueFd fd = memory_file();
    MappingLog log;
    REQUIRE(log.attach(again(fd)));
    log.start(1);
    log.append(records(0, 4));
    const uint64_t failed = log.mark();
    log.append(records(4, 6));
    CHECK(seen_by_successor(fd) == records(0, 6));
    const uint64_t mark = log.mark();  // the write-back before it failed, this one covers both
    log.append(records(6, 9));
    log.clear_before(mark);
    CHECK(seen_by_successor(fd) == records(6, 9));
    log.clear_before(failed);
    CHECK(seen_by_successor(fd) == records(6, 9));
    log.clear_before(log.mark());
    CHECK(seen_by_successor(fd).empty());
}

TEST_CASE("qcow2: a full log says so and goes on round after round", "[qcow2][log]") {
    const UniqueFd fd = memory_file();
    MappingLog log;
    REQUIRE(log.attach(again(fd)));
    log.start(5);
    const uint64_t room = MappingLog::capacity();
    REQUIRE(room > 10000);
    REQUIRE(log.append(records(0, room / 2)));
    CHECK_FALSE(log.half_full());
    REQUIRE(log.append(records(room / 2, room - 1)));
    CHECK(log.half_full());
    CHECK_FALSE(log.append(records(0, 2)));  // none of them
    CHECK(log.append(records(room - 1, room)));
    CHECK_FALSE(log.append(records(0, 1)));
    CHECK(seen_by_successor(fd) == records(0, room));
    std::mt19937_64 random(1);
    uint64_t first = 0, next = room;
    for (int round = 0; round < 200; round++) {
        const uint64_t upto = first + random() % (next - first + 1);
        // Marks are taken between appends, at any place.
        log.clear_before(log.mark() - (next - upto));
        first = upto;
        const uint64_t more = random() % (room - (next - first) + 1);
        REQUIRE(log.append(records(next, next + more)));
        next += more;
        if (round % 20 == 0) REQUIRE(seen_by_successor(fd) == records(first, next));
    }
    CHECK(seen_by_successor(fd) == records(first, next));
}

TEST_CASE("qcow2: a record that was not finished ends the log", "[qcow2][log]") {
    const UniqueFd fd = memory_file();
    MappingLog log;
    REQUIRE(log.attach(again(fd)));
    log.start(9);
    log.append(records(0, 8));
    // One flipped bit anywhere in the records: what comes before its record stays, the rest is not believed.
    constexpr off_t kHead = 64;
    const uint64_t bytes = (MappingLog::kBytes - 64) / MappingLog::capacity();
    REQUIRE(bytes < 128);
    for (uint64_t at = 0; at < 8 * bytes; at++) {
        uint8_t byte = 0;
        REQUIRE(pread(fd.get(), &byte, 1, kHead + static_cast<off_t>(at)) == 1);
        const uint8_t flipped = byte ^ 0x10;
        REQUIRE(pwrite(fd.get(), &flipped, 1, kHead + static_cast<off_t>(at)) == 1);
        const Records got = seen_by_successor(fd);
        CAPTURE(at);
        const bool padding = got == records(0, 8);
        CHECK((padding || got == records(0, at / bytes)));
        REQUIRE(pwrite(fd.get(), &byte, 1, kHead + static_cast<off_t>(at)) == 1);
    }
    CHECK(seen_by_successor(fd) == records(0, 8));
}

TEST_CASE("qcow2: a file that is no log is refused", "[qcow2][log][malformed]") {
    UniqueFd fd = memory_file();
    SECTION("of another size") { REQUIRE(ftruncate(fd.get(), 4096) == 0); }
    SECTION("of another kind") {
        REQUIRE(ftruncate(fd.get(), MappingLog::kBytes) == 0);
        REQUIRE(pwrite(fd.get(), "something", 9, 0) == 9);
    }
    SECTION("no file at all") {
        int ends[2];
        REQUIRE(pipe(ends) == 0);
        fd.reset(ends[0]);
        close(ends[1]);
    }
    MappingLog log;
    const auto attached = log.attach(std::move(fd));
    REQUIRE_FALSE(attached);
    CHECK(attached.error().kind() == ErrorKind::kInvalid);
    CHECK_FALSE(log.attached());
}

// ---- The session's mark in the header ----

namespace {

struct HeaderBytes {
    std::vector<uint8_t> bytes = std::vector<uint8_t>(4096);
    uint64_t at = kHeaderBytesKnown;

    HeaderBytes() {
        store_be32(bytes.data(), kMagic);
        store_be32(bytes.data() + 4, 3);
        store_be32(bytes.data() + 20, 12);
        store_be32(bytes.data() + 96, 4);
        store_be32(bytes.data() + 100, kHeaderBytesKnown);
    }
    HeaderBytes& extension(uint32_t type, uint32_t length, uint8_t fill) {
        store_be32(bytes.data() + at, type);
        store_be32(bytes.data() + at + 4, length);
        std::fill_n(bytes.data() + at + 8, length, fill);
        at += 8 + ((length + 7) & ~7u);
        return *this;
    }
    /// A backing file name behind the end mark.
    HeaderBytes& name(std::string_view text, uint64_t where) {
        store_be64(bytes.data() + 8, where);
        store_be32(bytes.data() + 16, static_cast<uint32_t>(text.size()));
        std::copy(text.begin(), text.end(), bytes.begin() + static_cast<ptrdiff_t>(where));
        return *this;
    }
    static Header header(std::span<const uint8_t> bytes) {
        auto h = parse_header(bytes, "q");
        REQUIRE(h);
        return *h;
    }
    static Extensions extensions(std::span<const uint8_t> bytes) {
        const Header h = header(bytes);
        auto e = parse_extensions(h, bytes.subspan(h.header_length, h.extensions_end() - h.header_length), "q");
        INFO((e ? "" : e.error().message()));
        REQUIRE(e);
        return *e;
    }
};

}  // namespace

TEST_CASE("qcow2: the session's mark moves nothing else in the header", "[qcow2][session]") {
    HeaderBytes h;
    bool room = true, loses_a_row = false;
    SECTION("an empty list") {}
    SECTION("behind others, up to the name") {
        h.extension(kExtensionBackingFormat, 5, 'q').extension(0x12345678, 300, 7);
        h.name("base.qcow2", h.at + 24 + GENERATE(0u, 8u, 64u));
    }
    SECTION("over its own of before") {
        h.extension(kExtensionSession, 16, 0xee).extension(0x12345678, 20, 7);
        h.name("base.qcow2", h.at + 8);
    }
    SECTION("in the place of a feature's name") {
        h.extension(kExtensionBackingFormat, GENERATE(5u, 12u), 'q').extension(kExtensionFeatureTable, 384, 0);
        h.name("base.qcow2", h.at + 8);
        loses_a_row = true;
    }
    SECTION("nowhere") {
        h.extension(kExtensionFeatureTable, 384, 0).extension(0x12345678, 20, 7);
        h.name("base.qcow2", h.at + 8);
        room = false;
    }
    const std::vector<uint8_t> before = h.bytes;
    std::vector<uint8_t> after = before;
    const SessionExtension mark{0x1122334455667788, kSessionOpen};
    REQUIRE(put_session(after, HeaderBytes::header(before), mark) == room);
    if (!room) {
        CHECK(after == before);
        return;
    }
    const Extensions old = HeaderBytes::extensions(before), now = HeaderBytes::extensions(after);
    REQUIRE(now.session);
    CHECK(now.session->session == mark.session);
    CHECK(now.session->flags == kSessionOpen);
    CHECK(now.backing_format == old.backing_format);
    REQUIRE(now.unknown.size() == old.unknown.size());
    if (!old.unknown.empty()) CHECK(now.unknown[0].data == old.unknown[0].data);
    CHECK(now.features.size() + (loses_a_row ? 1 : 0) == old.features.size());
    const uint64_t name = HeaderBytes::header(before).backing_file_offset;
    if (name)
        CHECK(std::equal(before.begin() + static_cast<ptrdiff_t>(name), before.end(),
                         after.begin() + static_cast<ptrdiff_t>(name)));

    // A power cut between sectors, the last one first.
    std::vector<uint8_t> cut = before;
    for (size_t at = cut.size(); at != 0;) {
        at -= 512;
        std::copy_n(after.begin() + static_cast<ptrdiff_t>(at), 512, cut.begin() + static_cast<ptrdiff_t>(at));
        const Extensions between = HeaderBytes::extensions(cut);
        CHECK(between.backing_format == old.backing_format);
        CHECK(between.unknown.size() == old.unknown.size());
        CHECK((between.session.has_value() == old.session.has_value() || between.session->session == mark.session));
    }
    CHECK(cut == after);
}
