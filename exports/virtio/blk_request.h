// BlkRequest: one request of virtio-blk (VIRTIO 1.2, section 5.2.6), from its chain to its status.

#pragma once

#include <cstddef>
#include <cstdint>

#include "block/root.h"
#include "exports/virtio/blk_device.h"
#include "exports/virtio/ring.h"
#include "runtime/iovec.h"

namespace gantry::virtio {

enum class BlkType : uint32_t { kIn = 0, kOut = 1, kFlush = 4, kGetId = 8, kDiscard = 11, kWriteZeroes = 13 };
enum class BlkStatus : uint8_t { kOk = 0, kIoError = 1, kUnsupported = 2 };

/// Reused for one request after another.
struct BlkRequest {
    Chain chain;
    // Set by begin():
    BlkType type{};
    uint64_t offset = 0;          // bytes
    IoVec data;                   // without header and status; parts of `chain`
    std::byte* status = nullptr;  // where the driver looks
    bool stable = false;          // a write is answered when it is stable
    // The answer:
    BlkStatus answer = BlkStatus::kOk;
    uint32_t written = 0;  // bytes of the writable part, for the used ring; counts the status

    void finish(BlkStatus how, uint64_t data_written = 0) {
        answer = how;
        written = static_cast<uint32_t>(data_written) + 1;
    }
};

/// Answers requests, whichever transport brought them. Any loop.
class BlkService {
  public:
    explicit BlkService(BlkDevice& device) : device_(device) {}

    /// Looks at `request.chain`: header and status are taken off. What it says breaks the ring, as there is no header
    /// or no place for a status; null: nothing.
    const char* begin(BlkRequest& request) const;
    /// True: answered at once, by memory or page cache. Writes nothing to the status byte yet.
    bool try_answer(BlkRequest& request, block::Channel& channel) const;
    /// The same for what takes longer. `request` and `channel` stay until completion.
    Task<void> answer(BlkRequest& request, block::Channel& channel) const;
    /// Puts the answer where the driver looks.
    static void write_status(const BlkRequest& request) { *request.status = static_cast<std::byte>(request.answer); }
    BlkDevice& device() const { return device_; }

  private:
    bool fits(const BlkRequest& request) const;
    void answer_id(BlkRequest& request) const;
    Task<void> answer_ranges(BlkRequest& request, block::Channel& channel) const;
    BlkDevice& device_;
};

}  // namespace gantry::virtio
