#include <catch2/catch.hpp>

#include "tests/unit/block/qcow2_fixture.h"

using namespace gantry;
using namespace gantry::test;

TEST_CASE("qcow2: a tiny image reads as its clusters say", "[qcow2][read]") {
    Qcow2Fixture f;
    REQUIRE(f.open_memory(TinyImage()) == "");
    CHECK(f.node->size() == 32768);
    CHECK(f.node->cluster_size() == 512);
    CHECK(f.node->read_only());
    CHECK(f.filled_with(0, 512) == 'a');
    CHECK(f.filled_with(512, 32768 - 512) == 0);
    auto across = f.read(500, 24);
    REQUIRE(across);
    CHECK(std::string(across->begin(), across->end()) == std::string(12, 'a') + std::string(12, '\0'));
    CHECK(f.read_error(32768, 1) != "");
}

TEST_CASE("qcow2: block status tells data, zeroes and holes apart", "[qcow2][status]") {
    Qcow2Fixture f;
    TinyImage image;
    image.put64(TinyImage::kL2 + 8, 1).put64(TinyImage::kL2 + 16, 1);  // two zero clusters
    REQUIRE(f.open_memory(image) == "");
    auto s = f.status(0, 32768);
    REQUIRE(s);
    CHECK(s->length == 512);
    CHECK(s->data);
    CHECK(s->allocated);
    CHECK(s->has_offset);
    CHECK(s->host_offset == TinyImage::kData);
    CHECK(s->file->driver() == "memory");
    s = f.status(600, 32168);
    REQUIRE(s);
    CHECK(s->length == 1536 - 600);
    CHECK(s->zero);
    CHECK(s->allocated);
    s = f.status(1536, 31232);
    REQUIRE(s);
    CHECK(s->length == 31232);
    CHECK(s->zero);
    CHECK_FALSE(s->allocated);
    CHECK(s->depth == 0);
}

TEST_CASE("qcow2: a cached mapping answers without suspending", "[qcow2][read]") {
    Qcow2Fixture f;
    REQUIRE(f.open_memory(TinyImage()) == "");
    std::vector<uint8_t> data(100);
    CHECK(f.rt.run_on_io(try_read_channel(f.channel, 0, data.data(), data.size())) ==
          -EAGAIN);  // the L2 slice is not here
    CHECK(f.filled_with(0, 1) == 'a');
    CHECK(f.rt.run_on_io(try_read_channel(f.channel, 10, data.data(), data.size())) == 0);
    CHECK(data == std::vector<uint8_t>(100, 'a'));
    CHECK(f.image().slice_loads() == 1);
}

TEST_CASE("qcow2: concurrent misses of one slice share one read", "[qcow2][read]") {
    Qcow2Fixture f;
    REQUIRE(f.open_memory(TinyImage()) == "");
    auto disk = MemoryDisk::named("image");
    disk->close_gate();
    int done = 0;
    struct Reads {
        static Task<void> one(block::Channel* channel, uint64_t offset, int* done) {
            auto r = co_await read_channel(channel, offset, 8);
            if (r && r->front() == 'a') ++*done;
        }
        static Task<void> all(block::Channel* channel, int* done) {
            TaskScope scope;
            for (uint64_t i = 0; i < 16; i++) scope.spawn(one(channel, i * 8, done));
            co_await scope.join();
        }
        static Task<void> open_when_waiting(std::shared_ptr<MemoryDisk> disk) {
            co_await wait_until([&] { return disk->at_gate() > 0; });
            disk->open_gate();
        }
    };
    TaskScope opener;
    f.rt.run([](TaskScope* scope, std::shared_ptr<MemoryDisk> disk) -> Task<void> {
        scope->spawn(Reads::open_when_waiting(std::move(disk)));
        co_return;
    }(&opener, disk));
    f.rt.run_on_io(Reads::all(f.channel, &done));
    f.rt.run(opener.join());
    CHECK(done == 16);
    CHECK(f.image().slice_loads() == 1);
}

