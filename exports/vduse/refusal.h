// Refusal: a device that is being removed while a driver uses it answers every request with an I/O error, so that the
// driver lets go of it instead of waiting for ever.

#pragma once

#include <memory>
#include <vector>

#include "exports/vduse/queues.h"
#include "exports/virtio/inflight.h"

namespace gantry::vduse {

/// Main loop only.
class Refusal {
  public:
    Refusal(Device& device, const virtio::BlkService& service);
    ~Refusal();

    /// Goes on where queues ended; null: nobody keeps where they are.
    void start(uint64_t features, Positions positions, const std::shared_ptr<virtio::InflightFile>& file);
    /// Returns where they are now, those too that were not found.
    Task<Positions> stop();
    uint64_t refused() const { return refused_; }

  private:
    struct Line;
    Task<void> run(Line* line);
    bool refuse_all(Line& line);

    Device& device_;
    const virtio::BlkService& service_;
    Iotlb iotlb_;
    std::vector<std::unique_ptr<Line>> lines_;
    Positions positions_;  // at the start
    uint64_t refused_ = 0;
    bool stopping_ = false;
    TaskScope scope_;
};

}  // namespace gantry::vduse
