// What the entries of L2 tables refer to, and how damaged ones are mended (spec/qcow2.md section 17).

#include <algorithm>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check_references.h"
#include "block/formats/qcow2/entries.h"

namespace gantry::block::qcow2 {

namespace {

constexpr size_t kMaxRounded = 64 * 1024;

/// What is wrong with an entry: the first thing.
enum class Fault : uint8_t {
    kNone,
    kReserved,
    kZeroFlag,  // bit 0 where it has no meaning
    kCompressedCopied,
    kCompressedOutside,  // of the image file: the data is in an external one
    kCompressedBitmap,
    kAllocatedAndZero,
    kAllocatedNowhere,
    kUnaligned,
    kBeyondEnd,
    kElsewhere,  // external data: not at its guest offset
    kOnTable,    // on the header or the active L1 table; only a repair looks for it, a check sees two references
};

struct Words {
    uint64_t word = 0, bitmap = 0;
};

struct Sectors {
    uint64_t offset = 0, bytes = 0;
};

Sectors sectors_of(const Geometry& g, uint64_t word) {
    const uint32_t x = 62 - (g.cluster_bits - 8);
    const uint64_t sectors = ((word & ~kCopied & ~kCompressed) >> x) + 1;
    const uint64_t offset = word & ((uint64_t{1} << x) - 1);
    return {offset, sectors * 512 - (offset & 511)};
}

Fault find_fault(const CheckRun& run, Words e, uint64_t guest) {
    const Geometry& g = run.g;
    if (e.word & kCompressed) {
        if (e.word & kCopied) return Fault::kCompressedCopied;
        if (g.external_data) return Fault::kCompressedOutside;
        if (e.bitmap != 0) return Fault::kCompressedBitmap;
        const Sectors blob = sectors_of(g, e.word);
        return run.outside(blob.offset, blob.bytes) ? Fault::kBeyondEnd : Fault::kNone;
    }
    if (e.word & kReservedInL2) return Fault::kReserved;
    if ((e.word & kReadsAsZero) && (g.extended_l2 || !g.zero_flag)) return Fault::kZeroFlag;
    const auto allocated = static_cast<uint32_t>(e.bitmap), zero = static_cast<uint32_t>(e.bitmap >> 32);
    if (!names_place(g, e.word)) return allocated ? Fault::kAllocatedNowhere : Fault::kNone;
    if (allocated & zero) return Fault::kAllocatedAndZero;
    const uint64_t host = e.word & kOffsetMask;
    if (g.offset_in_cluster(host) != 0) return Fault::kUnaligned;
    if (g.external_data) return host == guest ? Fault::kNone : Fault::kElsewhere;
    return run.outside(host, g.cluster_size()) ? Fault::kBeyondEnd : Fault::kNone;
}

/// Nothing of this cluster can be read any more. Zeroes hide what a backing file has there; version 2 has no zeroes.
Words lost(const Geometry& g) {
    if (g.extended_l2) return {0, 0xffffffff00000000};
    return {g.zero_flag ? kReadsAsZero : 0, 0};
}

/// The entry without `fault`; keeps whatever can be kept.
Words mend(const CheckRun& run, Words e, Fault fault, uint64_t guest) {
    switch (fault) {
        case Fault::kNone:
            return e;
        case Fault::kReserved:
            return {e.word & ~kReservedInL2, e.bitmap};
        case Fault::kZeroFlag:
            return {e.word & ~kReadsAsZero, e.bitmap};
        case Fault::kCompressedCopied:
            return {e.word & ~kCopied, e.bitmap};
        case Fault::kCompressedBitmap:
            return {e.word, 0};
        case Fault::kAllocatedAndZero:  // the bytes are all there is
            return {e.word, e.bitmap & ~(e.bitmap << 32)};
        case Fault::kAllocatedNowhere:
            return {e.word, (e.bitmap | e.bitmap << 32) & 0xffffffff00000000};
        case Fault::kUnaligned: {
            const uint64_t rounded = (e.word & kOffsetMask) & ~(run.cluster_size() - 1);
            if (run.g.external_data || run.adopted.contains(run.cluster_of(rounded)))
                return {(e.word & ~kOffsetMask) | rounded, e.bitmap};
            return lost(run.g);
        }
        case Fault::kElsewhere:
            return {(e.word & ~kOffsetMask) | guest, e.bitmap};
        case Fault::kCompressedOutside:
        case Fault::kBeyondEnd:
        case Fault::kOnTable:
            return lost(run.g);
    }
    return lost(run.g);
}

void report(CheckRun& run, const L2Ref& table, uint64_t index, Words e, Fault fault) {
    const uint64_t times = table.times(), host = e.word & kOffsetMask;
    switch (fault) {
        case Fault::kNone:
            return;
        case Fault::kReserved:
            return run.corruption(times, "ERROR found l2 entry with reserved bits set: {:x}", e.word);
        case Fault::kZeroFlag:
            return run.corruption(times, "ERROR l2 entry {:x} has bit 0 set, which has no meaning in this image",
                                  e.word);
        case Fault::kCompressedCopied:
            return run.corruption(times, "ERROR: coffset={:#x}: copied flag must never be set for compressed clusters",
                                  sectors_of(run.g, e.word).offset);
        case Fault::kCompressedOutside:
            return run.corruption(times, "ERROR compressed cluster {} with data file, entry={:#x}", index, e.word);
        case Fault::kCompressedBitmap:
            return run.corruption(times,
                                  "ERROR compressed cluster {} with non-zero subcluster allocation bitmap, entry={:#x}",
                                  index, e.word);
        case Fault::kAllocatedAndZero:
            return run.corruption(
                times, "ERROR offset={:x}: Allocated cluster has corrupted subcluster allocation bitmap", host);
        case Fault::kAllocatedNowhere:
            return run.corruption(times, "ERROR: Unallocated cluster has non-zero subcluster allocation map");
        case Fault::kUnaligned:
            return run.corruption(times, "ERROR offset={:x}: {} cluster is not properly aligned; L2 entry corrupted.",
                                  host, (e.word & kReadsAsZero) ? "Preallocated" : "Data");
        case Fault::kElsewhere:
            return run.corruption(times,
                                  "ERROR external data file host cluster offset {:#x} does not match its guest cluster "
                                  "(L2 offset: {:#x}, L2 index: {})",
                                  host, table.offset, index);
        case Fault::kBeyondEnd:
        case Fault::kOnTable:
            return;  // count() says it
    }
}

/// Whether the bytes of an entry without faults are in truth those of the header or of the active L1 table, which are
/// written in place: the guest would read what it never wrote, and might change them.
bool lies_on_table(const CheckRun& run, Words e) {
    if (run.g.external_data) return false;
    const MetadataRange l1{run.image.header.l1_table_offset, uint64_t{run.image.header.l1_size} * 8, true};
    Sectors place{e.word & kOffsetMask, run.cluster_size()};
    if (e.word & kCompressed) {
        place = sectors_of(run.g, e.word);
    } else if (!names_place(run.g, e.word)) {
        return false;
    }
    return place.offset < run.cluster_size() || l1.touches(place.offset, place.bytes);
}

/// The check goes on with the entry as if it were mended.
bool can_be_read_on(Fault fault) {
    return fault == Fault::kReserved || fault == Fault::kZeroFlag || fault == Fault::kCompressedCopied;
}

/// One table's walk; statistics are those of the active disk.
class TableWalk {
  public:
    TableWalk(CheckRun& run, const L2Ref& table) : run_(run), g_(run.g), table_(table), times_(table.times()) {}