TEST_CASE("qcow2: a failed read of a slice fails the request and is tried again", "[qcow2][read]") {
    Qcow2Fixture f;
    REQUIRE(f.open_memory(TinyImage()) == "");
    auto disk = MemoryDisk::named("image");
    disk->set_fault([](MemoryDisk::Op op, uint64_t offset, uint64_t) {
        return op == MemoryDisk::Op::kRead && offset == TinyImage::kL2 ? EIO : 0;
    });
    const std::string error = f.read_error(0, 512);
    CHECK(error.find("node 'q': reading L2 table 0 at 0x800") != std::string::npos);
    disk->set_fault(nullptr);
    CHECK(f.filled_with(0, 512) == 'a');
}

TEST_CASE("qcow2: images that end before their tables read as zeroes", "[qcow2][read]") {
    Qcow2Fixture f;
    TinyImage image;
    SECTION("L1 beyond the end") { image.bytes.resize(TinyImage::kL1); }
    SECTION("half an L1 entry") { image.bytes.resize(TinyImage::kL1 + 4); }
    SECTION("L2 beyond the end") { image.bytes.resize(TinyImage::kL2); }
    SECTION("data beyond the end") { image.bytes.resize(TinyImage::kData); }
    SECTION("pointers far beyond the end") { image.put64(TinyImage::kL1, TinyImage::kCopied | 0x00fffffffffffe00); }
    REQUIRE(f.open_memory(image) == "");
    CHECK(f.filled_with(0, 32768) == 0);
}

TEST_CASE("qcow2: a huge L1 in a small file costs no memory", "[qcow2][malformed]") {
    Qcow2Fixture f;
    TinyImage image;
    image.put32(36, 4194304).put64(24, uint64_t{4194304} << 15);  // 128 GiB
    REQUIRE(f.open_memory(image) == "");
    CHECK(f.image().image().l1.capacity() <= image.bytes.size() / 8);
    CHECK(f.filled_with(0, 512) == 'a');
    // What the file has after the real L1 is taken for L1 entries, too: here they point nowhere sensible and are
    // refused.
    CHECK(f.filled_with(uint64_t{1} << 36, 65536) == 0);
    auto s = f.status(uint64_t{1} << 36, uint64_t{1} << 34);
    REQUIRE(s);
    CHECK(s->zero);
    CHECK(s->length >= uint64_t{1} << 20);
}

TEST_CASE("qcow2: damage found while reading fails the request and is reported once", "[qcow2][malformed]") {
    struct Row {
        const char* name;
        uint64_t at, value;
        const char* msg;
    };
    const Row row = GENERATE(Row{"deflate garbage", TinyImage::kL2, 0x4000000000000000 | 0xa00,
                                 "Compressed cluster at 0xa00 cannot be decoded"},
                             Row{"blob outside", TinyImage::kL2, 0x4000000000000000 | 0xa0000,
                                 "Compressed cluster at 0xa0000 lies beyond the end"});
    Qcow2Fixture f;
    TinyImage image;
    image.put64(row.at, row.value);
    INFO(row.name);
    REQUIRE(f.open_memory(image) == "");
    const std::string error = f.read_error(0, 512);
    CHECK(error.starts_with("node 'q': image is corrupt: " + std::string(row.msg)));
    CHECK(f.read_error(0, 100).starts_with("node 'q': image is corrupt: "));
    CHECK(f.filled_with(512, 1024) == 0);  // the rest of the disk is unharmed
    f.settle();
    REQUIRE(f.observer.events.size() == 1);
    CHECK(f.observer.events[0].node == "q");
    CHECK(f.observer.events[0].msg.starts_with(row.msg));
    CHECK(f.observer.events[0].offset == (row.value & 0xfffff));
    CHECK_FALSE(f.observer.events[0].fatal);
}

