// Request: the context that travels down the graph with one operation; and the words operations use.

#pragma once

#include <cstdint>

namespace gantry {
class Loop;
}

namespace gantry::block {

class Channel;
class Node;

/// Lives in the frame of whoever began the operation (Channel, job worker, a node's own work) until it ended. On one
/// loop.
struct Request {
    Loop* loop = nullptr;
    Channel* channel = nullptr;  // null: internal (opening, jobs' metadata)
    uint64_t epoch = 0;          // begin order on its channel; see Graph::quarantine
    bool inline_tried =
        false;  // try_read() or try_write() said "would block", or the caller wants it done beside the loop

    /// An operation begun by the graph or a node itself on the current loop.
    static Request internal();
};

/// Flags of write and write_zeroes.
enum class WriteFlags : uint8_t {
    kNone = 0,
    kFua = 1 << 0,          // reply only when this data is stable
    kMayUnmap = 1 << 1,     // write_zeroes: the range may become a hole (absent: must stay allocated)
    kNoFallback = 1 << 2,   // write_zeroes: fail with kUnsupported (ENOTSUP) rather than write zeroes slowly
    kUnchanged = 1 << 3,    // what is written is what reads return already (copy on read)
    kSerialising = 1 << 4,  // excludes overlapping requests while it runs
    kCompressed = 1 << 5,   // store compressed where the format can
};
constexpr WriteFlags operator|(WriteFlags a, WriteFlags b) {
    return static_cast<WriteFlags>(static_cast<uint8_t>(a) | static_cast<uint8_t>(b));
}
constexpr WriteFlags operator&(WriteFlags a, WriteFlags b) {
    return static_cast<WriteFlags>(static_cast<uint8_t>(a) & static_cast<uint8_t>(b));
}
constexpr WriteFlags operator~(WriteFlags a) { return static_cast<WriteFlags>(~static_cast<uint8_t>(a)); }
constexpr bool has(WriteFlags set, WriteFlags flag) { return (set & flag) != WriteFlags::kNone; }

/// Limits of a node. All sizes in bytes; powers of two unless noted; 0 = none.
struct Limits {
    uint32_t request_alignment =
        1;  // offsets and lengths of read/write below this are read-modify-written by the request layer
    uint32_t memory_alignment = 1;  // of iovec bases and lengths (O_DIRECT)
    uint64_t max_transfer = 0;      // of read/write; larger requests are split
    uint32_t max_iov = 1024;
    uint32_t discard_alignment = 1;  // discards shrink inward to it
    uint64_t max_discard = 0;
    uint32_t zeroes_alignment = 1;
    uint64_t max_zeroes = 0;
    uint32_t optimal_transfer = 0;   // hint for exporters (cluster size)
    bool can_grow_by_write = false;  // a write beyond size() extends the node (protocol nodes below formats)
    bool supports_fua = false;       // write with kFua is passed to the driver; else the request layer adds a flush
    bool supports_zeroes = false;    // do_write_zeroes exists; else (or on kUnsupported) zeroes are written
    bool partial_zeroes =
        false;  // do_write_zeroes also takes ranges not aligned to zeroes_alignment, whole requests (formats)
};

/// Answer of block_status for [offset, offset + length).
struct BlockStatus {
    uint64_t length = 0;     // > 0, neighbours of the same kind merged as far as cheap; <= the requested length
    bool data = false;       // there are bytes stored for it in this layer or below
    bool zero = false;       // reads as zeroes
    bool allocated = false;  // decided by this layer (not by a backing file)
    bool compressed = false;
    bool encrypted = false;
    bool eof = false;      // the range reaches the end of the node
    Node* file = nullptr;  // with has_offset: the node and offset that hold the bytes as they are
    uint64_t host_offset = 0;
    bool has_offset = false;
    uint32_t depth = 0;  // 0: unallocated everywhere; 1: this layer; 2: first backing; ...
};

}  // namespace gantry::block
