// FileService: answers requests for the one file of an export, whichever way they came.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>

#include "block/root.h"
#include "fuse/attributes.h"
#include "fuse/call.h"
#include "runtime/sync.h"
#include "runtime/task.h"

namespace gantry::fuse {

struct ServiceOptions {
    bool writable = false;
    bool growable = false;        // writes and zeroing beyond the end enlarge the node
    bool honour_o_trunc = false;  // open(O_TRUNC) cuts the file
    bool allow_other = false;     // somebody else than the mounting user can get here: modes and owners may be changed
    bool cached = false;          // the kernel may keep pages (read-only exports)
    uint32_t uid = 0, gid = 0;    // who owns the file
    /// Makes the node `size` bytes long; only called on the main loop. `grow_only`: nothing happens when it is as
    /// large.
    std::function<Task<Result<>>(uint64_t size, bool grow_only)> resize;
};

/// Any loop unless said otherwise: each call on the loop of the channel that is passed with it. spec/fuse.md section 1.
class FileService {
  public:
    FileService(Loop& main_loop, ServiceOptions options);
    ~FileService();

    /// Answers at once what needs no waiting; false: answer() must.
    bool try_answer(Call& call, block::Channel& channel);
    /// Answers (or marks it silent). `call` and its memory stay until completion.
    Task<void> answer(Call& call, block::Channel& channel);

    /// From now on OPEN hands out the file behind this id of the kernel (passthrough); 0: no longer.
    void set_backing(int32_t backing_id) { backing_id_.store(backing_id, std::memory_order_relaxed); }
    /// The node has another size, changed by whomever: the file has changed.
    void touched();
    /// Files that are open at present. READs and WRITEs need one.
    uint64_t open_files() const { return open_files_.load(std::memory_order_relaxed); }
    Attributes& attributes() { return attributes_; }

  private:
    Loop& main_loop_;
    ServiceOptions options_;
    Attributes attributes_;
    std::atomic<int32_t> backing_id_{0};
    std::atomic<uint64_t> open_files_{0};
};

}  // namespace gantry::fuse
