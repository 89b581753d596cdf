#include <catch2/catch.hpp>

#include "block/formats/qcow2/entries.h"
#include "block/formats/qcow2/mapping_run.h"

using namespace gantry::block;
using namespace gantry::block::qcow2;
using Kind = Extent::Kind;

namespace {

constexpr Geometry k64K{.cluster_bits = 16};
constexpr Geometry kV2{.cluster_bits = 16, .zero_flag = false};
constexpr Geometry kExtended{.cluster_bits = 16, .extended_l2 = true};
constexpr Geometry kExternal{.cluster_bits = 16, .external_data = true};
constexpr Geometry kRawExternal{.cluster_bits = 16, .external_data = true, .raw_external_data = true};

}  // namespace

TEST_CASE("qcow2: standard entries say where bytes are", "[qcow2][map]") {
    Piece p = describe_entry(k64K, 0, 0, 0x10100);
    CHECK(p.kind == Kind::kUnallocated);
    CHECK_FALSE(p.allocated);
    CHECK(p.length == 0xff00);

    p = describe_entry(k64K, kCopied | 0x50000, 0, 0x10100);
    CHECK(p.kind == Kind::kData);
    CHECK(p.host == 0x50100);
    CHECK(p.length == 0xff00);
    CHECK_FALSE(p.must_copy);
    CHECK(describe_entry(k64K, 0x50000, 0, 0).must_copy);

    p = describe_entry(k64K, kReadsAsZero, 0, 0);
    CHECK(p.kind == Kind::kZero);
    CHECK(p.allocated);
    CHECK(describe_entry(k64K, kCopied | 0x50000 | kReadsAsZero, 0, 0).kind == Kind::kZero);
    // Reserved bits carry no meaning for a reader.
    CHECK(describe_entry(k64K, kCopied | (uint64_t{0x3f} << 56) | 0x50000 | 0x1fe, 0, 0).host == 0x50000);
    // COPIED without an offset is nothing where data lives in the image itself.
    CHECK(describe_entry(k64K, kCopied, 0, 0).kind == Kind::kUnallocated);
}

TEST_CASE("qcow2: damaged entries are told from sound ones", "[qcow2][map][malformed]") {
    CHECK(describe_entry(k64K, kCopied | 0x50200, 0, 0).damage == Damage::kUnaligned);
    CHECK(describe_entry(kV2, kCopied | 0x50001, 0, 0).damage == Damage::kZeroFlagInV2);
    CHECK(describe_entry(kExtended, kCopied | 0x50000, 0x0000000100000001, 0).damage == Damage::kAllocatedAndZero);
    CHECK(describe_entry(kExtended, 0, 0x8, 0).damage == Damage::kAllocatedNowhere);
    CHECK(describe_entry(kExternal, kCompressed | 0x50000, 0, 0).damage == Damage::kCompressedOutside);
    CHECK(describe_entry(kExternal, kCopied | 0x50000, 0, 0x40000).damage == Damage::kElsewhere);
    CHECK(damage_text(Damage::kUnaligned, 0x50200, 0, 0x40000, 3) ==
          "Cluster allocation offset 0x50200 unaligned (L2 offset: 0x40000, L2 index: 3)");
}

TEST_CASE("qcow2: compressed entries split into offset and length by cluster size", "[qcow2][map]") {
    // 64 KiB clusters: 54 bits of offset, 8 bits of further sectors.
    Piece p = describe_entry(k64K, kCompressed | (uint64_t{3} << 54) | 0x50123, 0, 0x10100);
    CHECK(p.kind == Kind::kEncoded);
    CHECK(p.host == 0x50123);
    CHECK(p.bytes == 4 * 512 - 0x123);
    CHECK(p.length == 0xff00);
    // 2 MiB clusters: 49 bits of offset.
    p = describe_entry(Geometry{.cluster_bits = 21}, kCompressed | (uint64_t{8191} << 49) | 0x1ffffffffffff, 0, 0);
    CHECK(p.host == 0x1ffffffffffff);
    CHECK(p.bytes == 8192 * 512 - 511);
    // 512-byte clusters: 61 bits, of which 56 may be used.
    p = describe_entry(Geometry{.cluster_bits = 9}, kCompressed | (uint64_t{1} << 61) | 0x600, 0, 0);
    CHECK(p.host == 0x600);
    CHECK(p.bytes == 1024);
    CHECK(p.length == 512);
}

