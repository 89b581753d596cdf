// What a file tells about its parts, against what the system tells by searches.

#include <fcntl.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "block/protocols/file.h"
#include "tests/unit/block/file_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;

namespace {

using Runs = std::vector<std::pair<uint64_t, bool>>;  // length, data

void add(Runs& runs, uint64_t length, bool data) {
    if (!runs.empty() && runs.back().second == data) {
        runs.back().first += length;
    } else {
        runs.emplace_back(length, data);
    }
}

Runs searched(const std::string& path, uint64_t begin, uint64_t end) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    Runs runs;
    for (uint64_t at = begin; at < end;) {
        const off_t data = ::lseek(fd.get(), static_cast<off_t>(at), SEEK_DATA);
        const uint64_t hole_end = data < 0 ? end : std::min<uint64_t>(static_cast<uint64_t>(data), end);
        if (hole_end > at) add(runs, hole_end - at, false);
        at = hole_end;
        if (at == end) break;
        const uint64_t data_end =
            std::min<uint64_t>(static_cast<uint64_t>(::lseek(fd.get(), static_cast<off_t>(at), SEEK_HOLE)), end);
        add(runs, data_end - at, true);
        at = data_end;
    }
    return runs;
}

Task<Runs> told(Node* node, uint64_t begin, uint64_t end, size_t at_once) {
    Runs runs;
    std::vector<BlockStatus> parts(at_once);
    Request rq = Request::internal();
    for (uint64_t at = begin; at < end;) {
        const Result<size_t> count = co_await node->block_statuses(rq, at, end - at, parts);
        if (!count || *count == 0 || *count > at_once) co_return Runs();
        for (const BlockStatus& part : std::span(parts).first(*count)) {
            if (part.length == 0 || part.zero == part.data || part.host_offset != at || part.depth != 1)
                co_return Runs();
            add(runs, part.length, part.data);
            at += part.length;
        }
        if (at > end) co_return Runs();
    }
    co_return runs;
}

}  // namespace

TEST_CASE("file: many parts are told as searches find them, written to disk or not", "[file][status]") {
    FileFixture f;
    const std::string path = f.dir.file("img");
    constexpr uint64_t kSize = 64u << 20;
    {
        const UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
        REQUIRE(::ftruncate(fd.get(), kSize) == 0);
        const std::string block(12288, 'x');
        const auto write = [&](uint64_t at, size_t bytes) {
            REQUIRE(::pwrite(fd.get(), block.data(), bytes, static_cast<off_t>(at)) == static_cast<ssize_t>(bytes));
        };
        // Fragments on disk.
        for (uint64_t at = 8192; at < kSize / 2; at += 32768) write(at, at % 65536 ? 4096 : 12288);
        REQUIRE(::fsync(fd.get()) == 0);
        // Fragments that are in memory only, without a place; holes made in what is on disk.
        for (uint64_t at = kSize / 2; at < kSize / 4 * 3; at += 65536) write(at, 5000);
        REQUIRE(::fallocate(fd.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 1 << 20, 1 << 20) == 0);
        // Preallocated, and written here and there since.
        REQUIRE(::fallocate(fd.get(), 0, kSize / 4 * 3, 8 << 20) == 0);
        for (uint64_t at = kSize / 4 * 3 + 4096; at < kSize / 4 * 3 + (4 << 20); at += 131072) write(at, 4096);
    }
    auto node = f.add_file(path);
    REQUIRE(node);
    for (const auto& [begin, end] : {std::pair<uint64_t, uint64_t>{0, kSize},
                                     {8192 + 512, kSize - 512},
                                     {kSize / 2, kSize / 2 + 4096},
                                     {kSize / 4 * 3, kSize},
                                     {1 << 20, 2 << 20},
                                     {kSize - 1, kSize}}) {
        const Runs expected = searched(path, begin, end);
        for (const size_t at_once : {1u, 2u, 16u, 17u, 64u, 512u, 5000u}) {
            CAPTURE(begin, end, at_once);
            CHECK(f.rt.run(told(*node, begin, end, at_once)) == expected);
        }
    }
}
