// RequestLayer: what the public verbs of Node do when a request cannot go to the driver as it is.

#pragma once

#include <cstdint>

#include "block/node.h"

namespace gantry::block {

/// The slow halves of the verbs. On the request's loop; the node outlives the call.
struct RequestLayer {
    static Task<Result<>> read(Node& n, Request& rq, uint64_t offset, IoVec iov);
    static Task<Result<>> write(Node& n, Request& rq, uint64_t offset, IoVec iov, WriteFlags flags);
    static Task<Result<>> write_zeroes(Node& n, Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    static Task<Result<>> discard(Node& n, Request& rq, uint64_t offset, uint64_t length);
    static Task<Result<>> flush(Node& n, Request& rq);
    static Task<Result<BlockStatus>> block_status(Node& n, Request& rq, uint64_t offset, uint64_t length);
    static Task<Result<size_t>> block_statuses(Node& n, Request& rq, uint64_t offset, uint64_t length,
                                               std::span<BlockStatus> out);

    /// The request fits the node's limits as it is: alignment of offset, length and memory, max_transfer and max_iov.
    static bool fits(const Limits& l, uint64_t offset, const IoVec& iov);
    /// A write that neither needs tracking nor anything after it.
    static bool plain_write(const Node& n, WriteFlags flags);

  private:
    /// Read-only, overflow and size checks of everything that changes data.
    static Result<> check_change(const Node& n, uint64_t offset, uint64_t length, const char* verb);
    static bool tracks(const Node& n) { return n.track_ || n.limits_.request_alignment > 1; }
    /// Splits, aligns and bounces; no tracking, no flush, no marking. `flags` go to the driver.
    static Task<Result<>> write_pieces(Node& n, Request& rq, uint64_t offset, IoVec iov, WriteFlags flags);
    /// One piece through a bounce buffer that covers whole alignment units.
    static Task<Result<>> write_bounced(Node& n, Request& rq, uint64_t offset, IoVec iov, WriteFlags flags);
    /// Writes zeroes from memory, in bounded pieces.
    static Task<Result<>> write_zero_data(Node& n, Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    static Task<Result<>> zero_pieces(Node& n, Request& rq, uint64_t offset, uint64_t length, WriteFlags flags);
    static Task<Result<>> discard_pieces(Node& n, Request& rq, uint64_t begin, uint64_t end);
    /// What follows every change: bitmaps (also after a failure: data may be torn), size, highest offset.
    static void changed(Node& n, uint64_t offset, uint64_t length, bool ok, bool unchanged);
};

}  // namespace gantry::block
