#include "qmp/events.h"

#include <time.h>

#include "block/jobs/job.h"
#include "block/node.h"
#include "qmp/monitor.h"
#include "schema/schema.h"

namespace gantry::qmp {

void Events::emit(std::string_view event, json::object data) {
    // Only what the schema declares may be sent: a client has read it there.
    if (!schema::find_event(event)) return;
    timespec now{};
    bool ok = ::clock_gettime(CLOCK_REALTIME, &now) == 0;
    json::object line{
        {"timestamp",
         {{"seconds", ok ? int64_t{now.tv_sec} : -1}, {"microseconds", ok ? int64_t{now.tv_nsec / 1000} : -1}}},
        {"event", event}};
    if (!data.empty()) line["data"] = std::move(data);
    monitors_.broadcast(line);
}

void Events::job_status_changed(const block::Job& job, std::string_view status) {
    emit("JOB_STATUS_CHANGE", {{"id", job.id()}, {"status", status}});
}

void Events::job_event(const block::Job& job, std::string_view event, std::string_view error) {
    json::object data{{"type", job.type()}};
    if (event == "BLOCK_JOB_PENDING") {
        data["id"] = job.id();
    } else {
        data["device"] = job.id();
        data["len"] = job.progress_total();
        data["offset"] = job.progress_current();
        data["speed"] = job.speed();
        if (!error.empty()) data["error"] = error;
    }
    emit(event, std::move(data));
}

void Events::io_error(std::string_view user, const block::Node& node, std::string_view operation,
                      std::string_view action, bool nospace, std::string_view reason) {
    emit("BLOCK_IO_ERROR", {{"device", user},
                            {"node-name", node.name()},
                            {"operation", operation},
                            {"action", action},
                            {"nospace", nospace},
                            {"reason", reason}});
}

void Events::image_corrupted(const block::Node& node, std::string_view msg, std::optional<uint64_t> offset,
                             std::optional<uint64_t> size, bool fatal) {
    json::object data{{"device", ""}, {"node-name", node.name()}, {"msg", msg}};
    if (offset) data["offset"] = *offset;
    if (size) data["size"] = *size;
    data["fatal"] = fatal;
    emit("BLOCK_IMAGE_CORRUPTED", std::move(data));
}

void Events::export_deleted(std::string_view id) { emit("BLOCK_EXPORT_DELETED", {{"id", id}}); }

}  // namespace gantry::qmp
