// AllocRig: an image file in memory that remembers its writes, for tests of what counts and allocates clusters. Header
// only.

#pragma once

#include <algorithm>
#include <cerrno>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/cluster_allocator.h"
#include "block/formats/qcow2/overlap_map.h"
#include "block/formats/qcow2/refcounts.h"
#include "block/node.h"
#include "tests/support/test_runtime.h"

namespace gantry::test {

/// A protocol node outside any graph. One loop.
class RecordingFile : public block::Node {
  public:
    enum class Kind : uint8_t { kRead, kWrite, kFlush, kDiscard };
    struct Op {
        Kind kind;
        uint64_t offset = 0;
        std::vector<uint8_t> data;  // of a write; zeroes of a discard
    };

    explicit RecordingFile(std::vector<uint8_t> contents, bool growable = true, block::NodeFlags flags = {})
        : Node("recording", "file0", flags), bytes(std::move(contents)) {
        limits_.can_grow_by_write = growable;
        set_size(bytes.size());
    }

    Task<Result<>> do_read(block::Request&, uint64_t offset, IoVec iov) override {
        if (fault && fault(Kind::kRead)) co_return fail_errno(EIO, "injected read error");
        reads++;
        bytes.resize(std::max<uint64_t>(bytes.size(), offset + iov.bytes));
        copy_to_iovec(iov, 0, bytes.data() + offset, iov.bytes);
        co_return Result<>();
    }
    Task<Result<>> do_write(block::Request&, uint64_t offset, IoVec iov, block::WriteFlags) override {
        const int failing = fault ? fault(Kind::kWrite) : 0;
        if (failing == EIO) co_return fail_errno(EIO, "injected write error");
        Op op{Kind::kWrite, offset, std::vector<uint8_t>(iov.bytes)};
        copy_from_iovec(iov, 0, op.data.data(), iov.bytes);
        bytes.resize(std::max<uint64_t>(bytes.size(), offset + iov.bytes));
        std::copy(op.data.begin(), op.data.end(), bytes.begin() + static_cast<ptrdiff_t>(offset));
        ops.push_back(std::move(op));
        if (failing) co_return fail_errno(EIO, "injected write error, after the write");
        co_return Result<>();
    }
    Task<Result<>> do_flush(block::Request&) override {
        if (fault && fault(Kind::kFlush)) co_return fail_errno(ENOSPC, "injected flush error");
        ops.push_back({Kind::kFlush, 0, {}});
        co_return Result<>();
    }

    Task<Result<>> do_discard(block::Request&, uint64_t offset, uint64_t length) override {
        ops.push_back({Kind::kDiscard, offset, std::vector<uint8_t>(length)});
        co_return Result<>();
    }

    /// What is on the disk after a cut when ops [0, end) had begun: everything before the last flush, and of the rest
    /// some sectors. `base`: what it was before the first.
    std::vector<uint8_t> after_cut(std::vector<uint8_t> disk, size_t end, std::mt19937& random) const {
        size_t stable = end;
        while (stable > 0 && ops[stable - 1].kind != Kind::kFlush) stable--;
        for (size_t i = 0; i < end; i++) {
            const Op& op = ops[i];
            if (op.kind == Kind::kFlush) continue;
            for (uint64_t pos = op.offset, stop = op.offset + op.data.size(); pos < stop;) {
                const uint64_t next = std::min(stop, (pos / 512 + 1) * 512);
                if (i < stable || random() % 2) {
                    if (disk.size() < next) disk.resize(next);
                    std::copy(op.data.begin() + static_cast<ptrdiff_t>(pos - op.offset),
                              op.data.begin() + static_cast<ptrdiff_t>(next - op.offset),
                              disk.begin() + static_cast<ptrdiff_t>(pos));
                }
                pos = next;
            }
        }
        return disk;
    }

