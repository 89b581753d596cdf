#include "block/bitmap_control.h"

#include <catch2/catch.hpp>

#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;

namespace {

struct Fixture : GraphFixture {
    Fixture() {
        REQUIRE(add("{'driver':'null-co','node-name':'n','size':1048576,'read-zeroes':true}") == "");
        REQUIRE(add("{'driver':'null-co','node-name':'m','size':2097152,'read-zeroes':true}") == "");
    }
    std::string add_bitmap(BitmapSpec spec) { return text_of(run(block::add_bitmap(*graph, std::move(spec)))); }
    std::string remove_bitmap(BitmapRef ref) { return text_of(run(block::remove_bitmap(*graph, std::move(ref)))); }
    DirtyBitmap& bitmap(const std::string& node, const std::string& name) {
        return *lookup_bitmap(*graph, {.node = node, .name = name}).value();
    }
};

/// As exports write: inline when the node allows it.
Task<Result<>> write_channel(Channel* channel, uint64_t offset, std::vector<uint8_t> data) {
    const iovec one{data.data(), data.size()};
    if (channel->try_write(offset, IoVec(one), WriteFlags::kNone) == 0) co_return Result<>();
    co_return co_await channel->write(offset, IoVec(one), WriteFlags::kNone);
}

struct Undo {
    static Task<void> abort(BitmapChange* change) {
        change->abort();
        co_return;
    }
    static Task<Result<>> commit(BitmapChange* change) { return change->commit(); }
};

}  // namespace

TEST_CASE("bitmap: bad names, nodes and granularities are refused", "[block][bitmap]") {
    Fixture f;
    CHECK(f.add_bitmap({.node = "n", .name = ""}) == "Bitmap name cannot be empty");
    CHECK(f.add_bitmap({.node = "zz", .name = "b"}) == "Cannot find device='zz' nor node-name='zz'");
    for (const uint32_t bad : {0u, 1u, 256u, 1000u, 3u << 20}) {
        CHECK(f.add_bitmap({.node = "n", .name = "b", .granularity = bad}) ==
              "Granularity must be power of 2 and at least 512");
    }
    const std::string longest(1023, 'x');
    CHECK(f.add_bitmap({.node = "n", .name = longest + "x"}) == "Bitmap name too long: " + longest + "x");
    CHECK(f.add_bitmap({.node = "n", .name = longest}) == "");
    CHECK(f.add_bitmap({.node = "n", .name = longest}) == "Bitmap already exists: " + longest);
    CHECK_THAT(f.add_bitmap({.node = "n", .name = "p", .persistent = true}),
               Catch::StartsWith("Can't store persistent bitmaps to n: Operation not supported"));
    CHECK(f.node("n").bitmaps().size() == 1);
    CHECK(f.remove_bitmap({"zz", "b"}) == "Node 'zz' not found");
    CHECK(f.remove_bitmap({"n", "b"}) == "Dirty bitmap 'b' not found");
    CHECK(f.remove_bitmap({"n", longest}) == "");
    CHECK(f.node("n").bitmaps().empty());
}

TEST_CASE("bitmap: the default granularity is 64 KiB where there are no clusters", "[block][bitmap]") {
    Fixture f;
    REQUIRE(f.add_bitmap({.node = "n", .name = "b"}) == "");
    CHECK(f.bitmap("n", "b").granularity() == 65536);
    CHECK(f.bitmap("n", "b").recording());
    REQUIRE(f.add_bitmap({.node = "n", .name = "c", .granularity = 512, .persistent = false, .disabled = true}) == "");
    CHECK_FALSE(f.bitmap("n", "c").recording());
}

TEST_CASE("bitmap: writes after the addition are recorded, also fast ones", "[block][bitmap]") {
    Fixture f;
    auto root = f.attach("n", GraphFixture::writer());
    Channel* channel = f.run(root->channel(f.runtime.io_loop()));
    REQUIRE(f.add_bitmap({.node = "n", .name = "b", .granularity = 4096}) == "");
    REQUIRE(f.runtime.run_on_io(write_channel(channel, 8192, std::vector<uint8_t>(100, 1))));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 4096);
    CHECK(f.bitmap("n", "b").next_dirty(0) == 8192);
    REQUIRE(set_bitmap_recording(*f.graph, {"n", "b"}, false));
    REQUIRE(f.runtime.run_on_io(write_channel(channel, 0, std::vector<uint8_t>(100, 1))));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 4096);
    REQUIRE(clear_bitmap(*f.graph, {"n", "b"}));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 0);
    f.detach(std::move(root));
}

