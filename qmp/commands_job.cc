// query-jobs and the job-* verbs.

#include "block/jobs/job.h"
#include "qmp/command.h"

namespace gantry::qmp {

namespace {

Task<Result<json::value>> query_jobs(Services& services, json::object) {
    json::array list;
    for (const block::Job* job : services.graph.jobs().jobs()) {
        json::object info{{"id", job->id()},
                          {"type", job->type()},
                          {"status", block::job_status_name(job->status())},
                          {"current-progress", job->progress_current()},
                          {"total-progress", job->progress_total()}};
        if (job->error()) info["error"] = job->error()->message();
        list.push_back(std::move(info));
    }
    co_return json::value(std::move(list));
}

template <Result<> (block::JobManager::*verb)(std::string_view)>
Task<Result<json::value>> job_verb(Services& services, json::object arguments) {
    co_return done((services.graph.jobs().*verb)(schema::Options(arguments).str("id")));
}

constexpr HandlerRow kHandlers[] = {
    {"query-jobs", query_jobs},
    {"job-pause", job_verb<&block::JobManager::pause>},
    {"job-resume", job_verb<&block::JobManager::resume>},
    {"job-cancel", job_verb<&block::JobManager::cancel>},
    {"job-complete", job_verb<&block::JobManager::complete>},
    {"job-finalize", job_verb<&block::JobManager::finalize>},
    {"job-dismiss", job_verb<&block::JobManager::dismiss>},
};

}  // namespace

std::span<const HandlerRow> job_handlers() { return kHandlers; }

}  // namespace gantry::qmp
