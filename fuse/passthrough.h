// Passthrough: the kernel reads and writes the image's file by itself, and no request for data reaches us. spec/fuse.md
// section 7.

#pragma once

#include <cstdint>
#include <memory>

#include "block/root.h"
#include "fuse/init.h"
#include "runtime/error.h"
#include "schema/value.h"

namespace gantry::fuse {

/// Main loop only. Holds the lease of the root for as long as it lives, so the graph refuses what would change the way
/// to the file.
class Passthrough {
  public:
    /// Names the file of `root` to the kernel. `device`: of /dev/fuse; stays open longer. Errors: kUnsupported,
    /// kPermission with what stands in the way.
    static Result<std::unique_ptr<Passthrough>> open(block::Root& root, int device, const Negotiated& agreed);
    /// Goes on with what a process before this one has named; kInvalid when the file is another one now.
    static Result<std::unique_ptr<Passthrough>> inherit(block::Root& root, int device, const json::object& saved);
    /// Opens of clients go on reading and writing the file.
    ~Passthrough();
    Passthrough(const Passthrough&) = delete;

    int32_t id() const { return id_; }  // the kernel's
    int fd() const { return fd_; }      // the node's
    json::object save() const;
    /// Whoever keeps the connection keeps the file named.
    void leave() { left_ = true; }

  private:
    Passthrough(block::Root& root, int device) : root_(root), device_(device) {}
    /// Takes the lease, and looks whether the file is what clients should see.
    Result<> lease();

    block::Root& root_;
    const int device_;
    int32_t id_ = 0;
    int fd_ = -1;
    bool leased_ = false;
    bool left_ = false;
    uint64_t file_device_ = 0, file_inode_ = 0;
};

}  // namespace gantry::fuse
