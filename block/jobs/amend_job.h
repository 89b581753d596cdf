// The job of x-blockdev-amend.

#pragma once

#include <memory>
#include <string>

#include "block/jobs/job.h"
#include "block/node.h"
#include "schema/value.h"

namespace gantry::block {

class Graph;

/// Changes properties of one image. Not a block job: it has no BLOCK_JOB_* events. Cannot be paused in the middle;
/// job-cancel ends it at the next point where the image is whole.
class AmendJob final : public Job {
  public:
    /// `options`: a validated BlockdevAmendOptions of the node's driver.
    AmendJob(Graph& graph, std::string id, Node& node, json::object options, bool force);

  protected:
    Task<Result<>> run() override;
    Task<void> clean() override;

  private:
    Graph& graph_;
    std::shared_ptr<Node> node_;
    json::object options_;
    bool force_;
};

}  // namespace gantry::block
