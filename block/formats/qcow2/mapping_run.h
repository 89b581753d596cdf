// MappingRun: adjacent pieces of guest bytes of one kind, merged while they are found. Pure.

#pragma once

#include <algorithm>
#include <cstdint>

#include "block/formats/qcow2/entries.h"

namespace gantry::block::qcow2 {

/// Grows from `begin` up to at most `limit`.
struct MappingRun {
    uint64_t begin = 0, limit = 0;
    Piece first;                             // kind, host, ... of byte `begin`; first.length counts nothing
    uint64_t length = 0;                     // bytes described so far
    uint32_t budget = 1024;                  // entries that may still be looked at: a call never holds up its loop
    bool finished = false;                   // what follows is of another kind, or limit or budget is reached
    uint64_t bad_entry = 0, bad_bitmap = 0;  // with first.damage

    MappingRun(uint64_t offset, uint64_t bytes) : begin(offset), limit(offset + bytes) {}

    uint64_t end() const { return begin + length; }
    bool is_damaged() const { return first.damage != Damage::kNone; }

    /// Takes `piece`, found at end(). Sets finished when it does not belong or is the last.
    void add(const Piece& piece) {
        if (length == 0) {
            first = piece;
            finished = piece.damage != Damage::kNone || piece.kind == Extent::Kind::kEncoded;
            if (piece.damage != Damage::kNone) return;
        } else if (piece.damage != Damage::kNone || piece.kind != first.kind || piece.allocated != first.allocated ||
                   piece.kind == Extent::Kind::kEncoded ||
                   (piece.kind == Extent::Kind::kData &&
                    (piece.host != first.host + length || piece.must_copy != first.must_copy))) {
            finished = true;
            return;
        }
        length += std::min(piece.length, limit - end());
        if (end() == limit || --budget == 0) finished = true;
    }
};

/// Reads entries from the words of one slice (index 0: the slice's first word) until the run is finished or the slice
/// ends.
template <class Words>
void extend_in_slice(const Geometry& g, uint32_t slice_shift, const Words& words, MappingRun& run) {
    const uint64_t slice_end = ((run.end() >> slice_shift) + 1) << slice_shift;
    while (!run.finished && run.end() < slice_end) {
        const auto index = static_cast<uint32_t>((run.end() & ((uint64_t{1} << slice_shift) - 1)) >> g.cluster_bits);
        const uint64_t entry = words(g.extended_l2 ? index * 2 : index);
        const uint64_t bitmap = g.extended_l2 ? words(index * 2 + 1) : 0;
        run.add(describe_entry(g, entry, bitmap, run.end()));
        if (run.is_damaged()) {
            run.bad_entry = entry;
            run.bad_bitmap = bitmap;
        }
    }
}

}  // namespace gantry::block::qcow2
