// What the queries about nodes answer.

#include "schema/tables.h"

namespace gantry::schema {

extern const Type kImageInfo;
extern const Type kBlockStats;

namespace {

// --- images

constexpr Member kSnapshotMembers[] = {
    required("id", kStr, "unique in the image"),
    required("name", kStr, "given by whoever made it"),
    required("vm-state-size", kInt, "bytes of a saved machine state"),
    required("date-sec", kInt, "when it was made, seconds since 1970"),
    required("date-nsec", kInt, "the fraction of that second"),
    required("vm-clock-sec", kInt, "age of the machine, seconds"),
    required("vm-clock-nsec", kInt, "the fraction of that second"),
    optional("icount", kInt, "", "instructions the machine had executed"),
};
}  // namespace
constinit const Type kSnapshotInfo = struct_type("SnapshotInfo", "An internal snapshot.", kSnapshotMembers);
namespace {
constinit const Type kSnapshotInfoList = array_of(kSnapshotInfo);

constexpr EnumValue kCompressionValues[] = {
    {"zlib", "deflate"},
    {"zstd", "Zstandard"},
};
}  // namespace
constinit const Type kQcow2CompressionType =
    enum_type("Qcow2CompressionType", "How clusters are compressed.", kCompressionValues);
namespace {

constexpr EnumValue kBitmapFlagValues[] = {
    {"in-use", "not saved cleanly: its contents cannot be trusted"},
    {"auto", "recording goes on when the image is opened"},
};
constinit const Type kBitmapFlag = enum_type("Qcow2BitmapInfoFlags", "Flags of a stored bitmap.", kBitmapFlagValues);
constinit const Type kBitmapFlagList = array_of(kBitmapFlag);
constexpr Member kBitmapMembers[] = {
    required("name", kStr, "the name"),
    required("granularity", kUint32, "bytes per bit"),
    required("flags", kBitmapFlagList, "what the image says about it"),
};
constinit const Type kBitmapInfo = struct_type("Qcow2BitmapInfo", "A bitmap stored in an image.", kBitmapMembers);
constinit const Type kBitmapInfoList = array_of(kBitmapInfo);

constexpr Member kQcow2InfoMembers[] = {
    required("compat", kStr, "version of the format: 0.10 or 1.1"),
    optional("data-file", kStr, "", "the file that holds the data"),
    optional("data-file-raw", kBool, "", "the data file is a plain raw image"),
    optional("extended-l2", kBool, "", "clusters are allocated in parts"),
    optional("lazy-refcounts", kBool, "", "refcounts may be out of date after a crash"),
    optional("corrupt", kBool, "", "the image was marked corrupt"),
    required("refcount-bits", kInt, "width of a refcount"),
    optional("encrypt", kQcow2EncryptionInfo, "", "how the image is encrypted"),
    optional("bitmaps", kBitmapInfoList, "", "bitmaps stored in the image"),
    required("compression-type", kQcow2CompressionType, "how clusters are compressed"),
};
constinit const Type kQcow2Info =
    struct_type("ImageInfoSpecificQCow2", "What is particular to a qcow2 image.", kQcow2InfoMembers);

constexpr EnumValue kSpecificKindValues[] = {{"qcow2", "a qcow2 image"}};
constinit const Type kSpecificKind =
    enum_type("ImageInfoSpecificKind", "Formats that have more to tell.", kSpecificKindValues);
constexpr Member kSpecificMembers[] = {required("type", kSpecificKind, "the format")};
constexpr Variant kSpecificVariants[] = {{"qcow2", &kQcow2Info}};
constinit const Type kImageInfoSpecific = folding(
    union_type("ImageInfoSpecific", "What is particular to a format.", kSpecificMembers, "type", kSpecificVariants),
    Fold::kLegacy, "data");

constexpr Member kImageInfoMembers[] = {
    required("filename", kStr, "the file"),
    required("format", kStr, "the driver"),
    optional("dirty-flag", kBool, "", "it was not closed cleanly"),
    optional("actual-size", kInt, "", "bytes it occupies"),
    required("virtual-size", kInt, "bytes of the disk"),
    optional("cluster-size", kInt, "", "bytes of a cluster"),
    optional("encrypted", kBool, "", "the data is encrypted"),
    optional("compressed", kBool, "", "the data is compressed"),
    optional("backing-filename", kStr, "", "the backing file as the image names it"),
    optional("full-backing-filename", kStr, "", "the same, made complete"),
    optional("backing-filename-format", kStr, "", "the format of the backing file"),
    optional("snapshots", kSnapshotInfoList, "", "internal snapshots"),
    optional("backing-image", kImageInfo, "", "the backing image"),
    optional("format-specific", kImageInfoSpecific, "", "what is particular to the format"),
};

// --- nodes

constexpr Member kCacheInfoMembers[] = {
    required("writeback", kBool, "writes may be acknowledged before they are stable"),
    required("direct", kBool, "the page cache of the host is not used"),
    required("no-flush", kBool, "flush requests are dropped"),
};
constinit const Type kCacheInfo = struct_type("BlockdevCacheInfo", "Caching of a node.", kCacheInfoMembers);

constexpr Member kDirtyMembers[] = {
    optional("name", kStr, "", "the name"),
    required("count", kInt, "dirty bytes"),
    required("granularity", kUint32, "bytes per bit"),
    required("recording", kBool, "writes are recorded"),
    required("busy", kBool, "in use by a job or an export"),
    required("persistent", kBool, "stored in the image"),
    optional("inconsistent", kBool, "", "not saved cleanly: it can only be removed"),
};
constinit const Type kBlockDirtyInfo = struct_type("BlockDirtyInfo", "A dirty bitmap.", kDirtyMembers);
constinit const Type kBlockDirtyInfoList = array_of(kBlockDirtyInfo);

constexpr Member kDeviceInfoMembers[] = {
    required("file", kStr, "the file, or json: with the options that matter"),
    optional("node-name", kStr, "", "the name"),
    required("ro", kBool, "it cannot be written"),
    required("drv", kStr, "the driver"),
    optional("backing_file", kStr, "", "the backing file"),
    required("backing_file_depth", kInt, "how many images are below"),
    required("encrypted", kBool, "the data is encrypted"),
    required("detect_zeroes", kBlockdevDetectZeroesOptions, "what is done about written zeroes"),
    required("bps", kInt, "limit of bytes per second; 0: none"),
    required("bps_rd", kInt, "the same for reads"),
    required("bps_wr", kInt, "the same for writes"),
    required("iops", kInt, "limit of requests per second; 0: none"),
    required("iops_rd", kInt, "the same for reads"),
    required("iops_wr", kInt, "the same for writes"),
    required("image", kImageInfo, "the image"),
    optional("bps_max", kInt, "", "bursts of bytes"),
    optional("bps_rd_max", kInt, "", "the same for reads"),
    optional("bps_wr_max", kInt, "", "the same for writes"),
    optional("iops_max", kInt, "", "bursts of requests"),
    optional("iops_rd_max", kInt, "", "the same for reads"),
    optional("iops_wr_max", kInt, "", "the same for writes"),
    optional("bps_max_length", kInt, "", "seconds of a burst"),
    optional("bps_rd_max_length", kInt, "", "the same for reads"),
    optional("bps_wr_max_length", kInt, "", "the same for writes"),
    optional("iops_max_length", kInt, "", "seconds of a burst"),
    optional("iops_rd_max_length", kInt, "", "the same for reads"),
    optional("iops_wr_max_length", kInt, "", "the same for writes"),
    optional("iops_size", kInt, "", "larger requests count several times"),
    optional("group", kStr, "", "those who share the limits"),
    required("cache", kCacheInfo, "caching"),
    required("write_threshold", kInt, "offset whose crossing is announced; 0: none"),
    optional("dirty-bitmaps", kBlockDirtyInfoList, "", "dirty bitmaps"),
};
constinit const Type kBlockDeviceInfo = struct_type("BlockDeviceInfo", "A node.", kDeviceInfoMembers);

constexpr EnumValue kIoStatusValues[] = {
    {"ok", "no error"},
    {"failed", "the last request failed"},
    {"nospace", "the storage is full"},
};
constinit const Type kIoStatus = enum_type("BlockDeviceIoStatus", "State of a device.", kIoStatusValues);

constexpr Member kBlockInfoMembers[] = {
    required("device", kStr, "the name"),
    optional("qdev", kStr, "", "the device of a machine"),
    required("type", kStr, "always unknown"),
    required("removable", kBool, "the medium may be changed"),
    required("locked", kBool, "a guest holds the medium"),
    optional("inserted", kBlockDeviceInfo, "", "the node"),
    optional("tray_open", kBool, "", "the tray is open"),
    optional("io-status", kIoStatus, "", "state after errors"),
};
constinit const Type kBlockInfo = struct_type("BlockInfo", "A device with a backend.", kBlockInfoMembers);

// --- statistics

constexpr Member kTimedMembers[] = {
    required("interval_length", kInt, "seconds"),
    required("min_rd_latency_ns", kInt, "shortest read"),
    required("max_rd_latency_ns", kInt, "longest read"),
    required("avg_rd_latency_ns", kInt, "average of reads"),
    required("min_wr_latency_ns", kInt, "shortest write"),
    required("max_wr_latency_ns", kInt, "longest write"),
    required("avg_wr_latency_ns", kInt, "average of writes"),
    required("min_flush_latency_ns", kInt, "shortest flush"),
    required("max_flush_latency_ns", kInt, "longest flush"),
    required("avg_flush_latency_ns", kInt, "average of flushes"),
    required("avg_rd_queue_depth", kNumber, "reads in flight"),
    required("avg_wr_queue_depth", kNumber, "writes in flight"),
};
constinit const Type kTimedStats =
    struct_type("BlockDeviceTimedStats", "Statistics of the last interval.", kTimedMembers);
constinit const Type kTimedStatsList = array_of(kTimedStats);

constexpr Member kHistogramMembers[] = {
    required("boundaries", kUint64List, "nanoseconds"),
    required("bins", kUint64List, "requests between two boundaries"),
};
constinit const Type kHistogram =
    struct_type("BlockLatencyHistogramInfo", "How long requests took.", kHistogramMembers);

constexpr Member kDeviceStatsMembers[] = {
    required("rd_bytes", kInt, "bytes read"),
    required("wr_bytes", kInt, "bytes written"),
    required("unmap_bytes", kInt, "bytes discarded"),
    required("rd_operations", kInt, "reads"),
    required("wr_operations", kInt, "writes"),
    required("flush_operations", kInt, "flushes"),
    required("unmap_operations", kInt, "discards"),
    required("rd_total_time_ns", kInt, "time spent reading"),
    required("wr_total_time_ns", kInt, "time spent writing"),
    required("flush_total_time_ns", kInt, "time spent flushing"),
    required("unmap_total_time_ns", kInt, "time spent discarding"),
    required("wr_highest_offset", kInt, "end of the highest write"),
    required("rd_merged", kInt, "reads that went with another"),
    required("wr_merged", kInt, "writes that went with another"),
    required("unmap_merged", kInt, "discards that went with another"),
    optional("idle_time_ns", kInt, "", "since the last request"),
    required("failed_rd_operations", kInt, "reads that failed"),
    required("failed_wr_operations", kInt, "writes that failed"),
    required("failed_flush_operations", kInt, "flushes that failed"),
    required("failed_unmap_operations", kInt, "discards that failed"),
    required("invalid_rd_operations", kInt, "reads that made no sense"),
    required("invalid_wr_operations", kInt, "writes that made no sense"),
    required("invalid_flush_operations", kInt, "flushes that made no sense"),
    required("invalid_unmap_operations", kInt, "discards that made no sense"),
    required("account_invalid", kBool, "requests that made no sense count for latency"),
    required("account_failed", kBool, "failed requests count for latency"),
    required("timed_stats", kTimedStatsList, "statistics of intervals"),
    optional("rd_latency_histogram", kHistogram, "", "how long reads took"),
    optional("wr_latency_histogram", kHistogram, "", "how long writes took"),
    optional("flush_latency_histogram", kHistogram, "", "how long flushes took"),
};
constinit const Type kDeviceStats = struct_type("BlockDeviceStats", "Statistics.", kDeviceStatsMembers);

constexpr Member kFileStatsMembers[] = {
    required("discard-nb-ok", kUint64, "discards done"),
    required("discard-nb-failed", kUint64, "discards that failed"),
    required("discard-bytes-ok", kUint64, "bytes discarded"),
};
constinit const Type kFileStats = struct_type("BlockStatsSpecificFile", "Statistics of a file.", kFileStatsMembers);
constexpr Member kSpecificStatsMembers[] = {required("driver", kBlockdevDriver, "the driver")};
constexpr Variant kSpecificStatsVariants[] = {{"file", &kFileStats}, {"host_device", &kFileStats}};
constinit const Type kSpecificStats = union_type("BlockStatsSpecific", "Statistics of a driver.", kSpecificStatsMembers,
                                                 "driver", kSpecificStatsVariants);

constexpr Member kBlockStatsMembers[] = {
    optional("device", kStr, "", "the device"),
    optional("qdev", kStr, "", "the device of a machine"),
    optional("node-name", kStr, "", "the node"),
    required("stats", kDeviceStats, "the numbers"),
    optional("driver-specific", kSpecificStats, "", "numbers of the driver"),
    optional("parent", kBlockStats, "", "the node that holds the image"),
    optional("backing", kBlockStats, "", "the backing image"),
};

}  // namespace

constinit const Type kImageInfo = struct_type("ImageInfo", "An image.", kImageInfoMembers);
constinit const Type kBlockStats = struct_type("BlockStats", "Statistics of a node.", kBlockStatsMembers);
constinit const Type kBlockDeviceInfoList = array_of(kBlockDeviceInfo);
constinit const Type kBlockInfoList = array_of(kBlockInfo);
constinit const Type kBlockStatsList = array_of(kBlockStats);

namespace {
constexpr const Type* kTypes[] = {
    &kSnapshotInfo, &kQcow2CompressionType, &kBitmapFlag,        &kBitmapInfo,
    &kQcow2Info,    &kSpecificKind,         &kImageInfoSpecific, &kImageInfo,
    &kCacheInfo,    &kBlockDirtyInfo,       &kBlockDeviceInfo,   &kIoStatus,
    &kBlockInfo,    &kTimedStats,           &kHistogram,         &kDeviceStats,
    &kFileStats,    &kSpecificStats,        &kBlockStats,
};
}  // namespace

constinit const Module kBlockInfoModule = {.types = kTypes};

}  // namespace gantry::schema
