#include "block/jobs/amend_job.h"

#include <algorithm>

#include "block/graph.h"
#include "block/image_control.h"

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

AmendJob::AmendJob(Graph& graph, std::string id, Node& node, json::object options, bool force)
    : Job("amend", options_for(std::move(id))),
      graph_(graph),
      node_(node.shared_from_this()),
      options_(std::move(options)),
      force_(force) {}

Task<Result<>> AmendJob::run() {
    set_progress(0, 1);
    const Progress progress = [this](uint64_t done, uint64_t total) {
        // The last step is the header.
        set_progress(done, total + 1);
        return !cancelled();
    };
    Result<> amended;
    {
        // The graph's lock is taken on the way, and held: nobody drains meanwhile.
        const Quiet quiet(*this);
        amended = co_await amend_image(graph_, *node_, std::move(options_), force_, progress);
    }
    const uint64_t all = std::max<uint64_t>(progress_total(), 1);
    set_progress(all, all);
    co_return amended;
}

Task<void> AmendJob::clean() {
    node_.reset();  // a concluded job holds nothing
    co_return;
}

}  // namespace gantry::block
