// Extent: what a format knows about a guest range.

#pragma once

#include <cstdint>

namespace gantry::block {

class Node;

struct Extent {
    enum class Kind : uint8_t {
        kData,         // the bytes are at (node, offset)
        kZero,         // reads as zeroes
        kUnallocated,  // ask the backing file, else zeroes
        kEncoded,      // the format must decode it (compressed cluster): FormatNode::read_encoded
    };
    Kind kind = Kind::kUnallocated;
    bool allocated = false;  // this layer decides (also for kZero)
    bool must_copy = false;  // kData: shared, a write needs a new place
    bool transform = false;  // encryption or the like: FormatNode::decode_in_place / encode_in_place
    uint64_t length =
        0;  // bytes from the asked offset on, > 0; down to subcluster granularity; contiguous on the host for kData
    Node* node = nullptr;  // kData
    uint64_t offset = 0;   // kData: host offset of the first byte asked for; kEncoded: the format's own handle
    uint64_t cookie = 0;   // kEncoded: the format's own
};

}  // namespace gantry::block