TEST_CASE("qcow2: a zero flag in a version 2 image is damage", "[qcow2][malformed]") {
    Qcow2Fixture f;
    TinyImage image;
    image.put32(4, 2).put64(96, 0).put64(104, 0).put64(TinyImage::kL2 + 8, 1);
    REQUIRE(f.open_memory(image) == "");
    CHECK(f.filled_with(0, 512) == 'a');
    CHECK(f.read_error(512, 1) ==
          "node 'q': image is corrupt: Zero cluster entry 0x1 found in pre-v3 image (L2 offset: 0x800, L2 index: 1)");
}

TEST_CASE("qcow2: an image is opened for writing unless it is corrupt or its file is read-only", "[qcow2][open]") {
    Qcow2Fixture f;
    CHECK(f.open_memory(TinyImage(), {{"read-only", false}}) == "");
    CHECK_FALSE(f.node->read_only());
    CHECK(f.open_memory(TinyImage(), {{"auto-read-only", true}}) == "");
    CHECK_FALSE(f.node->read_only());
    CHECK(f.filled_with(0, 512) == 'a');
    for (const uint64_t bit : {1, 2}) {  // dirty, corrupt
        CHECK(f.open_memory(TinyImage().incompatible(bit), {{"read-only", true}}) == "");
        CHECK(f.node->read_only());
        CHECK(f.filled_with(0, 512) == 'a');
    }
    for (const char* option : {"read-only", "auto-read-only"}) {
        CHECK(f.open_memory(TinyImage().incompatible(2), {{option, std::string_view(option) != "read-only"}})
                  .starts_with("qcow2: Image is corrupt; cannot be opened read/write; open it with read-only=on"));
    }
}

TEST_CASE("qcow2: what is refused at open names the node and leaves nothing behind", "[qcow2][open][malformed]") {
    Qcow2Fixture f;
    const auto refused = [&](TinyImage image, std::string_view sentence, json::object options = {}) {
        const std::string text = f.open_memory(image, std::move(options));
        INFO(text);
        CHECK(text.starts_with(sentence));
        CHECK(text.find("'q'") != std::string::npos);
        CHECK(f.graph->find("q") == nullptr);
        CHECK(f.graph->nodes().empty());
    };
    refused(TinyImage().put32(0, 0), "Image is not in qcow2 format");
    refused(TinyImage().put32(32, 1), "Parameter 'encrypt.key-secret' is required for cipher");
    refused(TinyImage().incompatible(4), "'data-file' is required for this image");
    refused(TinyImage().snapshots(1, 4096), "Failed to read snapshot table");
    refused(TinyImage().snapshots(65536, 3072).put8(8191, 0), "Failed to read snapshot table");
    refused(TinyImage().bitmaps_extension(1, 0, 32, 65536), "Broken bitmap directory");
    refused(TinyImage().bitmaps_extension(1, 0, 32, 4096).bitmap_entry(4096, 8192, 1, 0, 2, 16, "b0 name"),
            "Bitmap 'b0 name' doesn't satisfy the constraints");
    refused(TinyImage(), "Can't find snapshot 'x'", {{"snapshot", "x"}});
    refused(TinyImage(), "'data-file' can only be set for images with an external data file", {{"data-file", "f"}});
    refused(TinyImage(), "L2 cache entry size must be a power of two", {{"l2-cache-entry-size", 1024}});
    refused(TinyImage().put32(4, 2), "Lazy refcounts require", {{"lazy-refcounts", true}});
}

