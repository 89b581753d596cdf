// The small parts: wire errors, request checks, reply queue, extent lists, block sizes, ports and URIs.

#include <catch2/catch.hpp>
#include <cerrno>

#include "nbd/export.h"
#include "nbd/extent_list.h"
#include "nbd/listener.h"
#include "nbd/reply_queue.h"
#include "nbd/request_check.h"
#include "nbd/wire_error.h"

using namespace gantry;
using namespace gantry::nbd;

TEST_CASE("nbd errors: only the numbers of the protocol appear on the wire", "[nbd]") {
    for (int e = 1; e < 140; ++e) {
        for (bool fast : {false, true}) {
            const WireError wire = wire_error(e, fast);
            CAPTURE(e, fast, wire);
            const bool legal = wire == kWirePerm || wire == kWireIo || wire == kWireNoMem || wire == kWireInval ||
                               wire == kWireNoSpace || wire == kWireShutdown || (fast && wire == kWireNotSup);
            CHECK(legal);
        }
    }
    CHECK(wire_error(EROFS) == kWirePerm);
    CHECK(wire_error(EDQUOT) == kWireNoSpace);
    CHECK(wire_error(EOPNOTSUPP) == kWireInval);
    CHECK(wire_error(EOPNOTSUPP, true) == kWireNotSup);
    CHECK(wire_error(EOVERFLOW) == kWireInval);
    CHECK(wire_error(Error(ErrorKind::kCorrupt, "x")) == kWireIo);
    CHECK(wire_error(Error(ErrorKind::kUnsupported, "x")) == kWireInval);
}

TEST_CASE("nbd requests: each situation has the error of the protocol", "[nbd]") {
    constexpr uint64_t kSize = 1 << 20;
    constexpr uint64_t kFar = ~uint64_t{0} - 4095;
    struct Row {
        uint16_t command, flags;
        uint64_t offset;
        uint32_t length;
        bool read_only, structured, contexts;
        uint32_t error;
    };
    auto row = GENERATE_COPY(values<Row>({
        {kCmdRead, 0, 0, 4096, true, false, false, kWireOk},
        {kCmdRead, 0, kSize, 0, false, false, false, kWireOk},
        {kCmdRead, 0, kSize + 1, 0, false, false, false, kWireInval},
        {kCmdRead, 0, kSize - 1, 2, false, false, false, kWireInval},
        {kCmdRead, 0, kFar, 4096, false, false, false, kWireInval},
        {kCmdRead, kCmdFua, 0, 1, false, false, false, kWireOk},
        {kCmdRead, kCmdDf, 0, 1, false, false, false, kWireInval},
        {kCmdRead, kCmdDf, 0, 1, false, true, false, kWireOk},
        {kCmdRead, kCmdPayloadLen, 0, 1, false, true, false, kWireInval},
        {kCmdRead, 0x8000, 0, 1, false, true, false, kWireInval},
        {kCmdWrite, 0, kSize - 1, 2, false, false, false, kWireNoSpace},
        {kCmdWrite, 0, kFar, 4096, false, false, false, kWireNoSpace},
        {kCmdWrite, 0, 0, 1, true, false, false, kWirePerm},
        {kCmdWrite, 0, kSize, 1, true, false, false, kWirePerm},
        {kCmdWrite, kCmdDf, 0, 1, true, true, false, kWireInval},
        {kCmdWrite, kCmdFua, 0, 0, false, false, false, kWireOk},
        {kCmdWriteZeroes, kCmdNoHole | kCmdFastZero | kCmdFua, 0, kSize, false, false, false, kWireOk},
        {kCmdWriteZeroes, 0, 1, kSize, false, false, false, kWireNoSpace},
        {kCmdWriteZeroes, kCmdNoHole, 0, 1, true, false, false, kWirePerm},
        {kCmdWriteZeroes, kCmdFastZero, 0, 1, true, false, false, kWireInval},
        {kCmdTrim, 0, 0, kSize, false, false, false, kWireOk},
        {kCmdTrim, 0, 1, kSize, false, false, false, kWireInval},
        {kCmdTrim, 0, 0, 1, true, false, false, kWirePerm},
        {kCmdTrim, kCmdNoHole, 0, 1, false, false, false, kWireInval},
        {kCmdCache, 0, 0, kSize, true, false, false, kWireOk},
        {kCmdCache, 0, 1, kSize, true, false, false, kWireInval},
        {kCmdFlush, 0, kFar, 0xffffffff, true, false, false, kWireOk},
        {kCmdFlush, kCmdReqOne, 0, 0, true, false, false, kWireInval},
        {kCmdBlockStatus, 0, 0, kSize, true, true, true, kWireOk},
        {kCmdBlockStatus, kCmdReqOne, 0, 1, true, true, true, kWireOk},
        {kCmdBlockStatus, 0, 0, kSize, true, true, false, kWireInval},
        {kCmdBlockStatus, 0, 0, 0, true, true, true, kWireInval},
        {kCmdBlockStatus, 0, 1, kSize, true, true, true, kWireInval},
        {kCmdBlockStatus, kCmdPayloadLen, 0, 1, true, true, true, kWireInval},
        {kCmdResize, 0, 0, 0, false, false, false, kWireInval},
        {9, 0, 0, 0, false, false, false, kWireInval},
        {0xffff, 0xffff, kFar, 0xffffffff, false, false, false, kWireInval},
        {kCmdDisc, 0xffff, kFar, 0xffffffff, true, false, false, kWireOk},
    }));
    CAPTURE(row.command, row.flags, row.offset, row.length, row.read_only, row.structured, row.contexts);
    const RequestRules rules{
        .size = kSize, .read_only = row.read_only, .structured = row.structured, .has_contexts = row.contexts};
    const Verdict verdict = check_request({kRequestMagic, row.flags, row.command, 1, row.offset, row.length}, rules);
    CHECK(verdict.error == row.error);
    CHECK(verdict.reason.empty() == (row.error == 0));
}

