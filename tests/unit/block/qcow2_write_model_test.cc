// Random requests on real images, compared with a plain array and judged by qemu-img.

#include <catch2/catch.hpp>

#include <fstream>

#include "block/crypto/secrets.h"
#include "block/formats/qcow2/qcow2.h"
#include "block/protocols/file.h"
#include "tests/support/model_run.h"
#include "tests/support/temp_dir.h"
#include "tests/unit/block/qcow2_fixture.h"

using namespace gantry;
using namespace gantry::test;

namespace {

constexpr const char* kSecret = "--object secret,id=s,data=sesame";

struct Shape {
    const char* create;     // options of qemu-img create; DIR stands for the directory
    const char* node = "";  // more options of the node
    uint64_t size = 6'000'128;
    unsigned backing = 0;  // bytes of a raw backing file
    bool compress = false;
    bool encrypted = false;
};

const Shape kShapes[] = {
    {"cluster_size=64k"},
    {"cluster_size=512", "", 1'500'160},
    {"cluster_size=4k"},
    {"cluster_size=2M", "", 24'000'512},
    {"compat=0.10"},
    {"compat=0.10,cluster_size=1k", "", 2'000'384, 1'000'000},
    {"refcount_bits=1,cluster_size=4k"},
    {"refcount_bits=2,cluster_size=512", "", 1'500'160},
    {"refcount_bits=64,cluster_size=512", "", 1'500'160},
    {"lazy_refcounts=on,cluster_size=4k"},
    {"cluster_size=64k", "", 6'000'128, 4'000'000},
    {"cluster_size=4k", ",'l2-cache-size':4096,'l2-cache-entry-size':512", 6'000'128, 7'000'064},
    {"extended_l2=on,cluster_size=16k"},
    {"extended_l2=on,cluster_size=128k", "", 6'000'128, 5'000'192},
    {"extended_l2=on,cluster_size=2M", "", 24'000'512, 9'000'000},
    {"data_file=DIR/data.raw", "", 6'000'128},
    {"data_file=DIR/data.raw,extended_l2=on", "", 6'000'128, 3'000'000},
    {"data_file=DIR/data.raw,data_file_raw=on", ""},
    {"cluster_size=64k", "", 6'000'128, 0, true},
    {"cluster_size=4k,compression_type=zstd", "", 6'000'128, 4'000'000, true},
    {"extended_l2=on,cluster_size=64k,compression_type=zstd", "", 6'000'128, 0, true},
    {"preallocation=metadata,cluster_size=64k"},
    {"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,cluster_size=4k",
     ",'encrypt':{'format':'luks','key-secret':'s'}", 3'000'320, 2'000'000, false, true},
    {"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,extended_l2=on",
     ",'encrypt':{'format':'luks','key-secret':'s'}", 3'000'320, 0, false, true},
    {"encrypt.format=aes,encrypt.key-secret=s", ",'encrypt':{'format':'aes','key-secret':'s'}", 3'000'320, 0, false,
     true},
    {"cluster_size=64k", ",'discard-no-unref':true", 6'000'128, 2'000'000},
    {"cluster_size=4k", ",'pass-discard-other':true,'overlap-check':'all'"},
};

std::vector<uint8_t> make_backing(const std::string& path, unsigned bytes) {
    std::vector<uint8_t> data(bytes);
    std::mt19937 random(11);
    for (size_t i = 0; i < data.size(); i++) {
        if (i / 30'000 % 3 != 1) data[i] = static_cast<uint8_t>(random());
    }
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(data.data()), static_cast<std::streamsize>(data.size()));
    return data;
}

std::string create(const Shape& shape, const TempDir& dir, std::vector<uint8_t>& contents) {
    const std::string path = dir.file("i.qcow2");
    std::string options = shape.create;
    if (const size_t at = options.find("DIR"); at != std::string::npos) options.replace(at, 3, dir.path());
    contents.assign(shape.size, 0);
    std::string backing;
    if (shape.backing) {
        std::vector<uint8_t> data = make_backing(dir.file("b.raw"), shape.backing);
        data.resize(shape.size);
        contents = data;
        backing = " -b " + dir.file("b.raw") + " -F raw";
    }
    Qcow2Fixture::sh(fmt::format("qemu-img create -q -f qcow2 {} -o {}{} {} {}", shape.encrypted ? kSecret : "",
                                 options, backing, path, shape.size));
    return path;
}

void judge(const TempDir& dir, const std::string& path, const std::vector<uint8_t>& model, bool encrypted) {
    const std::string image =
        encrypted ? fmt::format("{} --image-opts driver=qcow2,encrypt.key-secret=s,file.filename={}", kSecret, path)
                  : "-f qcow2 " + path;
    const ShellResult checked = shell("qemu-img check -q " + image);
    INFO(checked.output.substr(0, 2000));
    CHECK(checked.status == 0);
    Qcow2Fixture::sh("qemu-img convert -O raw " + image + " " + dir.file("out.raw"));
    CHECK(Qcow2Fixture::bytes_of(dir.file("out.raw")) == model);
}

}  // namespace

TEST_CASE("qcow2: random operations leave what a plain array holds, and qemu-img finds no fault",
          "[qcow2][write][model][interop][long]") {
    if (!Qcow2Fixture::has_tool("qemu-img")) {
        WARN("SKIPPED: qemu-img is not installed");
        return;
    }
    const Shape& shape = GENERATE(from_range(std::begin(kShapes), std::end(kShapes)));
    INFO(shape.create << shape.node << " backing " << shape.backing);
    TempDir dir;
    std::vector<uint8_t> contents;
    const std::string path = create(shape, dir, contents);
    for (const uint64_t seed : {1, 2}) {
        ModelRun m({block::kFileDriver, block::kQcow2Driver});
        m.can_compress = shape.compress;
        if (shape.encrypted) {
            REQUIRE(m.run(m.graph->secrets().add({{"qom-type", "secret"}, {"id", "s"}, {"data", "sesame"}})));
        }
        m.open({fmt::format("{{'driver':'file','node-name':'f','filename':'{}','discard':'unmap'}}", path),
                fmt::format("{{'driver':'qcow2','node-name':'n','file':'f','discard':'unmap'{}}}", shape.node)},
               std::move(contents));
        m.run_concurrent(model_operations(2), 8, seed);
        m.verify();
        m.run_sequential(model_operations(1), seed + 10);
        m.verify();
        m.close();
        contents = std::move(m.model);
        REQUIRE(m.remove("f") == "");
        judge(dir, path, contents, shape.encrypted);
    }
    if (std::string_view(shape.create).find("data_file_raw") != std::string_view::npos) {
        std::vector<uint8_t> raw = Qcow2Fixture::bytes_of(dir.file("data.raw"));
        raw.resize(contents.size());
        CHECK(raw == contents);
    }
}