    /// An entry without faults, or one that is counted although it has some.
    void take(Words e) {
        if (e.word & kCompressed) {
            const Sectors blob = sectors_of(g_, e.word);
            run_.count(blob.offset, blob.bytes, times_);
            compressed_++;
            return;
        }
        if (!names_place(g_, e.word)) return;
        const uint64_t host = e.word & kOffsetMask;
        place(host);
        if (!g_.external_data) run_.count(host, g_.cluster_size(), times_);
    }
    /// The same for the common kind, which lies inside the file.
    void take_plain(uint64_t host) {
        place(host);
        run_.counts.add(host >> g_.cluster_bits, times_);
    }
    void finish() {
        run_.found.allocated_clusters = *run_.found.allocated_clusters + table_.active * (placed_ + compressed_);
        run_.found.compressed_clusters = *run_.found.compressed_clusters + table_.active * compressed_;
        run_.found.fragmented_clusters = *run_.found.fragmented_clusters + table_.active * (fragmented_ + compressed_);
    }

  private:
    void place(uint64_t host) {
        placed_++;
        if (next_ != 0 && host != next_) fragmented_++;
        next_ = host + g_.cluster_size();
    }

    CheckRun& run_;
    const Geometry& g_;
    const L2Ref& table_;
    const uint64_t times_;
    uint64_t next_ = 0, placed_ = 0, fragmented_ = 0, compressed_ = 0;
};

}  // namespace

bool count_table(CheckRun& run, const L2Ref& table, std::span<uint8_t> bytes) {
    const Geometry& g = run.g;
    const uint32_t entry_bytes = g.l2_entry_bytes();
    const uint64_t guest = table.l1_index << g.l1_shift();
    // An ordinary data cluster inside the file: nothing but a place and perhaps COPIED.
    const uint64_t odd = ~(kCopied | (kOffsetMask & ~(g.cluster_size() - 1)));
    const uint64_t plain_end = g.external_data || g.extended_l2 ? 0 : run.file_bytes & ~(g.cluster_size() - 1);
    const bool mends = run.mends(table.offset);
    bool changed = false;
    TableWalk walk(run, table);
    for (size_t at = 0; at < bytes.size(); at += entry_bytes) {
        Words e{load_be64(bytes.data() + at), g.extended_l2 ? load_be64(bytes.data() + at + 8) : 0};
        if (e.word == 0 && static_cast<uint32_t>(e.bitmap) == 0) continue;
        const uint64_t host = e.word & kOffsetMask;
        if ((e.word & odd) == 0 && host != 0 && host < plain_end && !(mends && lies_on_table(run, e))) [[likely]] {
            walk.take_plain(host);
            continue;
        }
        const uint64_t index = at / entry_bytes;
        const uint64_t here = guest + (index << g.cluster_bits);
        bool counted = true;
        bool mended = false;
        const auto next_fault = [&] {
            const Fault fault = find_fault(run, e, here);
            return fault == Fault::kNone && mends && lies_on_table(run, e) ? Fault::kOnTable : fault;
        };
        for (Fault fault; (fault = next_fault()) != Fault::kNone;) {
            if (!mends) report(run, table, index, e, fault);
            if (!mends && !can_be_read_on(fault)) {
                // What cannot be told apart is counted as it stands, so that nothing of it is given away.
                counted = fault == Fault::kUnaligned || fault == Fault::kBeyondEnd || fault == Fault::kElsewhere;
                if (fault == Fault::kUnaligned) {
                    run.unseen = true;
                    if (run.rounded.size() < kMaxRounded) run.rounded.push_back(run.cluster_of(host));
                }
                if (!counted) run.unseen = true;
                break;
            }
            e = mend(run, e, fault, here);
            mended = true;
        }
        if (mends && mended) {
            store_be64(bytes.data() + at, e.word);
            if (g.extended_l2) store_be64(bytes.data() + at + 8, e.bitmap);
            run.mended++;
            changed = true;
        }
        if (counted) walk.take(e);
    }
    walk.finish();
    return changed;
}

}  // namespace gantry::block::qcow2
