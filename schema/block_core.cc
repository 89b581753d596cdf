// Nodes: options of every driver, and the commands that make and change them.

#include "schema/tables.h"

namespace gantry::schema {

extern const Type kBlockdevOptions;
extern const Type kBlockdevRef;

namespace {

// --- enums

constexpr EnumValue kDriverValues[] = {
    {"file", "a regular file"},
    {"host_device", "a block device of the host"},
    {"nbd", "an export of an NBD server"},
    {"null-aio", "reads nothing, forgets what is written"},
    {"null-co", "reads nothing, forgets what is written"},
    {"qcow2", "qcow2 image"},
    {"raw", "the bytes of its file, or a window of them"},
};
// Serving a driver moves its line from here to the list above, with its options below.
constexpr std::string_view kRemoteReason = "not in this build: remote storage is not built";
constexpr std::string_view kFormatReason = "not in this build: this image format is not built";
constexpr std::string_view kFilterReason = "not in this build: this filter is not built";
constexpr std::string_view kDroppedReason = "not in this build: the reference has dropped it too";
constexpr std::string_view kMachineReason = "not in this build: it needs a virtual machine in the same process";
constexpr Absent kAbsentDrivers[] = {
    {"archipelago", kDroppedReason},
    {"blkdebug", kFilterReason},
    {"blklogwrites", kFilterReason},
    {"blkreplay", kMachineReason},
    {"blkverify", kFilterReason},
    {"bochs", kFormatReason},
    {"cloop", kFormatReason},
    {"compress", kFilterReason},
    {"copy-before-write", kFilterReason},
    {"copy-on-read", kFilterReason},
    {"dmg", kFormatReason},
    {"ftp", kRemoteReason},
    {"ftps", kRemoteReason},
    {"gluster", kRemoteReason},
    {"host_cdrom", "not in this build: optical drives are not built; use host_device with read-only=on"},
    {"host_floppy", kDroppedReason},
    {"http", kRemoteReason},
    {"https", kRemoteReason},
    {"io_uring", "not in this build: use host_device or file with aio=io_uring"},
    {"iscsi", kRemoteReason},
    {"luks", "not in this build: LUKS volumes without an image format are not built"},
    {"nfs", kRemoteReason},
    {"nvme", "not in this build: raw NVMe access is not built; use host_device"},
    {"nvme-io_uring", "not in this build: raw NVMe access is not built; use host_device"},
    {"parallels", kFormatReason},
    {"preallocate", kFilterReason},
    {"qcow", kFormatReason},
    {"qed", kFormatReason},
    {"quorum", kFilterReason},
    {"rbd", kRemoteReason},
    {"replication", kMachineReason},
    {"snapshot-access", kFilterReason},
    {"ssh", kRemoteReason},
    {"tftp", kDroppedReason},
    {"throttle", kFilterReason},
    {"vdi", kFormatReason},
    {"vhdx", kFormatReason},
    {"virtio-blk-vfio-pci", kMachineReason},
    {"virtio-blk-vhost-user", "not in this build: it is not built"},
    {"virtio-blk-vhost-vdpa", "not in this build: it is not built"},
    {"vmdk", kFormatReason},
    {"vpc", kFormatReason},
    {"vvfat", "not in this build: folders as disks are not built"},
};

constexpr EnumValue kDiscardValues[] = {
    {"ignore", "discard requests end at this node"},
    {"unmap", "discard requests are passed on"},
};
constexpr EnumValue kDetectZeroesValues[] = {
    {"off", "data is written as it comes"},
    {"on", "blocks of zeroes are written by write-zeroes"},
    {"unmap", "the same, and the storage may be given back; needs discard=unmap"},
};
constexpr EnumValue kAioValues[] = {
    {"threads", "blocking calls on a pool of threads"},
    {"native", "accepted for compatibility: like io_uring where the kernel offers it"},
    {"io_uring", "the kernel's submission ring"},
};
constexpr EnumValue kOverlapModeValues[] = {
    {"none", "no checks"},
    {"constant", "checks that need no reading"},
    {"cached", "checks that need what is in memory anyway"},
    {"all", "every check"},
};

constinit const Type kDiscardOptions =
    enum_type("BlockdevDiscardOptions", "What becomes of discard requests.", kDiscardValues);
constinit const Type kAioOptions = enum_type("BlockdevAioOptions", "How files are read and written.", kAioValues);
constinit const Type kOverlapMode =
    enum_type("Qcow2OverlapCheckMode", "How many checks guard the metadata.", kOverlapModeValues);

// --- common options

constexpr Member kCacheMembers[] = {
    optional("direct", kBool, "off", "go round the page cache of the host"),
    optional("no-flush", kBool, "off", "drop flush requests: data may be lost when the host fails"),
};
constexpr Absent kCacheAbsent[] = {
    {"writeback", "write caches belong to exports: use writethrough=on there"},
};
constinit const Type kCacheOptions =
    struct_type("BlockdevCacheOptions", "Caching by the host.", kCacheMembers, kCacheAbsent);

constexpr Member kBaseMembers[] = {
    required("driver", kBlockdevDriver, "what kind of node"),
    optional("node-name", kStr, "", "the name; mandatory unless the node is defined inside another one"),
    optional("discard", kDiscardOptions, "ignore", "what becomes of discard requests"),
    optional("cache", kCacheOptions, "", "caching by the host"),
    optional("read-only", kBool, "off", "refuse writes"),
    optional("auto-read-only", kBool, "off", "be read-only when the file cannot be written"),
    optional("force-share", kBool, "off", "take no locks; only with read-only"),
    optional("detect-zeroes", kBlockdevDetectZeroesOptions, "off", "look for zeroes in written data"),
};
constexpr Absent kBaseAbsent[] = {
    {"id", "not in this build: devices with a backend of their own are not built; use node-name"},
    {"aio", "it belongs to the protocol node: file.aio"},
    {"rerror", "not in this build: error policies of nodes are not built"},
    {"werror", "not in this build: error policies of nodes are not built"},
    {"active", "not in this build: inactive nodes are not built"},
};

// --- protocols

constexpr Member kFileMembers[] = {
    required("filename", kStr, "path of the file or device"),
    optional("locking", kOnOffAuto, "auto", "lock the file against other programs; auto: where the kernel can"),
    optional("aio", kAioOptions, "threads", "how the file is read and written"),
    optional("aio-max-batch", kInt, "0", "requests submitted together at most; 0: decided by the program"),
    optional("drop-cache", kBool, "on", "accepted for compatibility: only matters to migration"),
};
constexpr Absent kFileAbsent[] = {
    {"pr-manager", "not in this build: SCSI persistent reservations are not built"},
    {"x-check-cache-dropped", "not in this build: it only checks migration"},
};
constexpr std::string_view kFileFeatures[] = {"dynamic-auto-read-only"};
constexpr Type with_features(Type type, std::span<const std::string_view> features) {
    type.features = features;
    return type;
}
constinit const Type kFileOptions = with_features(
    struct_type("BlockdevOptionsFile", "A file or a block device.", kFileMembers, kFileAbsent), kFileFeatures);

constexpr Member kNullMembers[] = {
    optional("size", kInt, "1 GiB", "bytes"),
    optional("latency-ns", kUint64, "0", "how long each request takes"),
    optional("read-zeroes", kBool, "off", "reads give zeroes instead of leaving the memory as it is"),
};
constinit const Type kNullOptions = struct_type("BlockdevOptionsNull", "A disk without storage.", kNullMembers);

constexpr Member kNbdMembers[] = {
    required("server", kSocketAddress, "where the server listens; fd: a socket that is connected to it"),
    optional("export", kStr, "", "the name of the export; at most 4096 bytes"),
    optional("tls-creds", kStr, "none: in the clear", "the TLS credentials, an object with endpoint=client"),
    optional("tls-hostname", kStr, "the host of the server", "the name that the server's certificate must have"),
    optional("x-dirty-bitmap", kStr, "",
             "the meta context that block status shows instead of base:allocation: qemu:dirty-bitmap:NAME (dirty is "
             "shown as no data) or qemu:allocation-depth"),
    optional("reconnect-delay", kUint32, "0",
             "seconds that requests wait for a server that was lost before they fail; 0: they fail at once"),
    optional("open-timeout", kUint32, "0",
             "seconds during which opening tries to reach the server again and again; 0: one attempt"),
    optional("multi-conn", kUint32, "one for each I/O loop, at most 4",
             "connections to a server that allows several; at most 16, 0 and 1: a single one"),
};
constinit const Type kNbdOptions = struct_type("BlockdevOptionsNbd", "An export of an NBD server.", kNbdMembers);

// --- formats

constexpr Member kGenericFormatMembers[] = {
    required("file", kBlockdevRef, "the node that holds the image"),
};
constinit const Type kGenericFormat =
    struct_type("BlockdevOptionsGenericFormat", "An image over another node.", kGenericFormatMembers);

constexpr Branch kRefOrNullBranches[] = {
    {"definition", &kBlockdevOptions},
    {"reference", &kStr},
    {"null", &kNull},
};
constinit const Type kBlockdevRefOrNull =
    alternate_type("BlockdevRefOrNull", "A node, by name or defined here, or none.", kRefOrNullBranches);

constexpr Member kGenericCowMembers[] = {
    optional("backing", kBlockdevRefOrNull, "from the image", "where unallocated data is read from; null: nowhere"),
};
constinit const Type kGenericCowFormat = derived_type(
    "BlockdevOptionsGenericCOWFormat", "An image that may have a backing one.", kGenericFormat, kGenericCowMembers);

constexpr Member kRawMembers[] = {
    optional("offset", kInt, "0", "where the window begins"),
    optional("size", kInt, "to the end", "bytes of the window"),
};
constinit const Type kRawOptions =
    derived_type("BlockdevOptionsRaw", "The bytes of its file, or a window of them.", kGenericFormat, kRawMembers);

constexpr Member kOverlapFlagsMembers[] = {
    optional("template", kOverlapMode, "cached", "the mode that the flags below change"),
    optional("main-header", kBool, "", "guard the header"),
    optional("active-l1", kBool, "", "guard the active L1 table"),
    optional("active-l2", kBool, "", "guard the active L2 tables"),
    optional("refcount-table", kBool, "", "guard the refcount table"),
    optional("refcount-block", kBool, "", "guard the refcount blocks"),
    optional("snapshot-table", kBool, "", "guard the snapshot table"),
    optional("inactive-l1", kBool, "", "guard the L1 tables of snapshots"),
    optional("inactive-l2", kBool, "", "guard the L2 tables of snapshots"),
    optional("bitmap-directory", kBool, "", "guard the directory of bitmaps"),
};
constinit const Type kOverlapFlags =
    struct_type("Qcow2OverlapCheckFlags", "Which metadata writes are checked against.", kOverlapFlagsMembers);
constexpr Branch kOverlapChecksBranches[] = {
    {"flags", &kOverlapFlags},
    {"mode", &kOverlapMode},
};
constinit const Type kOverlapChecks =
    alternate_type("Qcow2OverlapChecks", "A mode, or single flags.", kOverlapChecksBranches);

constexpr Member kQcow2Members[] = {
    optional("lazy-refcounts", kBool, "as in the image", "write refcounts late and repair them after a crash"),
    optional("pass-discard-request", kBool, "on with discard=unmap", "pass discards of guests to the file"),
    optional("pass-discard-snapshot", kBool, "on", "give back what deleting a snapshot frees"),
    optional("pass-discard-other", kBool, "off", "give back what is freed otherwise"),
    optional("discard-no-unref", kBool, "off", "discarded clusters keep their place: the image does not fragment"),
    optional("overlap-check", kOverlapChecks, "cached", "what a write to metadata is checked against"),
    optional("cache-size", kInt, "", "bytes of the L2 and the refcount cache together"),
    optional("l2-cache-size", kInt, "up to 32 MiB, enough for the disk", "bytes of the cache of L2 tables"),
    optional("l2-cache-entry-size", kInt, "cluster size", "bytes of one entry of it: a power of two from 512"),
    optional("refcount-cache-size", kInt, "4 clusters", "bytes of the cache of refcount blocks"),
    optional("cache-clean-interval", kUint64, "600", "seconds after which unused entries are dropped; 0: never"),
    optional("encrypt", kBlockdevQcow2Encryption, "", "how the image is decrypted; mandatory when it is encrypted"),
    optional("data-file", kBlockdevRef, "from the image",
             "the node that holds the data of an image that keeps it apart"),
    optional("snapshot", kStr, "none: the disk as it is now",
             "read the state of an internal snapshot, by id or name; needs read-only (an addition of Gantry)"),
};
constinit const Type kQcow2Options =
    derived_type("BlockdevOptionsQcow2", "A qcow2 image.", kGenericCowFormat, kQcow2Members);

// --- the union

constexpr Variant kVariants[] = {
    {"file", &kFileOptions},    {"host_device", &kFileOptions}, {"nbd", &kNbdOptions}, {"null-aio", &kNullOptions},
    {"null-co", &kNullOptions}, {"qcow2", &kQcow2Options},      {"raw", &kRawOptions},
};
constexpr Branch kRefBranches[] = {
    {"definition", &kBlockdevOptions},
    {"reference", &kStr},
};

constexpr Type blockdev_options() {
    return union_type("BlockdevOptions", "A node of the block graph.", kBaseMembers, "driver", kVariants, kBaseAbsent);
}

}  // namespace

constinit const Type kBlockdevDriver =
    enum_type("BlockdevDriver", "The kinds of nodes.", kDriverValues, kAbsentDrivers);
constinit const Type kBlockdevDetectZeroesOptions =
    enum_type("BlockdevDetectZeroesOptions", "What is done about written zeroes.", kDetectZeroesValues);
constinit const Type kBlockdevOptions = blockdev_options();
constinit const Type kBlockdevRef = alternate_type("BlockdevRef", "A node, by name or defined here.", kRefBranches);

// --- commands

namespace {

/// The command also takes the old {"options": {...}}.
constinit const Type kBlockdevAddArguments = folding(blockdev_options(), Fold::kAlone, "options");
constinit const Type kBlockdevOptionsList = array_of(kBlockdevOptions);

constexpr Member kNodeNameMembers[] = {required("node-name", kStr, "the node")};
constinit const Type kNodeNameArguments = struct_type("", "", kNodeNameMembers);

constexpr Member kReopenMembers[] = {
    required("options", kBlockdevOptionsList, "all options of each node; what is not given gets its default"),
};
constinit const Type kReopenArguments = struct_type("", "", kReopenMembers);

constexpr Member kResizeMembers[] = {
    optional("device", kStr, "", "the node, as older clients name it"),
    optional("node-name", kStr, "", "the node"),
    required("size", kInt, "the new size in bytes"),
};
constinit const Type kResizeArguments = struct_type("", "", kResizeMembers);

constexpr Member kNamedNodesMembers[] = {
    optional("flat", kBool, "off", "leave out what can be found at the backing node's own entry"),
};
constinit const Type kNamedNodesArguments = struct_type("", "", kNamedNodesMembers);

constexpr Member kBlockstatsMembers[] = {
    optional("query-nodes", kBool, "off", "tell about every named node instead of devices"),
};
constinit const Type kBlockstatsArguments = struct_type("", "", kBlockstatsMembers);

constexpr Command kCommands[] = {
    {"blockdev-add", &kBlockdevAddArguments, nullptr, "Opens a node."},
    {"blockdev-del", &kNodeNameArguments, nullptr, "Closes a node made by blockdev-add that nobody uses."},
    {"blockdev-reopen", &kReopenArguments, nullptr, "Changes options of nodes, all of them or none."},
    {"query-named-block-nodes", &kNamedNodesArguments, &kBlockDeviceInfoList, "Lists the nodes, newest first."},
    {"query-block", nullptr, &kBlockInfoList, "Lists devices with a backend of their own."},
    {"query-blockstats", &kBlockstatsArguments, &kBlockStatsList, "Statistics of devices or nodes."},
    {"block_resize", &kResizeArguments, nullptr, "Changes the size of a node."},
};

// --- events

constexpr EnumValue kErrorActionValues[] = {
    {"ignore", "the error was ignored"},
    {"report", "the error was reported to whoever asked"},
    {"stop", "requests wait until an operator has acted"},
};
constinit const Type kErrorAction = enum_type("BlockErrorAction", "What was done about an error.", kErrorActionValues);

constexpr Member kIoErrorMembers[] = {
    required("device", kStr, "the device, empty when there is none"),
    optional("node-name", kStr, "", "the node"),
    required("operation", kIoOperationType, "what failed"),
    required("action", kErrorAction, "what was done about it"),
    optional("nospace", kBool, "", "the storage is full"),
    required("reason", kStr, "the error for people"),
};
constinit const Type kIoErrorData = struct_type("", "", kIoErrorMembers);

constexpr Member kCorruptedMembers[] = {
    required("device", kStr, "the device, empty when there is none"),
    optional("node-name", kStr, "", "the node"),
    required("msg", kStr, "what is wrong, for people"),
    optional("offset", kInt, "", "where in the image file"),
    optional("size", kInt, "", "how much of it"),
    required("fatal", kBool, "the image was marked corrupt: all further access fails"),
};
constinit const Type kCorruptedData = struct_type("", "", kCorruptedMembers);

constexpr Event kEvents[] = {
    {"BLOCK_IO_ERROR", &kIoErrorData, "A request of an export with an error policy failed."},
    {"BLOCK_IMAGE_CORRUPTED", &kCorruptedData, "An image contradicts itself."},
};

constexpr const Type* kTypes[] = {
    &kBlockdevDriver,   &kDiscardOptions,    &kBlockdevDetectZeroesOptions,
    &kAioOptions,       &kOverlapMode,       &kCacheOptions,
    &kFileOptions,      &kNullOptions,       &kGenericFormat,
    &kGenericCowFormat, &kRawOptions,        &kOverlapFlags,
    &kOverlapChecks,    &kQcow2Options,      &kBlockdevOptions,
    &kBlockdevRef,      &kBlockdevRefOrNull, &kErrorAction,
};

}  // namespace

constinit const Module kBlockCoreModule = {kTypes, kCommands, kEvents};

}  // namespace gantry::schema
