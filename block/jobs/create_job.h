// The job of blockdev-create.

#pragma once

#include <string>

#include "block/jobs/job.h"
#include "schema/value.h"

namespace gantry::block {

class Graph;

/// Makes one image. Not a block job: it has no BLOCK_JOB_* events. Cannot be paused in the middle; job-cancel ends it
/// at the next step of a long preallocation.
class CreateJob final : public Job {
  public:
    /// `options`: a validated BlockdevCreateOptions of a driver that can make images.
    CreateJob(Graph& graph, std::string id, json::object options);

  protected:
    Task<Result<>> run() override;

  private:
    Graph& graph_;
    json::object options_;
};

}  // namespace gantry::block