TEST_CASE("bitmap: busy, read-only and inconsistent ones refuse what they must", "[block][bitmap]") {
    Fixture f;
    REQUIRE(f.add_bitmap({.node = "n", .name = "b"}) == "");
    REQUIRE(f.add_bitmap({.node = "n", .name = "other"}) == "");
    DirtyBitmap& b = f.bitmap("n", "b");
    struct Texts {
        std::string remove, clear, enable, merge_to, merge_from;
    };
    const auto texts = [&] {
        Texts t;
        t.clear = f.text_of(clear_bitmap(*f.graph, {"n", "b"}));
        t.enable = f.text_of(set_bitmap_recording(*f.graph, {"n", "b"}, true));
        t.merge_to = f.text_of(merge_bitmaps(*f.graph, {"n", "b"}, {{"n", "other"}}));
        t.merge_from = f.text_of(merge_bitmaps(*f.graph, {"n", "other"}, {{"n", "b"}}));
        t.remove = f.remove_bitmap({"n", "b"});
        return t;
    };
    b.busy = true;
    const std::string busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    const Texts in_use = texts();
    for (const auto& text : {in_use.remove, in_use.clear, in_use.enable, in_use.merge_to, in_use.merge_from})
        CHECK(text == busy);
    b.busy = false;
    b.set_read_only(true);
    const Texts read_only = texts();
    for (const auto& text : {read_only.remove, read_only.clear, read_only.merge_to})
        CHECK_THAT(text, Catch::StartsWith("Bitmap 'b' is readonly and cannot be modified"));
    CHECK(read_only.enable == "");
    CHECK(read_only.merge_from == "");
    b.set_read_only(false);
    b.set_inconsistent();
    const Texts lost = texts();
    for (const auto& text : {lost.clear, lost.enable, lost.merge_to, lost.merge_from})
        CHECK_THAT(text, Catch::StartsWith("Bitmap 'b' is inconsistent and cannot be used"));
    CHECK(lost.remove == "");
}

TEST_CASE("bitmap: a merge takes all its sources or none", "[block][bitmap]") {
    Fixture f;
    REQUIRE(f.add_bitmap({.node = "n", .name = "t", .granularity = 4096}) == "");
    REQUIRE(f.add_bitmap({.node = "n", .name = "a", .granularity = 65536}) == "");
    REQUIRE(f.add_bitmap({.node = "n", .name = "b", .granularity = 512}) == "");
    REQUIRE(f.add_bitmap({.node = "m", .name = "a"}) == "");
    f.bitmap("n", "a").mark(70000, 1);
    f.bitmap("n", "b").mark(5000, 1);
    const auto merge = [&](std::vector<BitmapRef> sources) {
        return f.text_of(merge_bitmaps(*f.graph, {"n", "t"}, sources));
    };
    CHECK_THAT(merge({{"n", "a"}, {"m", "a"}}),
               Catch::StartsWith("Bitmaps are of different sizes (destination size is 1048576, source size is 2097152) "
                                 "and can't be merged"));
    CHECK(merge({{"n", "a"}, {"n", "zz"}}) == "Dirty bitmap 'zz' not found");
    CHECK(merge({{"n", "a"}, {"zz", "b"}}) == "Node 'zz' not found");
    CHECK(f.bitmap("n", "t").dirty_bytes() == 0);
    CHECK(merge({}) == "");
    CHECK(merge({{"n", "a"}, {"n", "t"}, {"n", "b"}}) == "");
    CHECK(f.bitmap("n", "t").dirty_bytes() == 65536 + 4096);
    CHECK(f.bitmap("n", "t").next_dirty(0) == 4096);
}

TEST_CASE("bitmap: every change can be taken back", "[block][bitmap]") {
    Fixture f;
    REQUIRE(f.add_bitmap({.node = "n", .name = "b", .granularity = 4096}) == "");
    REQUIRE(f.add_bitmap({.node = "n", .name = "s", .granularity = 4096}) == "");
    f.bitmap("n", "b").mark(0, 1);
    f.bitmap("n", "s").mark(40960, 1);
    const auto undo = [&](Result<BitmapChange> change) {
        REQUIRE(change);
        f.run(Undo::abort(&*change));
    };
    undo(BitmapChanges::prepare_add(*f.graph, {.node = "n", .name = "new"}));
    CHECK(f.node("n").bitmaps().size() == 2);
    undo(BitmapChanges::prepare_remove(*f.graph, {"n", "b"}));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 4096);
    undo(BitmapChanges::prepare_clear(*f.graph, {"n", "b"}));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 4096);
    undo(BitmapChanges::prepare_recording(*f.graph, {"n", "b"}, false));
    CHECK(f.bitmap("n", "b").recording());
    undo(BitmapChanges::prepare_merge(*f.graph, {"n", "b"}, {{"n", "s"}}));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 4096);
    CHECK_FALSE(f.bitmap("n", "b").is_dirty(40960));

    // A later step sees an earlier one.
    auto removed = BitmapChanges::prepare_remove(*f.graph, {"n", "b"});
    REQUIRE(removed);
    auto added = BitmapChanges::prepare_add(*f.graph, {.node = "n", .name = "b"});
    REQUIRE(added);
    REQUIRE(f.run(Undo::commit(&*removed)));
    REQUIRE(f.run(Undo::commit(&*added)));
    CHECK(f.bitmap("n", "b").dirty_bytes() == 0);
}
