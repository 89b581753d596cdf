// blockdev-create.

#include "block/create.h"
#include "block/jobs/create_job.h"
#include "qmp/command.h"

namespace gantry::qmp {

namespace {

Task<Result<json::value>> blockdev_create(Services& services, json::object arguments) {
    json::object options = std::move(arguments.at("options").as_object());
    CO_CHECK(block::check_creatable(services.graph, options.at("driver").as_string()));
    auto job = std::make_unique<block::CreateJob>(services.graph, std::string(arguments.at("job-id").as_string()),
                                                  std::move(options));
    CO_TRY([[maybe_unused]] block::Job * started, services.graph.jobs().start(std::move(job)));
    co_return done({});
}

constexpr HandlerRow kHandlers[] = {{"blockdev-create", blockdev_create}};

}  // namespace

std::span<const HandlerRow> create_handlers() { return kHandlers; }

}  // namespace gantry::qmp
