// Names of states and verbs, and the verb table of spec/qmp.md section 12.4.

#include <array>

#include "block/jobs/job.h"

namespace gantry::block {
namespace {

constexpr std::array<std::string_view, 11> kStatusNames = {"undefined", "created",   "running", "paused",
                                                           "ready",     "standby",   "waiting", "pending",
                                                           "aborting",  "concluded", "null"};
constexpr std::array<std::string_view, 8> kVerbNames = {"cancel",   "pause",   "resume",   "set-speed",
                                                        "complete", "dismiss", "finalize", "change"};

constexpr unsigned bit(JobStatus s) { return 1u << static_cast<unsigned>(s); }

constexpr unsigned kAtWork =
    bit(JobStatus::kRunning) | bit(JobStatus::kPaused) | bit(JobStatus::kReady) | bit(JobStatus::kStandby);

unsigned accepting(JobVerb verb) {
    switch (verb) {
        case JobVerb::kCancel:
            return bit(JobStatus::kCreated) | kAtWork | bit(JobStatus::kWaiting) | bit(JobStatus::kPending);
        case JobVerb::kPause:
        case JobVerb::kResume:
        case JobVerb::kSetSpeed:
            return bit(JobStatus::kCreated) | kAtWork;
        case JobVerb::kComplete:
            return bit(JobStatus::kReady) | bit(JobStatus::kStandby);
        case JobVerb::kDismiss:
            return bit(JobStatus::kConcluded);
        case JobVerb::kFinalize:
            return bit(JobStatus::kPending);
        case JobVerb::kChange:
            return kAtWork;
    }
    return 0;
}

}  // namespace

std::string_view job_status_name(JobStatus s) { return kStatusNames[static_cast<size_t>(s)]; }

std::string_view job_verb_name(JobVerb v) { return kVerbNames[static_cast<size_t>(v)]; }

bool job_verb_allowed(JobVerb verb, JobStatus status) { return (accepting(verb) & bit(status)) != 0; }

}  // namespace gantry::block
