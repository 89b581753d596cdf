// Record: requests that were taken and not answered, noted where they outlive this process.

#pragma once

#include <memory>
#include <string>

#include "exports/keeper.h"
#include "exports/vduse/kernel.h"
#include "exports/virtio/inflight.h"

namespace gantry::vduse {

/// Of one device. Without a keeper nothing is noted: a process that is killed then leaves a device whose requests
/// nobody can tell apart. Main loop only.
class Record {
  public:
    /// `keeper`: null for none.
    Record(exports::Keeper* keeper, const std::string& export_id, uint16_t queues, uint16_t queue_size);

    /// What a process before this one has left for rings of this kind; once; null: nothing. Untrusted. kInvalid when it
    /// is of other rings: it stays where it is, for a process that fits it.
    Result<std::shared_ptr<virtio::InflightFile>> inherit(bool packed);
    /// An empty one, for rings that begin. Null, with why_not(), when nobody keeps it.
    std::shared_ptr<virtio::InflightFile> begin(bool packed);
    /// Of the rings that run, or ran last; null: nobody keeps it.
    const std::shared_ptr<virtio::InflightFile>& file() const { return file_; }
    const std::string& why_not() const { return why_not_; }
    /// The driver has reset the device, and nothing is in flight: what was noted means nothing any more.
    void forget();
    /// The device is gone: nothing is kept any more.
    void drop();
    bool inherited() const { return inherited_; }
    bool kept() const { return file_ != nullptr; }

  private:
    exports::Keeper* const keeper_;
    const std::string name_;
    const uint16_t queues_, queue_size_;
    std::shared_ptr<virtio::InflightFile> file_;
    std::string why_not_;
    bool inherited_ = false;
};

/// What the process before this one has left and no export has taken is kept no longer, unless a driver still waits for
/// somebody to go on with its device.
void give_up_records(exports::Keeper& keeper, Kernel& kernel = Kernel::running());

}  // namespace gantry::vduse
