#include "schema/unserved.h"

#include <algorithm>

#include "schema/schema.h"

namespace gantry::schema {

namespace {

constexpr std::string_view kCopyJobs = "not in this build: jobs that copy data are not built";
constexpr std::string_view kBlockJobs =
    "not in this build: there is no block job to steer; jobs have job-* and query-jobs";
constexpr std::string_view kSnapshots = "not in this build: snapshots and transactions are not built";
constexpr std::string_view kNodes = "not in this build: it is not built";
constexpr std::string_view kPasswd = "not in this build: use a secret object and the option encrypt.key-secret";
constexpr std::string_view kThrottle = "not in this build: throttling is not built";
constexpr std::string_view kMedia =
    "not in this build: there are no devices with media; use blockdev-add and blockdev-del";
constexpr std::string_view kQom = "not in this build: object properties are not built; use query-iothreads";
constexpr std::string_view kChardevs = "not in this build: character devices are made on the command line only";
constexpr std::string_view kHuman = "not in this build: commands for people are not built";
constexpr std::string_view kQueries = "not in this build: it is not built";
constexpr std::string_view kMachine = "not in this build: there is no virtual machine";

// Serving a command takes its line away; the tests hold the list against the tables.
constexpr Absent kAbsentCommands[] = {
    {"add_client", kMachine},
    {"balloon", kMachine},
    {"block-commit", kCopyJobs},
    {"block-job-cancel", kBlockJobs},
    {"block-job-change", kBlockJobs},
    {"block-job-complete", kBlockJobs},
    {"block-job-dismiss", kBlockJobs},
    {"block-job-finalize", kBlockJobs},
    {"block-job-pause", kBlockJobs},
    {"block-job-resume", kBlockJobs},
    {"block-job-set-speed", kBlockJobs},
    {"block-latency-histogram-set", kNodes},
    {"block-set-write-threshold", kNodes},
    {"block-stream", kCopyJobs},
    {"block_job_cancel", kBlockJobs},
    {"block_job_set_speed", kBlockJobs},
    {"block_passwd", kPasswd},
    {"block_set_io_throttle", kThrottle},
    {"block_stream", kCopyJobs},
    {"blockdev-backup", kCopyJobs},
    {"blockdev-change-medium", kMedia},
    {"blockdev-close-tray", kMedia},
    {"blockdev-insert-medium", kMedia},
    {"blockdev-mirror", kCopyJobs},
    {"blockdev-open-tray", kMedia},
    {"blockdev-remove-medium", kMedia},
    {"blockdev-set-active", kNodes},
    {"blockdev-snapshot", kSnapshots},
    {"blockdev-snapshot-sync", kSnapshots},
    {"change", kMedia},
    {"change-vnc-password", kMachine},
    {"chardev-add", kChardevs},
    {"chardev-change", kChardevs},
    {"chardev-remove", kChardevs},
    {"chardev-send-break", kChardevs},
    {"client_migrate_info", kMachine},
    {"cont", kMachine},
    {"cpu", kMachine},
    {"cpu-add", kMachine},
    {"device-list-properties", kMachine},
    {"device_add", kMachine},
    {"device_del", kMachine},
    {"drive-backup", kCopyJobs},
    {"drive-mirror", kCopyJobs},
    {"dump-guest-memory", kMachine},
    {"eject", kMedia},
    {"expire_password", kMachine},
    {"human-monitor-command", kHuman},
    {"inject-nmi", kMachine},
    {"memsave", kMachine},
    {"migrate", kMachine},
    {"migrate-incoming", kMachine},
    {"migrate-set-cache-size", kMachine},
    {"migrate-set-capabilities", kMachine},
    {"migrate-set-parameters", kMachine},
    {"migrate_cancel", kMachine},
    {"migrate_set_downtime", kMachine},
    {"migrate_set_speed", kMachine},
    {"netdev_add", kMachine},
    {"netdev_del", kMachine},
    {"pmemsave", kMachine},
    {"qom-get", kQom},
    {"qom-list", kQom},
    {"qom-list-get", kQom},
    {"qom-list-properties", kQom},
    {"qom-list-types", kQom},
    {"qom-set", kQom},
    {"query-acpi-ospm-status", kMachine},
    {"query-balloon", kMachine},
    {"query-block-jobs", kBlockJobs},
    {"query-chardev", kChardevs},
    {"query-chardev-backends", kChardevs},
    {"query-command-line-options", kQueries},
    {"query-cpu-definitions", kMachine},
    {"query-cpus", kMachine},
    {"query-dump-guest-memory-capability", kMachine},
    {"query-kvm", kMachine},
    {"query-machines", kMachine},
    {"query-memdev", kMachine},
    {"query-memory-devices", kMachine},
    {"query-mice", kMachine},
    {"query-migrate", kMachine},
    {"query-migrate-cache-size", kMachine},
    {"query-migrate-capabilities", kMachine},
    {"query-migrate-parameters", kMachine},
    {"query-name", kQueries},
    {"query-pci", kMachine},
    {"query-rx-filter", kMachine},
    {"query-spice", kMachine},
    {"query-target", kMachine},
    {"query-tpm", kMachine},
    {"query-tpm-models", kMachine},
    {"query-tpm-types", kMachine},
    {"query-uuid", kQueries},
    {"query-vnc", kMachine},
    {"query-vnc-servers", kMachine},
    {"ringbuf-read", kChardevs},
    {"ringbuf-write", kChardevs},
    {"rtc-reset-reinjection", kMachine},
    {"screendump", kMachine},
    {"send-key", kMachine},
    {"set_link", kMachine},
    {"set_password", kMachine},
    {"snapshot-delete", kMachine},
    {"snapshot-load", kMachine},
    {"snapshot-save", kMachine},
    {"stop", kMachine},
    {"system_powerdown", kMachine},
    {"system_reset", kMachine},
    {"system_wakeup", kMachine},
    {"trace-event-get-state", kQueries},
    {"trace-event-set-state", kQueries},
    {"transaction", kSnapshots},
    {"x-blockdev-change", kNodes},
    {"x-blockdev-set-iothread", kNodes},
    {"x-debug-query-block-graph", kNodes},
    {"x-input-send-event", kMachine},
    {"xen-save-devices-state", kMachine},
    {"xen-set-global-dirty-log", kMachine},
};

constexpr std::string_view kJobEvents = "not in this build: jobs that copy data are not built";
constexpr std::string_view kQuorum = "not in this build: this filter is not built";
constexpr Absent kAbsentEvents[] = {
    {"BLOCK_JOB_CANCELLED", kJobEvents},
    {"BLOCK_JOB_COMPLETED", kJobEvents},
    {"BLOCK_JOB_ERROR", kJobEvents},
    {"BLOCK_JOB_PENDING", kJobEvents},
    {"BLOCK_JOB_READY", kJobEvents},
    {"BLOCK_WRITE_THRESHOLD", "not in this build: write thresholds are not built"},
    {"QUORUM_FAILURE", kQuorum},
    {"QUORUM_REPORT_BAD", kQuorum},
    {"VSERPORT_CHANGE", kMachine},
    {"SHUTDOWN", kMachine},
    {"STOP", kMachine},
    {"RESUME", kMachine},
};

std::optional<std::string_view> reason(std::span<const Absent> absent, std::string_view name) {
    const auto it = std::ranges::find(absent, name, &Absent::name);
    if (it == absent.end()) return std::nullopt;
    return it->reason;
}

}  // namespace

std::optional<std::string_view> unserved_driver(std::string_view name) {
    return reason(type("BlockdevDriver").absent, name);
}
std::optional<std::string_view> unserved_export(std::string_view name) {
    return reason(type("BlockExportType").absent, name);
}
std::optional<std::string_view> unserved_object(std::string_view name) {
    return reason(type("ObjectType").absent, name);
}
std::optional<std::string_view> unserved_command(std::string_view name) { return reason(kAbsentCommands, name); }
std::optional<std::string_view> unserved_event(std::string_view name) { return reason(kAbsentEvents, name); }

}  // namespace gantry::schema