TEST_CASE("qcow2: subclusters are described run by run", "[qcow2][map]") {
    // Subclusters of 2 KiB: 0-1 data, 2 zero, 3 unallocated, 4..31 data.
    const uint64_t bitmap = (uint64_t{1} << 34) | 0xfffffff3;
    const auto at = [&](uint64_t in_cluster) {
        return describe_entry(kExtended, kCopied | 0x50000, bitmap, 0x30000 + in_cluster);
    };
    CHECK(at(0).kind == Kind::kData);
    CHECK(at(0).length == 4096);
    CHECK(at(100).host == 0x50064);
    CHECK(at(100).length == 4096 - 100);
    CHECK(at(4096).kind == Kind::kZero);
    CHECK(at(4096).length == 2048);
    CHECK(at(6144).kind == Kind::kUnallocated);
    CHECK_FALSE(at(6144).allocated);
    CHECK(at(6145).length == 2047);
    CHECK(at(8192).kind == Kind::kData);
    CHECK(at(8192).host == 0x52000);
    CHECK(at(8192).length == 0x10000 - 8192);
    // Without a host cluster the zero bits count all the same; bit 0 of the first word means nothing here.
    CHECK(describe_entry(kExtended, kReadsAsZero, uint64_t{1} << 32, 0).kind == Kind::kZero);
    CHECK(describe_entry(kExtended, kReadsAsZero, 0, 0).kind == Kind::kUnallocated);
    CHECK(describe_entry(kExtended, kReadsAsZero, 0, 0).length == 0x10000);
}

TEST_CASE("qcow2: external data lives at the guest offset", "[qcow2][map]") {
    const Piece first = describe_entry(kExternal, kCopied, 0, 0x100);
    CHECK(first.kind == Kind::kData);
    CHECK(first.host == 0x100);
    CHECK(describe_entry(kExternal, 0, 0, 0x100).kind == Kind::kUnallocated);
    const Piece raw = describe_entry(kRawExternal, 0, 0, 0x20100);
    CHECK(raw.kind == Kind::kData);
    CHECK(raw.host == 0x20100);
    CHECK(describe_entry(kRawExternal, kReadsAsZero, 0, 0).kind == Kind::kZero);
}

TEST_CASE("qcow2: adjacent entries become one extent", "[qcow2][map]") {
    const auto run_of = [](std::vector<uint64_t> words, uint64_t offset, uint64_t length) {
        MappingRun run(offset, length);
        words.resize(512);
        extend_in_slice(k64K, 25, [&](uint32_t i) { return words[i]; }, run);
        return run;
    };
    MappingRun run =
        run_of({kCopied | 0x50000, kCopied | 0x60000, kCopied | 0x70000, kCopied | 0x90000}, 0x100, 0x100000);
    CHECK(run.length == 0x30000 - 0x100);
    CHECK(run.first.host == 0x50100);
    CHECK(run.finished);
    CHECK_FALSE(run.first.must_copy);

    run = run_of({kCopied | 0x50000, 0x60000, kCopied | 0x70000}, 0, 0x18000);
    CHECK(run.length == 0x10000);  // what follows is shared: a write treats it otherwise
    CHECK_FALSE(run.first.must_copy);

    run = run_of({kCopied | 0x50000, kCopied | 0x60000}, 0, 0x18000);
    CHECK(run.length == 0x18000);  // no more than asked

    run = run_of({kReadsAsZero, kCopied | 0x50000 | kReadsAsZero, 0}, 0, 0x100000);
    CHECK(run.first.kind == Kind::kZero);
    CHECK(run.length == 0x20000);

    run = run_of({kCompressed | 0x50000, kCompressed | 0x60000}, 0, 0x20000);
    CHECK(run.first.kind == Kind::kEncoded);
    CHECK(run.length == 0x10000);

    run = run_of({kCopied | 0x50000, kCopied | 0x60200}, 0, 0x20000);
    CHECK(run.length == 0x10000);  // damage shows when it is asked for
    CHECK_FALSE(run.is_damaged());
    run = run_of({kCopied | 0x50000, kCopied | 0x60200}, 0x10000, 0x10000);
    CHECK(run.is_damaged());
    CHECK(run.bad_entry == (kCopied | 0x60200));
}