TEST_CASE("nbd requests: a READ above the maximum payload is refused", "[nbd]") {
    const RequestRules rules{.size = uint64_t{1} << 40};
    CHECK(check_request({kRequestMagic, 0, kCmdRead, 1, 0, kMaxPayload}, rules).error == kWireOk);
    CHECK(check_request({kRequestMagic, 0, kCmdRead, 1, 0, kMaxPayload + 1}, rules).error == kWireInval);
    CHECK(check_request({kRequestMagic, 0, kCmdTrim, 1, 0, 0xffffffff}, rules).error == kWireOk);
}

TEST_CASE("nbd requests: with extended headers lengths have 64 bits and payloads say so", "[nbd]") {
    const RequestRules rules{.size = uint64_t{1} << 40, .structured = true, .extended = true, .has_contexts = true};
    const auto error = [&](uint16_t command, uint16_t flags, uint64_t offset, uint64_t length) {
        return check_request({kExtendedRequestMagic, flags, command, 1, offset, length}, rules).error;
    };
    for (const uint16_t command : {kCmdTrim, kCmdWriteZeroes, kCmdCache, kCmdBlockStatus}) {
        CAPTURE(command);
        CHECK(error(command, 0, 0, rules.size) == kWireOk);
        CHECK(error(command, 0, 4096, rules.size) == (command == kCmdWriteZeroes ? kWireNoSpace : kWireInval));
        CHECK(error(command, 0, rules.size, ~uint64_t{0}) == (command == kCmdWriteZeroes ? kWireNoSpace : kWireInval));
        // Cut to 32 bits it would be fine.
        CHECK(error(command, 0, 0, (uint64_t{1} << 63) + 4096) != kWireOk);
    }
    CHECK(error(kCmdRead, 0, 0, kMaxPayload + 1) == kWireOverflow);
    CHECK(error(kCmdRead, 0, 0, (uint64_t{1} << 32) + 4096) == kWireOverflow);
    CHECK(error(kCmdWrite, kCmdPayloadLen, 0, 4096) == kWireOk);
    CHECK(error(kCmdWrite, 0, 0, 4096) == kWireOk);
    CHECK(error(kCmdBlockStatus, kCmdPayloadLen, 0, 12) == kWireOk);
    for (const uint16_t command : {kCmdRead, kCmdFlush, kCmdTrim, kCmdCache, kCmdWriteZeroes, kCmdResize}) {
        CHECK(error(command, kCmdPayloadLen, 0, 0) == kWireInval);
    }
    RequestRules without = rules;
    without.has_contexts = false;
    CHECK(check_request({kExtendedRequestMagic, kCmdPayloadLen, kCmdBlockStatus, 1, 0, 12}, without).error ==
          kWireInval);
}

