// What stat(2) says.

#include <catch2/catch.hpp>

#include <sys/stat.h>

#include <boost/json/parse.hpp>
#include <ctime>
#include <thread>

#include "fuse/attributes.h"
#include "schema/value.h"

using namespace gantry;
using namespace gantry::fuse;

namespace {

int64_t mtime_of(const Attr& a) { return static_cast<int64_t>(a.mtime) * 1'000'000'000 + a.mtime_nsec; }
int64_t ctime_of(const Attr& a) { return static_cast<int64_t>(a.ctime) * 1'000'000'000 + a.ctime_nsec; }
int64_t now_ns() {
    timespec t{};
    ::clock_gettime(CLOCK_REALTIME, &t);
    return t.tv_sec * 1'000'000'000 + t.tv_nsec;
}

}  // namespace

TEST_CASE("fuse attributes: a regular file of its own", "[fuse][once]") {
    const bool writable = GENERATE(false, true);
    const int64_t before = now_ns();
    const Attributes attributes(writable, 17, 18);
    const AttrOut out = attributes.answer(1000);
    CHECK(out.attr_valid == 1);
    CHECK(out.attr.ino == 1);
    CHECK(out.attr.nlink == 1);
    CHECK(out.attr.mode == (S_IFREG | (writable ? 0600u : 0400u)));
    CHECK(out.attr.uid == 17);
    CHECK(out.attr.gid == 18);
    CHECK(out.attr.size == 1000);
    CHECK(out.attr.blksize == 4096);
    CHECK(out.attr.flags == 0);
    CHECK(mtime_of(out.attr) >= before);
    CHECK(mtime_of(out.attr) <= now_ns());
    CHECK(ctime_of(out.attr) == mtime_of(out.attr));
}

TEST_CASE("fuse attributes: blocks are what the image takes up", "[fuse][once]") {
    const auto [size, allocated, blocks] = GENERATE(table<uint64_t, int64_t, uint64_t>({
        {1 << 20, -1, 2048},  // unknown: as if all was there
        {1000, -1, 2},
        {0, -1, 0},
        {1 << 20, 0, 2048},
        {1 << 20, 4096, 8},
        {1 << 20, 1, 1},
        {1 << 20, 513, 2},
        {INT64_MAX, -1, uint64_t{1} << 54},
    }));
    Attributes attributes(true, 0, 0);
    attributes.set_allocation(allocated < 0 ? std::nullopt : std::optional<uint64_t>(allocated));
    CHECK(attributes.answer(size).attr.blocks == blocks);
    attributes.set_allocation(UINT64_MAX);
    CHECK(attributes.answer(size).attr.blocks == size / 512 + (size % 512 != 0));
}

TEST_CASE("fuse attributes: a look at the allocation ages, sooner after writes", "[fuse][once]") {
    Attributes attributes(true, 0, 0);
    CHECK(attributes.allocation_stale());
    attributes.allocation_asked();
    attributes.set_allocation(4096);
    CHECK_FALSE(attributes.allocation_stale());
    attributes.data_changed();
    const int64_t deadline = now_ns() + 10'000'000'000;
    while (!attributes.allocation_stale() && now_ns() < deadline) std::this_thread::yield();
    CHECK(attributes.allocation_stale());
}

TEST_CASE("fuse attributes: mtime is that of the data", "[fuse][once]") {
    Attributes attributes(true, 0, 0);
    const int64_t first = attributes.mtime_ns();
    CHECK(attributes.mtime_ns() == first);
    const int64_t deadline = now_ns() + 10'000'000'000;
    while (attributes.mtime_ns() == first && now_ns() < deadline) attributes.data_changed();
    const int64_t second = attributes.mtime_ns();
    CHECK(second > first);
    CHECK(second <= now_ns());
    SECTION("a resize shows whatever the clock's tick") {
        int64_t last = second;
        for (int i = 0; i < 1000; ++i) {
            attributes.data_changed_visibly();
            CHECK(attributes.mtime_ns() > last);
            last = attributes.mtime_ns();
        }
    }
    SECTION("chmod and chown change the other time") {
        attributes.set_mode(0640);
        attributes.set_uid(5);
        attributes.set_gid(6);
        attributes.status_changed();
        const Attr a = attributes.answer(0).attr;
        CHECK(mtime_of(a) == second);
        CHECK(ctime_of(a) >= second);
        CHECK(a.mode == (S_IFREG | 0640));
        CHECK(a.uid == 5);
        CHECK(a.gid == 6);
    }
    SECTION("no bit of a mode makes it another kind of file") {
        attributes.set_mode(S_IFDIR | 0177777);
        CHECK(attributes.answer(0).attr.mode == (S_IFREG | 07777));
    }
}

TEST_CASE("fuse attributes: saved and read back", "[fuse][once]") {
    Attributes before(true, 1000, 1001);
    before.set_mode(0640);
    before.status_changed();
    Attributes after(true, 0, 0);
    const json::object saved = json::parse(json::serialize(json::value(before.save()))).as_object();
    REQUIRE(after.load(saved));
    const Attr a = before.answer(5).attr, b = after.answer(5).attr;
    CHECK(a.mode == b.mode);
    CHECK(a.uid == b.uid);
    CHECK(a.gid == b.gid);
    // What was written last is not known to have been saved.
    CHECK(mtime_of(b) > mtime_of(a));

    const auto [key, value] = GENERATE(table<const char*, json::value>({
        {"mode", 010000},
        {"mode", -1},
        {"uid", -1},
        {"uid", "0"},
        {"gid", 1e12},
        {"mtime-ns", -1},
        {"ctime-ns", nullptr},
    }));
    json::object bad = saved;
    bad[key] = value;
    CHECK_FALSE(after.load(bad));
    bad.erase(key);
    CHECK_FALSE(after.load(bad));
    CHECK(after.answer(5).attr.mode == b.mode);
}
