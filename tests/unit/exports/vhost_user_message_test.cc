// The codec of vhost-user: which messages make sense.

#include <catch2/catch.hpp>

#include "exports/vhost_user/message.h"
#include "tests/support/vhost_user_front.h"

using namespace gantry;
using namespace gantry::vhost_user;
using test::wire;

namespace {

Message made(uint32_t request, std::vector<std::byte> payload, size_t fds = 0) {
    Message message;
    message.header = {request, kVersion, static_cast<uint32_t>(payload.size())};
    message.payload = std::move(payload);
    for (size_t i = 0; i < fds; ++i) message.fds.push_back(test::make_eventfd());
    return message;
}

std::string check(Message& message) {
    const RequestRule* rule = rule_of(message.header.request);
    REQUIRE(rule);
    const Result<> result = check_message(*rule, message);
    return result ? "" : result.error().message();
}

std::string check(Request request, std::vector<std::byte> payload, size_t fds = 0) {
    Message message = made(static_cast<uint32_t>(request), std::move(payload), fds);
    return check(message);
}

/// A payload of that size that contradicts nothing.
std::vector<std::byte> plain(const RequestRule& rule, size_t size) {
    std::vector<std::byte> payload(size);
    if (rule.request == Request::kSetConfig && size >= sizeof(ConfigRange)) {
        const ConfigRange range{.size = static_cast<uint32_t>(size - sizeof(ConfigRange))};
        std::memcpy(payload.data(), &range, sizeof range);
    }
    return payload;
}

}  // namespace

TEST_CASE("vhost-user message: headers that end a connection", "[vhost-user][once]") {
    CHECK(check_header({1, 1, 0}));
    CHECK(check_header({1, 1 | kNeedReply, kMaxPayload}));
    CHECK(check_header({9999, 1, 0}));
    const auto refused = [](Header header) {
        const Result<> result = check_header(header);
        REQUIRE_FALSE(result);
        return result.error().message();
    };
    CHECK_THAT(refused({1, 0, 0}), Catch::Contains("version 0"));
    CHECK_THAT(refused({1, 2, 0}), Catch::Contains("version 2"));
    CHECK_THAT(refused({1, 3, 0}), Catch::Contains("version 3"));
    CHECK_THAT(refused({1, 1 | kReplyFlag, 0}), Catch::Contains("a reply"));
    CHECK_THAT(refused({1, 1, kMaxPayload + 1}), Catch::Contains("4097 bytes"));
    CHECK_THAT(refused({1, 1, UINT32_MAX}), Catch::Contains("at most 4096"));
}

TEST_CASE("vhost-user message: every request has its sizes and its number of descriptors", "[vhost-user][once]") {
    unsigned known = 0;
    for (uint32_t number = 0; number < 64; ++number) {
        const RequestRule* rule = rule_of(number);
        if (!rule) continue;
        ++known;
        INFO(rule->name);
        CHECK(static_cast<uint32_t>(rule->request) == number);
        // Those that say themselves how many come along are looked at below.
        const bool announces = rule->request == Request::kSetMemTable || rule->request == Request::kSetVringKick ||
                               rule->request == Request::kSetVringCall || rule->request == Request::kSetVringErr;
        const size_t fds = announces ? (rule->request == Request::kSetMemTable ? 0 : 1) : rule->least_fds;
        for (const size_t size : {size_t{rule->least}, size_t{rule->most}}) {
            CHECK(check(rule->request, plain(*rule, size), fds) == "");
        }
        CHECK_THAT(check(rule->request, plain(*rule, rule->most + 1), fds), Catch::Contains("bytes of payload"));
        if (rule->least > 0) {
            CHECK_THAT(check(rule->request, plain(*rule, rule->least - 1), fds), Catch::Contains("bytes of payload"));
            CHECK_THAT(check(rule->request, {}, fds), Catch::Contains("0 bytes of payload"));
        }
        if (rule->least_fds > 0) {
            CHECK_THAT(check(rule->request, plain(*rule, rule->least), rule->least_fds - 1),
                       Catch::Contains("descriptors"));
        }
        Message many = made(number, plain(*rule, rule->least), rule->most_fds + 1);
        if (rule->most_fds > 0) {
            CHECK_THAT(check(many), Catch::Contains("descriptors"));
        } else {
            // Nobody has asked for them: they are closed, and that is all.
            CHECK(check(many) == "");
            CHECK(many.fds.empty());
        }
    }
    CHECK(known == 29);
    CHECK_FALSE(rule_of(0));
    CHECK_FALSE(rule_of(19));
    CHECK_FALSE(rule_of(UINT32_MAX));
}