TEST_CASE("qcow2: internal snapshots open by id or name", "[qcow2][snapshot]") {
    Qcow2Fixture f;
    // A second L1/L2/data set: the snapshot's disk is 1 KiB of 's'.
    TinyImage image;
    image.put64(3072, 3584).put64(3584, 4096).put64(3584 + 8, 4096);
    for (uint32_t i = 0; i < 512; i++) image.put8(4096 + i, 's');
    image.snapshots(1, 5120 - 512).snapshot_entry(5120 - 512, 3072, 1, '1', 'n', 1024);
    for (const auto* name : {"1", "n"}) {
        REQUIRE(f.open_memory(image, {{"snapshot", name}}) == "");
        CHECK(f.node->size() == 1024);
        CHECK(f.filled_with(0, 1024) == 's');
    }
    REQUIRE(f.open_memory(image) == "");
    CHECK(f.filled_with(0, 512) == 'a');
    auto info = f.rt.run(f.node->image_info());
    REQUIRE(info);
    REQUIRE(info->snapshots.size() == 1);
    CHECK(info->snapshots[0].id == "1");
    CHECK(info->snapshots[0].name == "n");
    CHECK(info->snapshots[0].date_sec == 1234);

    CHECK(f.open_memory(TinyImage(image).put64(5120 - 512, 3073), {{"snapshot", "1"}})
              .starts_with("Snapshot L1 table offset invalid"));
    CHECK(f.open_memory(TinyImage(image).put32(5120 - 512 + 8, 0), {{"snapshot", "1"}})
              .starts_with("L1 table is too small"));
    CHECK(f.open_memory(TinyImage(image).put32(5120 - 512 + 8, 0xffffffff), {{"snapshot", "1"}})
              .starts_with("Snapshot L1 table too large"));
    CHECK(f.open_memory(TinyImage(image).put64(5120 - 512 + 48, ~uint64_t{0}), {{"snapshot", "1"}})
              .starts_with("Image is too big"));
}

TEST_CASE("qcow2: the format's own facts are told", "[qcow2][info]") {
    Qcow2Fixture f;
    TinyImage image;
    image.bitmaps_extension(2, 0, 64, 4096)
        .bitmap_entry(4096, 8192, 1, 2, 1, 16, "b0")
        .bitmap_entry(4128, 8704, 1, 1, 1, 17, "b1");
    REQUIRE(f.open_memory(image.incompatible(1)) == "");
    auto info = f.rt.run(f.node->image_info());
    REQUIRE(info);
    CHECK(info->virtual_size == 32768);
    CHECK(info->cluster_size == 512u);
    CHECK(info->dirty == true);
    CHECK(
        json::serialize(info->format_specific) ==
        R"({"type":"qcow2","data":{"compat":"1.1","compression-type":"zlib","refcount-bits":16,"lazy-refcounts":false,)"
        R"("corrupt":false,"extended-l2":false,"bitmaps":[{"name":"b0","granularity":65536,"flags":["auto"]},)"
        R"({"name":"b1","granularity":131072,"flags":["in-use"]}]}})");
}

