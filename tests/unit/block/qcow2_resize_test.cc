// Growing and shrinking against a model; qemu-img agrees about every image.

#include <random>

#include "tests/unit/block/qcow2_ops_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::Preallocation;

TEST_CASE("qcow2: what a growth adds reads as zeroes", "[qcow2][resize][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto options = GENERATE(as<std::string>{}, "cluster_size=512", "cluster_size=64k", "compat=0.10",
                                  "extended_l2=on,cluster_size=16k", "cluster_size=2M");
    INFO(options);
    OpsFixture f;
    f.create(options, 700 * 512);
    REQUIRE(f.open() == "");
    f.write(0, 700 * 512, 1);
    SECTION("old bytes of the last cluster do not come back") {
        f.resize(333 * 512);
        f.resize(700 * 512);
        f.verify_file();
        f.resize(5 << 20);
        f.write((5 << 20) - 512, 512, 9);
        f.verify_file();
    }
    SECTION("a longer backing file stays hidden") {
        f.close();
        const std::string base = f.dir.file("base.raw");
        f.sh("qemu-img create -q -f raw " + base + " 4M && qemu-io -f raw -c 'write -P 7 0 4M' " + base);
        f.sh("qemu-img create -q -f qcow2 -o " + options + " -b " + base + " -F raw " + f.path + " 358400");
        f.disk.assign(358400, 7);
        REQUIRE(f.open() == "");
        f.write(1000, 5000, 3);
        f.resize(3 << 20);
        f.verify_file();
        f.resize(6 << 20);
        f.verify_file();
        f.resize(1 << 20);
        f.resize(2 << 20);
        f.verify_file();
    }
}

TEST_CASE("qcow2: a shrunk image gives its space back", "[qcow2][resize][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    f.create("cluster_size=4k", 16 << 20);
    REQUIRE(f.open() == "");
    f.write(0, 16 << 20, 1);
    f.resize(1 << 20);
    f.verify_file();
    CHECK(f.file_bytes() < (2 << 20));
    f.resize(0);
    f.verify_file();
    f.resize(1 << 20);
    f.write(4096, 10000, 2);
    f.verify_file();
}

TEST_CASE("qcow2: preallocation of what is added", "[qcow2][resize][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto mode = GENERATE(Preallocation::kMetadata, Preallocation::kFalloc, Preallocation::kFull);
    const auto options = GENERATE(as<std::string>{}, "cluster_size=64k", "compat=0.10,cluster_size=4k",
                                  "extended_l2=on,cluster_size=32k");
    INFO(options << " mode " << static_cast<int>(mode));
    OpsFixture f;
    f.create(options, 100 * 512);
    REQUIRE(f.open() == "");
    f.write(0, 50 * 512, 1);
    f.resize((3 << 20) + 512, mode);
    f.verify_file();
    const std::string map = f.output("qemu-img map -U --output=json " + f.path);
    INFO(map);
    CHECK(map.find("\"offset\"") != std::string::npos);
    CHECK(f.file_bytes() >= (3 << 20));
    f.write(1 << 20, 100000, 2);
    f.verify_file();
}

TEST_CASE("qcow2: sizes that are refused", "[qcow2][resize][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    const auto resize = [&](uint64_t size, Preallocation p = Preallocation::kOff, bool shrink = true) {
        return error_of(f.rt.run(block::resize_image(*f.graph, *f.node, size, p, shrink)));
    };
    SECTION("version 3") {
        f.create("cluster_size=512", 1 << 20);
        REQUIRE(f.open() == "");
        f.write(0, 1 << 20, 4);
        CHECK(resize(1000) == "The new size must be a multiple of 512");
        CHECK_THAT(resize(uint64_t{1} << 40), Catch::StartsWith("Failed to grow the L1 table: File too large"));
        CHECK_THAT(resize(512, Preallocation::kOff, false), Catch::StartsWith("Use the --shrink option"));
        CHECK(resize(512, Preallocation::kFull) == "Preallocation can't be used for shrinking an image");
        f.verify_file();
    }
    SECTION("version 2 with snapshots") {
        f.create("compat=0.10", 1 << 20);
        REQUIRE(f.open() == "");
        f.write(0, 100000, 4);
        f.snapshot("x");
        CHECK_THAT(resize(2 << 20), Catch::StartsWith("Can't resize a v2 image which has snapshots"));
        CHECK_THAT(resize(512), Catch::StartsWith("Can't resize a v2 image which has snapshots"));
        f.verify_file();
    }
}

TEST_CASE("qcow2: block_resize of the graph grows and shrinks, external data files too", "[qcow2][resize][interop]") {
    if (OpsFixture::tools_missing()) return;
    const auto raw = GENERATE(as<std::string>{}, "", ",data_file_raw=on");
    OpsFixture f;
    const std::string data = f.dir.file("d.raw");
    f.create("data_file=" + data + raw, 1 << 20);
    REQUIRE(f.open() == "");
    f.write(0, 1 << 20, 1);
    OpsFixture::need(f.rt.run(f.graph->resize(*f.node, 2 << 20)));
    f.disk.resize(2 << 20);
    f.write((2 << 20) - 1000, 1000, 2);
    f.verify_file();
    OpsFixture::need(f.rt.run(f.graph->resize(*f.node, 512 << 10)));
    f.disk.resize(512 << 10);
    f.verify_file();
    CHECK(std::filesystem::file_size(data) == 512 << 10);
}

TEST_CASE("qcow2: an emptied overlay shows its backing file", "[qcow2][resize][interop]") {
    if (OpsFixture::tools_missing()) return;
    OpsFixture f;
    const std::string base = f.dir.file("base.raw");
    f.sh("qemu-img create -q -f raw " + base + " 4M && qemu-io -f raw -c 'write -P 7 0 4M' " + base);
    f.sh("qemu-img create -q -f qcow2 -b " + base + " -F raw " + f.path);
    f.disk.assign(4 << 20, 7);
    REQUIRE(f.open() == "");
    f.write(100000, 3000000, 1);
    f.snapshot("kept");
    f.zero(0, 1 << 20, true);
    OpsFixture::need(f.rt.run(f.image().make_empty()));
    std::ranges::fill(f.disk, uint8_t{7});
    f.verify_file();
    f.remove("1");
    f.write(5000, 5000, 2);
    f.verify_file();
    OpsFixture::need(f.rt.run(f.image().make_empty()));
    std::ranges::fill(f.disk, uint8_t{7});
    f.verify_file();
    CHECK(f.file_bytes() < (1 << 20));
}