TEST_CASE("vhost-user message: rings come with the descriptor that is announced", "[vhost-user][once]") {
    const Request request = GENERATE(Request::kSetVringKick, Request::kSetVringCall, Request::kSetVringErr);
    CHECK(check(request, wire(uint64_t{3}), 1) == "");
    CHECK(check(request, wire(uint64_t{3} | kNoDescriptor), 0) == "");
    CHECK_THAT(check(request, wire(uint64_t{3}), 0), Catch::Contains("queue 3 announces one descriptor"));
    CHECK_THAT(check(request, wire(uint64_t{3} | kNoDescriptor), 1), Catch::Contains("announces no descriptor"));
}

TEST_CASE("vhost-user message: memory tables", "[vhost-user][once]") {
    const auto table = [](uint32_t count, size_t regions, size_t fds) {
        std::vector<std::byte> payload = wire(MemoryTable{count, 0});
        for (size_t i = 0; i < regions; ++i) {
            const auto region = wire(MemoryRegion{i, i + 1, i + 2, i + 3});
            payload.insert(payload.end(), region.begin(), region.end());
        }
        return made(static_cast<uint32_t>(Request::kSetMemTable), std::move(payload), fds);
    };
    for (const uint32_t n : {0U, 1U, 8U}) {
        Message good = table(n, n, n);
        CHECK(check(good) == "");
        CHECK(good.fds.size() == n);
        const auto regions = table_regions(good);
        REQUIRE(regions.size() == n);
        if (n > 0) CHECK(regions.back().offset == n - 1 + 3);
    }
    Message longer = table(1, 3, 1);
    CHECK(check(longer) == "");
    CHECK(table_regions(longer).size() == 1);
    const auto refused = [&](uint32_t count, size_t regions, size_t fds) {
        Message message = table(count, regions, fds);
        return check(message);
    };
    CHECK_THAT(refused(9, 8, 8), Catch::Contains("at most 8"));
    CHECK_THAT(refused(UINT32_MAX, 1, 1), Catch::Contains("at most 8"));
    CHECK_THAT(refused(2, 1, 2), Catch::Contains("2 regions in 40 bytes"));
    CHECK_THAT(refused(2, 2, 1), Catch::Contains("2 regions and 1 descriptors"));
    CHECK_THAT(refused(1, 1, 2), Catch::Contains("1 regions and 2 descriptors"));
}

TEST_CASE("vhost-user message: configuration has the bytes that it announces", "[vhost-user][once]") {
    CHECK(check(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{1})) == "");
    CHECK_THAT(check(Request::kSetConfig, wire(ConfigRange{32, 1, 0})), Catch::Contains("announces 1 bytes and has 0"));
    CHECK_THAT(check(Request::kSetConfig, wire(ConfigRange{32, UINT32_MAX, 0}, uint8_t{1})),
               Catch::Contains("and has 1"));
}

TEST_CASE("vhost-user message: what is missing reads as zero", "[vhost-user][once]") {
    const Message message = made(31, wire(uint64_t{1}, uint64_t{2}, uint16_t{3}, uint16_t{4}));
    const auto area = message.as<InflightArea>();
    CHECK(area.size == 1);
    CHECK(area.queues == 3);
    CHECK(area.queue_size == 4);
    CHECK(area.padding == 0);
    CHECK(message.as<uint64_t>(20) == 0);
    CHECK(message.as<uint64_t>(99) == 0);
}

TEST_CASE("vhost-user message: replies carry the number of the request", "[vhost-user][once]") {
    const auto bytes = encode_reply(11, wire(VringState{1, 2}));
    CHECK(bytes == wire(Header{11, 5, 8}, VringState{1, 2}));
    CHECK(encode_reply(24, {}) == wire(Header{24, 5, 0}));
}