    std::vector<uint8_t> bytes;
    std::vector<Op> ops;  // what succeeded
    uint64_t reads = 0;
    /// EIO: not done; another errno: done, but reported as failed; 0: nothing happens.
    std::function<int(Kind)> fault;
};

/// Version 3: 0 header, 1 refcount table, 2 the first block, which counts those three.
struct AllocRig {
    explicit AllocRig(uint32_t cluster_bits = 9, uint32_t order = 4, uint64_t cache_bytes = 0, bool growable = true,
                      uint64_t file_clusters = 3, block::qcow2::StructureSet checked = block::qcow2::kOverlapAll)
        : cluster(uint64_t{1} << cluster_bits), cache_bytes(cache_bytes) {
        header.version = 3;
        header.cluster_bits = cluster_bits;
        header.refcount_order = order;
        header.refcount_table_offset = cluster;
        header.refcount_table_clusters = 1;
        base.resize(file_clusters * cluster);
        block::qcow2::store_be32(base.data() + 20, cluster_bits);
        block::qcow2::store_be64(base.data() + 48, cluster);
        block::qcow2::store_be32(base.data() + 56, 1);
        block::qcow2::store_be32(base.data() + 96, order);
        block::qcow2::store_be64(base.data() + cluster, 2 * cluster);
        for (uint64_t i = 0; i < 3; i++) {
            block::qcow2::set_refcount_in_block({base.data() + 2 * cluster, cluster}, order, i, 1);
        }
        node = std::make_shared<RecordingFile>(base, growable);
        file = block::qcow2::ImageFile("image0", *node);
        block::qcow2::Geometry geometry;
        geometry.cluster_bits = cluster_bits;
        overlap = std::make_unique<block::qcow2::OverlapMap>(geometry, checked);
        overlap->add(block::qcow2::Structure::kMainHeader, 0, cluster);
        open();
    }
    /// What the file says is read anew.
    void open() {
        counts = std::make_unique<block::qcow2::Refcounts>(file, header, cache_bytes, overlap.get());
        allocator = std::make_unique<block::qcow2::ClusterAllocator>(*counts, file, header.cluster_bits);
        auto loaded = run(counts->load());
        if (!loaded) throw std::runtime_error(loaded.error().message());
    }

    template <class T>
    T run(Task<T> task) {
        return runtime.run(std::move(task));
    }
    /// "" or the error.
    std::string change(uint64_t first, uint64_t count, int64_t delta) {
        return text(run(counts->change(first, count, delta)));
    }
    std::string write_back() { return text(run(counts->write_back())); }
    uint64_t get(uint64_t at) { return run(counts->get(at)).value(); }
    template <class T>
    static std::string text(const Result<T>& r) {
        return r ? std::string() : r.error().message();
    }

    /// All counts that the bytes of a disk hold, and one reference to each cluster of header, table and blocks.
    struct Stored {
        std::map<uint64_t, uint64_t> counts, metadata;
    };
    static Stored stored(std::vector<uint8_t> disk) {
        using namespace block::qcow2;
        const uint32_t bits = load_be32(disk.data() + 20), order = load_be32(disk.data() + 96);
        const uint64_t size = uint64_t{1} << bits;
        const auto ensure = [&](uint64_t end) {
            if (disk.size() < end) disk.resize(end);
        };
        Stored s;
        s.metadata[0]++;
        const uint64_t table = load_be64(disk.data() + 48), clusters = load_be32(disk.data() + 56);
        ensure(table + clusters * size);
        for (uint64_t i = 0; i < clusters; i++) s.metadata[(table >> bits) + i]++;
        for (uint64_t i = 0; i < clusters * size / 8; i++) {
            const uint64_t place = load_be64(disk.data() + table + i * 8);
            if (place == 0) continue;
            s.metadata[place >> bits]++;
            ensure(place + size);
            const uint64_t per_block = size * 8 >> order;
            for (uint64_t k = 0; k < per_block; k++) {
                const uint64_t count = refcount_in_block({disk.data() + place, size}, order, k);
                if (count) s.counts[i * per_block + k] = count;
            }
        }
        return s;
    }
    /// The first cluster with fewer counts than references, in words; "" when there is none.
    static std::string undercounted(const std::vector<uint8_t>& disk, std::map<uint64_t, uint64_t> held) {
        const Stored s = stored(disk);
        for (const auto& [at, n] : s.metadata) held[at] += n;
        for (const auto& [at, n] : held) {
            auto found = s.counts.find(at);
            const uint64_t count = found == s.counts.end() ? 0 : found->second;
            if (count < n) return fmt::format("cluster {}: count {}, references {}", at, count, n);
        }
        return {};
    }
    std::vector<uint8_t> after_cut(size_t end, std::mt19937& random) const {
        return node->after_cut(base, end, random);
    }

    uint64_t cluster;
    uint64_t cache_bytes;
    std::vector<uint8_t> base;
    TestRuntime runtime;
    block::qcow2::Header header;
    std::shared_ptr<RecordingFile> node;
    block::qcow2::ImageFile file{"image0"};
    std::unique_ptr<block::qcow2::OverlapMap> overlap;
    std::unique_ptr<block::qcow2::Refcounts> counts;
    std::unique_ptr<block::qcow2::ClusterAllocator> allocator;
};

}  // namespace gantry::test
