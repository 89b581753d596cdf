#include "block/jobs/create_job.h"

#include <algorithm>

#include "block/create.h"
#include "block/graph.h"

namespace gantry::block {

namespace {

JobOptions options_for(std::string id) {
    JobOptions options;
    options.id = std::move(id);
    options.auto_dismiss = false;
    options.is_block_job = false;
    return options;
}

}  // namespace

CreateJob::CreateJob(Graph& graph, std::string id, json::object options)
    : Job("create", options_for(std::move(id))), graph_(graph), options_(std::move(options)) {}

Task<Result<>> CreateJob::run() {
    set_progress(0, 1);
    const Progress progress = [this](uint64_t done, uint64_t total) {
        // The last step is the header.
        set_progress(done, total + 1);
        return !cancelled();
    };
    Result<> made;
    {
        // The graph's lock is taken on the way. All requests go through channels, which drains stop and wait for.
        const Quiet quiet(*this);
        made = co_await create_image(graph_, std::move(options_), progress);
    }
    const uint64_t all = std::max<uint64_t>(progress_total(), 1);
    set_progress(all, all);
    co_return made;
}

}  // namespace gantry::block