TEST_CASE("nbd reply queue: bytes leave in order whatever the sizes of the sends", "[nbd]") {
    const size_t step = GENERATE(1u, 7u, 1000u, 70000u, 1000000u);
    ReplyQueue queue;
    std::vector<uint8_t> expected, got;
    uint8_t next = 0;
    const auto fill = [&](uint8_t* p, size_t n) {
        for (size_t i = 0; i < n; ++i) {
            p[i] = next;
            expected.push_back(next++);
        }
    };
    const auto drain = [&](size_t limit) {
        while (!queue.empty() && limit > 0) {
            iovec iov[8];
            const size_t count = queue.gather(iov, 8);
            REQUIRE(count > 0);
            size_t left = std::min(step, limit), taken = 0;
            for (size_t i = 0; i < count && left > 0; ++i) {
                const size_t n = std::min(left, iov[i].iov_len);
                const auto* p = static_cast<const uint8_t*>(iov[i].iov_base);
                got.insert(got.end(), p, p + n);
                left -= n;
                taken += n;
            }
            queue.consume(taken);
            limit -= std::min(limit, std::max<size_t>(taken, 1));
        }
    };
    for (int round = 0; round < 40; ++round) {
        fill(queue.reserve(16), 16);
        queue.commit(16);
        fill(queue.reserve(20000), 20000);
        queue.commit(20000);
        Buffer large = Buffer::alloc(50000);
        fill(large.data(), 50000);
        const uint8_t* p = large.data();
        queue.append_ref(p, 10000);
        queue.append_owned(std::move(large), p + 10000, 40000);
        if (round % 3 == 0) drain(step < 1000 ? 3000 : 100000);
    }
    drain(~size_t{0});
    CHECK(queue.empty());
    CHECK(queue.bytes() == 0);
    CHECK(got.size() == expected.size());
    CHECK(got == expected);
}

TEST_CASE("nbd reply queue: a batch of small replies is one piece of memory", "[nbd]") {
    ReplyQueue queue;
    for (int i = 0; i < 32; ++i) {
        queue.reserve(16 + 4096);
        queue.commit(16 + 4096);
    }
    iovec iov[8];
    CHECK(queue.gather(iov, 8) == 1);
    CHECK(iov[0].iov_len == 32 * (16 + 4096));
    queue.clear();
    CHECK(queue.empty());
}

TEST_CASE("nbd extents: neighbours merge, long ones are split below 4 GiB", "[nbd]") {
    const auto at = [](ExtentList& list) {
        std::vector<std::pair<uint32_t, uint32_t>> all;
        const uint32_t n = list.count();
        Buffer memory = list.take();
        for (uint32_t i = 0; i < n; ++i) {
            all.emplace_back(load_big<uint32_t>(memory.data() + i * 8), load_big<uint32_t>(memory.data() + i * 8 + 4));
        }
        return all;
    };
    using All = std::vector<std::pair<uint32_t, uint32_t>>;
    SECTION("merging") {
        ExtentList list(8, false);
        CHECK(list.add(4096, 0));
        CHECK(list.add(4096, 0));
        CHECK(list.add(512, 3));
        CHECK(at(list) == All{{8192, 0}, {512, 3}});
    }
    SECTION("splitting") {
        ExtentList list(8, false);
        CHECK(list.add(uint64_t{10} << 30, 3));
        const auto all = at(list);
        REQUIRE(all.size() == 3);
        CHECK(all[0].first == kMaxExtentLength);
        CHECK(all[1].first == kMaxExtentLength);
        CHECK(uint64_t{all[0].first} + all[1].first + all[2].first == uint64_t{10} << 30);
    }
    SECTION("a full list says so") {
        ExtentList list(1, false);
        CHECK(list.add(4096, 0));
        CHECK(list.add(4096, 0));
        CHECK_FALSE(list.add(4096, 1));
        CHECK(at(list) == All{{8192, 0}});
    }
    SECTION("growing") {
        ExtentList list(kMaxStatusExtents, false);
        for (uint32_t i = 0; i < kMaxStatusExtents; ++i) REQUIRE(list.add(i + 1, i & 1));
        CHECK_FALSE(list.add(1, 0));
        const auto all = at(list);
        CHECK(all.size() == kMaxStatusExtents);
        CHECK(all[70000].first == 70001);
    }
}

TEST_CASE("nbd export: the minimum block divides the size, so that no tail is hidden", "[nbd]") {
    CHECK(minimum_block(1 << 20, 1) == 1);
    CHECK(minimum_block(1 << 20, 512) == 512);
    CHECK(minimum_block(1000, 512) == 8);
    CHECK(minimum_block(513, 4096) == 1);
    CHECK(minimum_block(0, 512) == 512);
    CHECK(minimum_block(uint64_t{1} << 40, 1u << 20) == 65536);
}

TEST_CASE("nbd listener: ports are numbers up to 65535 or service names", "[nbd]") {
    CHECK(port_is_number("0").value());
    CHECK(port_is_number("10809").value());
    CHECK(port_is_number("65535").value());
    CHECK_FALSE(port_is_number("nbd").value());
    for (const char* bad : {"", "65536", "99999", "4294967296", "-1", "+5"}) {
        CAPTURE(bad);
        CHECK_FALSE(port_is_number(bad).has_value());
    }
}

TEST_CASE("nbd listener: names and paths are escaped in URIs", "[nbd]") {
    CHECK(percent_encode("a/b c?&#%", "/") == "a/b%20c%3F%26%23%25");
    CHECK(percent_encode("\xc3\xa9") == "%C3%A9");
}
