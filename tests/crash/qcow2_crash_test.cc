// After a power cut at any moment: check finds no corruption, everything flushed is there, nothing foreign shows.

#include <catch2/catch.hpp>

#include "tests/crash/qcow2_run.h"

using namespace gantry::test;

namespace {

/// GANTRY_TEST_CRASH_CUTS: cuts for each configuration and seed (default 60); GANTRY_SOAK: many times more seeds;
/// GANTRY_TEST_CRASH_ONLY: the configurations with this in their name.
unsigned cuts() { return static_cast<unsigned>(std::stoul(env_or("GANTRY_TEST_CRASH_CUTS", "60"))); }
unsigned seeds() { return std::getenv("GANTRY_SOAK") ? 40 : 2; }

const CrashConfig kConfigs[] = {
    {.name = "64 KiB clusters", .create = "", .bytes = 8 << 20},
    {.name = "64 KiB clusters over a backing file", .create = "", .bytes = 8 << 20, .backing = true},
    {.name = "512 byte clusters", .create = "cluster_size=512", .bytes = 1 << 20, .backing = true},
    {.name = "4 KiB clusters, 1 bit counts", .create = "cluster_size=4k,refcount_bits=1", .bytes = 4 << 20},
    {.name = "version 2", .create = "compat=0.10,cluster_size=4k", .bytes = 4 << 20, .backing = true},
    {.name = "version 2 without backing", .create = "compat=0.10,cluster_size=4k", .bytes = 4 << 20},
    {.name = "64 bit counts", .create = "cluster_size=1k,refcount_bits=64", .bytes = 2 << 20},
    {.name = "subclusters", .create = "extended_l2=on,cluster_size=16k", .bytes = 4 << 20, .backing = true},
    {.name = "subclusters of 64 KiB clusters", .create = "extended_l2=on", .bytes = 8 << 20, .backing = true},
    {.name = "lazy refcounts", .create = "cluster_size=4k,lazy_refcounts=on", .bytes = 4 << 20, .backing = true},
    {.name = "lazy refcounts by option",
     .create = "cluster_size=4k",
     .bytes = 4 << 20,
     .options = "'lazy-refcounts': true, "},
    {.name = "compressed clusters", .create = "cluster_size=4k", .bytes = 4 << 20, .compressed = true},
    {.name = "compressed clusters of zstd",
     .create = "cluster_size=16k,compression_type=zstd",
     .bytes = 8 << 20,
     .backing = true,
     .compressed = true},
    {.name = "external data file", .create = "cluster_size=4k", .bytes = 4 << 20, .data_file = true},
    {.name = "external data file over a backing file",
     .create = "cluster_size=16k,extended_l2=on",
     .bytes = 4 << 20,
     .backing = true,
     .data_file = true},
    {.name = "raw external data file",
     .create = "cluster_size=4k,data_file_raw=on",
     .bytes = 4 << 20,
     .data_file = true},
    {.name = "snapshots", .create = "cluster_size=4k", .bytes = 2 << 20, .snapshots = true},
    {.name = "snapshots over a backing file with compressed clusters",
     .create = "cluster_size=8k",
     .bytes = 2 << 20,
     .backing = true,
     .compressed = true,
     .snapshots = true},
    {.name = "snapshots and subclusters",
     .create = "extended_l2=on,cluster_size=16k",
     .bytes = 4 << 20,
     .snapshots = true},
    {.name = "snapshots with counts of 8 bits",
     .create = "cluster_size=4k,refcount_bits=8",
     .bytes = 1 << 20,
     .snapshots = true},
    {.name = "resizes", .create = "cluster_size=512", .bytes = 512 << 10, .resizes = true},
    {.name = "resizes of 4 KiB clusters", .create = "cluster_size=4k", .bytes = 2 << 20, .resizes = true},
    {.name = "a persistent bitmap", .create = "cluster_size=4k", .bytes = 2 << 20, .bitmap = true},
    {.name = "compacting", .create = "cluster_size=4k", .bytes = 2 << 20, .compacts = true},
    {.name = "compacting with compressed clusters over a backing file",
     .create = "cluster_size=8k",
     .bytes = 2 << 20,
     .backing = true,
     .compressed = true,
     .compacts = true},
    {.name = "compacting with snapshots",
     .create = "cluster_size=4k",
     .bytes = 1 << 20,
     .snapshots = true,
     .compacts = true},
    {.name = "amending", .create = "cluster_size=4k", .bytes = 2 << 20, .amends = true},
    {.name = "encrypted",
     .create = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,cluster_size=4k",
     .bytes = 2 << 20,
     .backing = true,
     .secret = "open sesame"},
    {.name = "encrypted, nothing below",
     .create = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,cluster_size=4k",
     .bytes = 2 << 20,
     .secret = "open sesame"},
    {.name = "encrypted, keeping the clusters of discards",
     .create = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,cluster_size=4k",
     .bytes = 2 << 20,
     .options = "'discard-no-unref': true, ",
     .secret = "open sesame"},
    {.name = "encrypted data file",
     .create = "encrypt.format=luks,encrypt.key-secret=s0,encrypt.iter-time=10,cluster_size=4k",
     .bytes = 2 << 20,
     .data_file = true,
     .secret = "open sesame"},
    {.name = "resizes and compacting with lazy refcounts",
     .create = "cluster_size=1k,lazy_refcounts=on",
     .bytes = 1 << 20,
     .resizes = true,
     .compacts = true},
    {.name = "keeping the clusters of discards",
     .create = "cluster_size=4k",
     .bytes = 2 << 20,
     .options = "'discard-no-unref': true, "},
    {.name = "small caches",
     .create = "cluster_size=1k",
     .bytes = 2 << 20,
     .options = "'l2-cache-size': 2048, 'l2-cache-entry-size': 512, 'refcount-cache-size': 4096, "},
};

}  // namespace

TEST_CASE("qcow2: after a power cut at any moment what was flushed is there", "[qcow2][crash]") {
    const unsigned index = GENERATE(range(0u, static_cast<unsigned>(std::size(kConfigs))));
    const CrashConfig& config = kConfigs[index];
    if (std::string_view(config.name).find(env_or("GANTRY_TEST_CRASH_ONLY", "")) == std::string_view::npos) return;
    for (unsigned seed = 1; seed <= seeds(); seed++) {
        INFO(config.name << ", seed " << seed);
        Qcow2Run run(config, seed * 7919 + index);
        REQUIRE_NOTHROW(run.work());
        REQUIRE(run.operations() > 50);
        CHECK(run.cut(cuts()) == "");
    }
}
