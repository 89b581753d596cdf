#include "block/formats/qcow2/create_layout.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/encryption.h"
#include "block/formats/qcow2/entries.h"
#include "runtime/check.h"

namespace gantry::block::qcow2 {

namespace {

uint64_t divide_up(uint64_t value, uint64_t by) { return value / by + (value % by != 0); }

/// Counts of 1 for the first `counted` of the counts that begin with number `first`; as many as `to` has room for.
void fill_counts(uint32_t order, uint64_t first, uint64_t counted, std::span<uint8_t> to) {
    std::ranges::fill(to, uint8_t{0});
    const uint64_t room = (to.size() * 8) >> order;
    const uint64_t ones = counted > first ? std::min(counted - first, room) : 0;
    if (order >= 3) {
        const uint64_t bytes = uint64_t{1} << (order - 3);
        for (uint64_t i = 0; i < ones; i++) to[(i + 1) * bytes - 1] = 1;
        return;
    }
    // Several counts in a byte, from its lowest bit on: one byte of ones repeats.
    static constexpr uint8_t kOnes[] = {0xff, 0x55, 0x11};
    const uint64_t each = uint64_t{8} >> order;
    std::fill_n(to.begin(), ones / each, kOnes[order]);
    if (const uint64_t rest = ones % each) {
        to[ones / each] = static_cast<uint8_t>(kOnes[order] & ((1u << (rest << order)) - 1));
    }
}

/// Entries of 8 bytes from number `first` on, made by `entry(number)`.
template <class Entry>
void fill_entries(uint64_t first, std::span<uint8_t> to, Entry entry) {
    for (size_t at = 0; at < to.size(); at += 8) store_be64(to.data() + at, entry(first + at / 8));
}

uint64_t l2_word(const CreateLayout& l, uint64_t number) {
    const uint32_t bits = l.geometry.cluster_bits;
    const uint64_t cluster = l.geometry.extended_l2 ? number / 2 : number;
    if (cluster >= l.mapped) return 0;
    if (l.geometry.extended_l2 && number % 2 == 1) {
        // No subcluster is allocated: backing file or zeroes show. A raw data file holds them all.
        if (l.geometry.raw_external_data) return 0xffffffff;
        return 0;
    }
    const uint64_t place = l.geometry.external_data ? cluster << bits : l.data_offset + (cluster << bits);
    return place | kCopied | (l.zero_entries && !l.geometry.extended_l2 ? kReadsAsZero : 0);
}

}  // namespace

RefcountSpace refcount_space(uint64_t clusters, uint32_t cluster_bits, uint32_t refcount_order) {
    const uint64_t counts_per_block = (uint64_t{8} << cluster_bits) >> refcount_order;
    const uint64_t entries_per_cluster = uint64_t{1} << (cluster_bits - 3);
    RefcountSpace space;
    for (;;) {
        const uint64_t all = clusters + space.table_clusters + space.blocks;
        const uint64_t blocks = divide_up(all, counts_per_block);
        const uint64_t table_clusters = divide_up(blocks, entries_per_cluster);
        if (blocks == space.blocks && table_clusters == space.table_clusters) return space;
        space = {table_clusters, blocks};
    }
}

Result<CreateLayout> plan_layout(const CreateOptions& o, uint64_t crypto_bytes) {
    CreateLayout l;
    l.geometry = o.geometry();
    l.refcount_order = o.refcount_order;
    l.zero_entries = crypto_bytes != 0;
    const uint64_t size = o.cluster_size();
    const bool mapped = o.preallocation != Preallocation::kOff;
    l.l1_entries = l.geometry.l1_entries_for(o.size);
    l.mapped = mapped ? o.disk_clusters() : 0;
    l.l2_tables = mapped ? l.l1_entries : 0;
    // An L1 table has a place even when it has no entries.
    const uint64_t l1_clusters = std::max<uint64_t>(1, divide_up(l.l1_entries * 8, size));
    const uint64_t crypto_clusters = divide_up(crypto_bytes, size);
    const uint64_t data_clusters = o.data_file ? 0 : l.mapped;
    const uint64_t others = 1 + l1_clusters + crypto_clusters + l.l2_tables + data_clusters;
    const RefcountSpace space = refcount_space(others, o.cluster_bits, o.refcount_order);
    if (space.table_clusters > kMaxRefcountTableBytes >> o.cluster_bits) {
        return fail(ErrorKind::kTooLarge,
                    "The image size is too large for file format 'qcow2' (try using a larger cluster size); its "
                    "refcount table would have {} bytes, more than {}",
                    space.table_clusters << o.cluster_bits, kMaxRefcountTableBytes);
    }
    l.refcount_table_bytes = space.table_clusters * size;
    l.refcount_blocks = space.blocks;
    l.clusters = others + space.table_clusters + space.blocks;

    l.refcount_table_offset = size;
    l.refcount_block_offset = l.refcount_table_offset + l.refcount_table_bytes;
    l.l1_offset = l.refcount_block_offset + space.blocks * size;
    l.crypto_offset = l.l1_offset + l1_clusters * size;
    l.crypto_bytes = crypto_clusters * size;
    l.l2_offset = l.crypto_offset + l.crypto_bytes;
    l.data_offset = l.l2_offset + l.l2_tables * size;
    if (l.file_bytes() >> o.cluster_bits != l.clusters || l.file_bytes() > kOffsetMask) {
        return fail(ErrorKind::kTooLarge,
                    "The image size is too large for file format 'qcow2'; preallocated, its file would have {} "
                    "clusters of {} bytes",
                    l.clusters, size);
    }
    return l;
}

void fill_metadata(const CreateLayout& l, uint64_t offset, std::span<uint8_t> to) {
    const uint64_t size = l.geometry.cluster_size();
    CHECK(offset >= size && offset + to.size() <= l.data_offset && offset % 8 == 0 && to.size() % 8 == 0,
          "only metadata behind the first cluster");
    while (!to.empty()) {
        // The part that holds `offset`; one of them does.
        uint64_t end;
        if (offset < l.refcount_block_offset) {
            end = l.refcount_block_offset;
        } else if (offset < l.l1_offset) {
            end = l.l1_offset;
        } else if (offset < l.crypto_offset) {
            end = l.crypto_offset;
        } else {
            end = offset < l.l2_offset ? l.l2_offset : l.data_offset;
        }
        const std::span<uint8_t> part = to.first(std::min<uint64_t>(to.size(), end - offset));
        if (end == l.refcount_block_offset) {
            fill_entries((offset - l.refcount_table_offset) / 8, part,
                         [&](uint64_t i) { return i < l.refcount_blocks ? l.refcount_block_offset + i * size : 0; });
        } else if (end == l.l1_offset) {
            const uint64_t first = ((offset - l.refcount_block_offset) * 8) >> l.refcount_order;
            fill_counts(l.refcount_order, first, l.clusters, part);
        } else if (end == l.crypto_offset) {
            fill_entries((offset - l.l1_offset) / 8, part,
                         [&](uint64_t i) { return i < l.l2_tables ? (l.l2_offset + i * size) | kCopied : 0; });
        } else if (end == l.l2_offset && offset < l.l2_offset) {
            std::ranges::fill(part, uint8_t{0});
        } else {
            fill_entries((offset - l.l2_offset) / 8, part, [&](uint64_t i) { return l2_word(l, i); });
        }
        to = to.subspan(part.size());
        offset += part.size();
    }
}

Image new_image(const CreateOptions& o, const CreateLayout& l, std::string data_file, uint64_t crypto_bytes) {
    Image image;
    Header& h = image.header;
    h.version = o.version;
    h.cluster_bits = o.cluster_bits;
    h.size = o.size;
    h.l1_size = static_cast<uint32_t>(l.l1_entries);
    h.l1_table_offset = l.l1_offset;
    h.refcount_table_offset = l.refcount_table_offset;
    h.refcount_table_clusters = static_cast<uint32_t>(l.refcount_table_bytes >> o.cluster_bits);
    h.refcount_order = o.refcount_order;
    h.compression_type = o.compression_type;
    if (o.data_file) h.incompatible_features |= kIncompatDataFile;
    if (o.compression_type != 0) h.incompatible_features |= kIncompatCompression;
    if (o.extended_l2) h.incompatible_features |= kIncompatExtendedL2;
    if (o.lazy_refcounts) h.compatible_features |= kCompatLazyRefcounts;
    if (o.data_file_raw) h.autoclear_features |= kAutoclearRawData;
    if (crypto_bytes != 0) {
        h.crypt_method = kCryptLuks;
        image.extensions.crypto = CryptoExtension{l.crypto_offset, crypto_bytes};
    }
    image.backing_name = o.backing_file;
    image.extensions.backing_format = o.backing_format;
    image.extensions.data_file = std::move(data_file);
    image.geometry = o.geometry();
    image.disk_size = o.size;
    return image;
}

}  // namespace gantry::block::qcow2
