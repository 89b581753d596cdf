// Jobs: their states and the commands that steer them.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr EnumValue kJobTypeValues[] = {
    {"commit", "moves data into a backing image"},
    {"stream", "moves data up from backing images"},
    {"mirror", "copies a disk and keeps the copy up to date"},
    {"backup", "copies a disk as it was at one moment"},
    {"create", "creates an image"},
    {"amend", "changes an image"},
};
constinit const Type kJobType = enum_type("JobType", "The kinds of jobs.", kJobTypeValues);

constexpr EnumValue kJobStatusValues[] = {
    {"undefined", "never seen"},
    {"created", "made, not started"},
    {"running", "at work"},
    {"paused", "paused while running"},
    {"ready", "in step with its source, waiting to be completed"},
    {"standby", "paused while ready"},
    {"waiting", "done, waiting for the other jobs of its transaction"},
    {"pending", "done, waiting to be finalized"},
    {"aborting", "failed or cancelled, cleaning up"},
    {"concluded", "over, waiting to be dismissed"},
    {"null", "gone"},
};
constinit const Type kJobStatus = enum_type("JobStatus", "The states of a job.", kJobStatusValues);

constexpr Member kIdMembers[] = {required("id", kStr, "the job")};
constinit const Type kIdArguments = struct_type("", "", kIdMembers);

constexpr Member kJobInfoMembers[] = {
    required("id", kStr, "its name"),
    required("type", kJobType, "its kind"),
    required("status", kJobStatus, "its state"),
    required("current-progress", kInt, "how much is done, in units of its own"),
    required("total-progress", kInt, "how much there is to do, as known at present"),
    optional("error", kStr, "", "why it failed"),
};
constinit const Type kJobInfo = struct_type("JobInfo", "A job.", kJobInfoMembers);
constinit const Type kJobInfoList = array_of(kJobInfo);

constexpr Command kCommands[] = {
    {"job-pause", &kIdArguments, nullptr, "Pauses a job."},
    {"job-resume", &kIdArguments, nullptr, "Resumes a paused job."},
    {"job-cancel", &kIdArguments, nullptr, "Cancels a job."},
    {"job-complete", &kIdArguments, nullptr, "Tells a job that is ready to finish and switch over."},
    {"job-finalize", &kIdArguments, nullptr, "Lets a pending job make its changes."},
    {"job-dismiss", &kIdArguments, nullptr, "Forgets a concluded job."},
    {"query-jobs", nullptr, &kJobInfoList, "Lists the jobs, newest first."},
};

constexpr Member kStatusMembers[] = {
    required("id", kStr, "the job"),
    required("status", kJobStatus, "its new state"),
};
constinit const Type kStatusData = struct_type("", "", kStatusMembers);
constexpr Event kEvents[] = {
    {"JOB_STATUS_CHANGE", &kStatusData, "A job has changed its state."},
};

constexpr const Type* kTypes[] = {&kJobType, &kJobStatus, &kJobInfo};

}  // namespace

constinit const Module kJobModule = {kTypes, kCommands, kEvents};

}  // namespace gantry::schema