TEST_CASE("qcow2: backing files are found by the image's name for them", "[qcow2][backing]") {
    Qcow2Fixture f;
    const auto write = [&](const std::string& name, const std::vector<uint8_t>& bytes) {
        std::ofstream(f.dir.file(name), std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    };
    write("base.raw", std::vector<uint8_t>(20000, 'b'));
    const auto over = [&](const std::string& name, const std::string& backing, const std::string& format = "raw") {
        TinyImage image;
        uint64_t at = 112;
        if (!format.empty()) {
            image.extension(112, 0xe2792aca, format);
            at = 112 + 8 + (format.size() + 7) / 8 * 8;
        }
        image.put32(at, 0).put64(8, 200).put32(16, static_cast<uint32_t>(backing.size())).put_text(200, backing);
        write(name, image.bytes);
        return f.dir.file(name);
    };
    SECTION("relative, short") {
        REQUIRE(f.open_file(over("o.qcow2", "base.raw")) == "");
        CHECK(f.filled_with(0, 512) == 'a');
        CHECK(f.filled_with(512, 20000 - 512) == 'b');
        CHECK(f.filled_with(20000, 32768 - 20000) == 0);
        auto s = f.status(512, 32768 - 512);
        REQUIRE(s);
        CHECK(s->depth == 2);
        CHECK_FALSE(s->allocated);
        auto info = f.rt.run(f.node->image_info());
        REQUIRE(info);
        CHECK(info->backing_filename == "base.raw");
        CHECK(info->full_backing_filename == f.dir.file("base.raw"));
        CHECK(info->backing_format == "raw");
    }
    SECTION("a json: name") {
        REQUIRE(f.open_file(over("o.qcow2",
                                 "json:{\"driver\":\"file\",\"filename\":\"" + f.dir.file("base.raw") + "\"}")) == "");
        CHECK(f.filled_with(512, 1000) == 'b');
    }
    SECTION("json: that does not fit the schema") {
        const std::string text = f.open_file(over("o.qcow2", R"(json:{"driver":"file","filename":17})"));
        CHECK(text.starts_with("Could not open backing file: "));
        CHECK(
            f.open_file(over("o.qcow2", R"(json:{"driver":"raw","file":"q"})")).find("may not refer to the node 'q'") !=
            std::string::npos);
        CHECK(f.open_file(over("o.qcow2", "json:{"))
                  .starts_with("Could not open backing file: Could not parse the JSON"));
    }
    SECTION("probed, and a chain") {
        over("mid.qcow2", "base.raw");
        REQUIRE(f.open_file(over("o.qcow2", "mid.qcow2", "")) == "");
        CHECK(f.node->child("backing")->node->driver() == "qcow2");
        CHECK(f.filled_with(600, 1000) == 'b');
    }
    SECTION("none, and another one") {
        REQUIRE(f.open_file(over("o.qcow2", "missing.raw"), {{"backing", nullptr}}) == "");
        CHECK(f.filled_with(512, 1000) == 0);
        REQUIRE(f.open_file(f.dir.file("o.qcow2"),
                            {{"backing",
                              {{"driver", "raw"},
                               {"file", {{"driver", "file"}, {"filename", f.dir.file("base.raw")}}}}}}) == "");
        CHECK(f.filled_with(512, 1000) == 'b');
    }
    SECTION("missing, unknown") {
        CHECK(f.open_file(over("o.qcow2", "missing.raw")).starts_with("Could not open backing file: "));
        CHECK(f.open_file(over("o.qcow2", "base.raw", "wurst")) ==
              "Could not open backing file: Unknown driver 'wurst'");
        CHECK(f.open_file(over("o.qcow2", "gopher:x")) == "Could not open backing file: Unknown protocol 'gopher'");
    }
    SECTION("the image itself") {
        const std::string text = f.open_file(over("o.qcow2", "o.qcow2", "qcow2"));
        INFO(text);
        CHECK(text.find("does one name itself as its backing file?") != std::string::npos);
        CHECK(f.graph->nodes().empty());
        over("a.qcow2", "b.qcow2", "qcow2");
        CHECK(f.open_file(over("b.qcow2", "a.qcow2", "qcow2")).find("does one name itself as its backing file?") !=
              std::string::npos);
        CHECK(f.graph->nodes().empty());
    }
}

TEST_CASE("qcow2: data files named by an image are local files and nothing else", "[qcow2][data-file]") {
    Qcow2Fixture f;
    const auto write = [&](const std::string& name, const std::vector<uint8_t>& bytes) {
        std::ofstream(f.dir.file(name), std::ios::binary)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
    };
    TinyImage image;
    image.incompatible(4)
        .put64(TinyImage::kL2, TinyImage::kCopied)
        .put64(TinyImage::kL2 + 8, TinyImage::kCopied | 512)
        .put64(TinyImage::kL2 + 16, TinyImage::kCopied | 512);
    std::vector<uint8_t> data(1024, 'd');
    SECTION("by the image's name") {
        write("d.raw", data);
        image.extension(112, 0x44415441, "d.raw");
        write("i.qcow2", image.bytes);
        REQUIRE(f.open_file(f.dir.file("i.qcow2")) == "");
        CHECK(f.filled_with(0, 1024) == 'd');
        CHECK(f.read_error(1024, 1).find("External data file host cluster offset 0x200 does not match") !=
              std::string::npos);
        CHECK(f.filled_with(1536, 1000) == 0);
    }
    SECTION("a json: name is a file name") {
        image.extension(112, 0x44415441, R"(json:{"driver":"memory","size":1})");
        write("i.qcow2", image.bytes);
        const std::string text = f.open_file(f.dir.file("i.qcow2"));
        INFO(text);
        CHECK(text.find("Could not open '" + f.dir.file("json:{")) != std::string::npos);
    }
    SECTION("the option wins") {
        write("e.raw", data);
        image.extension(112, 0x44415441, "missing.raw");
        write("i.qcow2", image.bytes);
        REQUIRE(f.open_file(f.dir.file("i.qcow2"),
                            {{"data-file", {{"driver", "file"}, {"filename", f.dir.file("e.raw")}}}}) == "");
        CHECK(f.filled_with(0, 1024) == 'd');
    }
    SECTION("raw external: what no entry describes is there, too") {
        data.resize(2048, 'e');
        write("d.raw", data);
        image.autoclear(2).extension(112, 0x44415441, "d.raw").put64(TinyImage::kL2 + 16, 0);
        write("i.qcow2", image.bytes);
        REQUIRE(f.open_file(f.dir.file("i.qcow2")) == "");
        CHECK(f.filled_with(0, 1024) == 'd');
        CHECK(f.filled_with(1024, 1024) == 'e');
        CHECK(f.filled_with(2048, 30720) == 0);
    }
}

TEST_CASE("qcow2: unused slices are dropped in time", "[qcow2][cache][slow]") {
    Qcow2Fixture f;
    REQUIRE(f.open_memory(TinyImage(), {{"cache-clean-interval", 1}}) == "");
    CHECK(f.filled_with(0, 512) == 'a');
    CHECK(f.image().l2_cache().resident() == 1);
    CHECK(f.rt.run(wait_until([&] { return f.image().l2_cache().resident() == 0; })));
    CHECK(f.filled_with(0, 512) == 'a');
    CHECK(f.image().slice_loads() == 2);
}

TEST_CASE("qcow2: many readers of compressed clusters share the decoder", "[qcow2][compressed]") {
    Qcow2Fixture f;
    TinyImage image;
    // One stored deflate block of 512 bytes per guest cluster, back to back.
    const uint32_t blob = 5 + 512;
    for (uint32_t i = 0; i < 64; i++) {
        const uint64_t at = TinyImage::kData + uint64_t{i} * blob;
        image.put8(at, 1).put16(at + 1, 0x0002).put16(at + 3, 0xfffd);
        for (uint32_t b = 0; b < 512; b++) image.put8(at + 5 + b, static_cast<uint8_t>(i + 1));
        image.put64(TinyImage::kL2 + i * 8, (uint64_t{1} << 62) | (uint64_t{1} << 61) | at);
    }
    REQUIRE(f.open_memory(image) == "");
    struct Reads {
        static Task<void> one(block::Channel* channel, uint64_t cluster, uint64_t at, uint64_t length, int* good) {
            auto r = co_await read_channel(channel, cluster * 512 + at, length);
            if (r && r->front() == cluster + 1 && r->back() == cluster + 1) ++*good;
        }
        static Task<void> all(block::Channel* channel, int* good) {
            TaskScope scope;
            for (uint64_t i = 0; i < 64; i++) {
                scope.spawn(one(channel, i, 0, 512, good));
                for (uint64_t part = 0; part < 4; part++) scope.spawn(one(channel, i, part * 128, 100, good));
            }
            co_await scope.join();
        }
    };
    int good = 0;
    f.rt.run_on_io(Reads::all(f.channel, &good));
    CHECK(good == 64 * 5);
    CHECK(f.image().decodes() <= 64 * 2);  // whole clusters into place, and one decode for all the parts of each
}
