// INIT: what the kernel and we agree on for the life of a mount. Pure. spec/fuse.md section 2 "INIT".

#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include "fuse/call.h"
#include "runtime/error.h"
#include "schema/value.h"

namespace gantry::fuse {

/// What an export asks for beyond what all ask for.
struct InitWishes {
    bool cached = false;             // the kernel keeps pages, and drops them when mtime or size have changed
    bool passthrough = false;        // reads and writes may go to a backing file
    bool io_uring = false;           // requests over io_uring
    uint32_t max_write = kMaxWrite;  // bytes, whole pages
};

/// The outcome. A process that takes over the mount goes on by it: there is no second INIT.
struct Negotiated {
    uint32_t minor = 0;
    uint64_t flags = 0;          // kAsyncRead and so on
    uint32_t max_write = 0;      // bytes of one WRITE, and of one READ
    uint32_t max_readahead = 0;  // bytes
    uint16_t max_background = 0;

    bool has(uint64_t flag) const { return (flags & flag) != 0; }
    bool operator==(const Negotiated&) const = default;
    json::object save() const;
    /// kInvalid for what save() cannot have written.
    static Result<Negotiated> load(const json::object& saved);
};

struct InitAnswer {
    InitOut out;
    uint32_t out_size = 0;             // bytes of `out` to be sent
    int32_t error = 0;                 // a positive errno: nothing is served
    std::optional<Negotiated> agreed;  // absent without an error: the kernel will ask again with a version of ours
};

/// The kernel's struct, which is shorter from older ones; the rest is 0. At least 8 bytes.
InitIn parse_init(std::span<const uint8_t> args);

InitAnswer negotiate(const InitIn& in, const InitWishes& wishes);

}  // namespace gantry::fuse
