// Exports and the NBD server.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

// --- exports

constexpr EnumValue kExportTypeValues[] = {
    {"nbd", "a network block device"},
    {"fuse", "a file: the node covers a file that exists"},
    {"vhost-user-blk", "a disk of virtual machines, over a unix socket"},
    {"vduse-blk", "a disk on the vDPA bus of the kernel, for this machine or a virtual one"},
};

constexpr EnumValue kRemoveModeValues[] = {
    {"safe", "refused while clients are connected"},
    {"hard", "clients are cut off"},
};
constinit const Type kRemoveMode = enum_type("BlockExportRemoveMode", "How an export is removed.", kRemoveModeValues);

constexpr Branch kIothreadsBranches[] = {
    {"single", &kStr},
    {"multi", &kStrList},
};
constinit const Type kIothreads =
    alternate_type("BlockExportIothreads", "An iothread, or several that share the connections.", kIothreadsBranches);

constexpr Member kNbdBaseMembers[] = {
    optional("name", kStr, "the node's name", "what clients ask for; at most 4096 bytes"),
    optional("description", kStr, "", "text for people who list the exports; at most 4096 bytes"),
};
constinit const Type kNbdBase =
    struct_type("BlockExportOptionsNbdBase", "What clients see of an NBD export.", kNbdBaseMembers);
constexpr Member kNbdMembers[] = {
    optional(
        "bitmaps", kBlockDirtyBitmapOrStrList, "",
        "dirty bitmaps that clients see as qemu:dirty-bitmap:NAME; a name alone is searched for from the node down "
        "through filters and backing files"),
    optional("allocation-depth", kBool, "off", "clients see which layer holds what, as qemu:allocation-depth"),
    optional("server", kStr, "", "id of the NBD server that offers it; empty: the one without an id"),
};
constinit const Type kNbdOptions =
    derived_type("BlockExportOptionsNbd", "A network block device.", kNbdBase, kNbdMembers);

constexpr EnumValue kAllowOtherValues[] = {
    {"off", "the user of the program alone gets at the file, not even root does"},
    {"on", "whoever the file's mode lets in"},
    {"auto", "on, where mounting like that is allowed, else off"},
};
constinit const Type kAllowOther =
    enum_type("FuseExportAllowOther", "Who besides the user of the program gets at the file.", kAllowOtherValues);
constexpr EnumValue kTransportValues[] = {
    {"classic", "by /dev/fuse; files stay open over a restart of the program"},
    {"uring", "by io_uring where the kernel has it and it is enabled, else classic"},
    {"auto", "uring, unless the service manager keeps files open over restarts"},
};
constinit const Type kTransport =
    enum_type("FuseExportTransport", "How the kernel and the program exchange requests.", kTransportValues);
constexpr EnumValue kOTruncValues[] = {
    {"ignore", "the file keeps its size and content, as a block device does"},
    {"honour", "the file is cut to nothing, as a file is"},
};
constinit const Type kOTrunc = enum_type("FuseExportOTrunc", "What opening with O_TRUNC does.", kOTruncValues);
constexpr Member kFuseMembers[] = {
    required("mountpoint", kStr, "a regular file that exists, and is covered; the image itself may be it"),
    optional("growable", kBool, "off", "writes beyond the end enlarge the node"),
    optional("allow-other", kAllowOther, "auto", "who besides the user of the program gets at the file"),
    optional("x-transport", kTransport, "classic", "how the kernel and the program exchange requests"),
    optional("x-passthrough", kBool, "off",
             "the kernel reads and writes the image itself; for raw images without anything between, which then cannot "
             "be put there"),
    optional("x-o-trunc", kOTrunc, "ignore", "what opening with O_TRUNC does"),
    optional("x-cached", kBool, "off",
             "the kernel keeps what was read; only with writable=off, for a node that nobody else writes to"),
};
constinit const Type kFuseOptions =
    struct_type("BlockExportOptionsFuse", "A file: the node covers a file that exists.", kFuseMembers);

constexpr Member kVhostUserMembers[] = {
    required("addr", kSocketAddress, "where the virtual machine connects: type unix, or fd"),
    optional("logical-block-size", kSize, "512", "bytes, a power of 2 from 512 to 65536"),
    optional("num-queues", kUint16, "1",
             "queues that the configuration announces, from 1 to 256; a virtual machine may use 64 in any case"),
    optional("x-queue-size", kUint16, "256",
             "descriptors of a queue that requests are laid out for: a power of 2 from 4 to 1024"),
    optional("x-serial", kStr, "the id, cut short", "what the guest sees as serial number; at most 20 bytes"),
};
constinit const Type kVhostUserOptions =
    struct_type("BlockExportOptionsVhostUserBlk", "A disk of virtual machines, over a unix socket.", kVhostUserMembers);

constexpr Member kVduseMembers[] = {
    required("name", kStr, "of the device in /dev/vduse and on the vDPA bus; unique on this machine"),
    optional("num-queues", kUint16, "1", "queues, from 1 to 1024"),
    optional("queue-size", kUint16, "256", "most descriptors of a queue: a power of 2 from 4 to 1024"),
    optional("logical-block-size", kSize, "512",
             "bytes, a power of 2 from 512 to 65536; drivers of the kernel take up to a page"),
    optional("serial", kStr, "", "what drivers see as serial number; of more than 20 bytes the first 20"),
};
constinit const Type kVduseOptions =
    struct_type("BlockExportOptionsVduseBlk", "A disk on the vDPA bus of the kernel.", kVduseMembers);

}  // namespace

constinit const Type kBlockExportType = enum_type("BlockExportType", "The kinds of exports.", kExportTypeValues);

namespace {

constexpr Member kExportMembers[] = {
    required("type", kBlockExportType, "what kind of export"),
    required("id", kStr, "its name, unique among all exports"),
    optional("fixed-iothread", kBool, "off", "fail when the node cannot be served by the iothread given"),
    optional("iothread", kIothreads, "the loops of the program", "the iothread that serves it, or a list of them"),
    required("node-name", kStr, "the node"),
    optional("writable", kBool, "off", "clients may write"),
    optional("writethrough", kBool, "off", "a write is acknowledged when it is stable"),
};
constexpr Absent kExportAbsent[] = {
    {"allow-inactive", "not in this build: inactive nodes are not built"},
};
constexpr Variant kExportVariants[] = {
    {"nbd", &kNbdOptions},
    {"fuse", &kFuseOptions},
    {"vhost-user-blk", &kVhostUserOptions},
    {"vduse-blk", &kVduseOptions},
};
constinit const Type kExportOptions = union_type("BlockExportOptions", "Offers a node to others.", kExportMembers,
                                                 "type", kExportVariants, kExportAbsent);

constexpr Member kExportDelMembers[] = {
    required("id", kStr, "the export"),
    optional("mode", kRemoveMode, "safe", "what becomes of clients"),
};
constinit const Type kExportDelArguments = struct_type("", "", kExportDelMembers);

constexpr Member kExportInfoMembers[] = {
    required("id", kStr, "its name"),
    required("type", kBlockExportType, "its kind"),
    required("node-name", kStr, "the node it shows at present"),
    required("shutting-down", kBool, "its removal has begun"),
    optional(
        "transport", kStr, "",
        "how requests for a file (type fuse) come: classic, uring, or passthrough, which leaves reading and writing "
        "to the kernel"),
    optional("transport-reason", kStr, "", "why that one"),
};
constinit const Type kExportInfo = struct_type("BlockExportInfo", "An export.", kExportInfoMembers);
constinit const Type kExportInfoList = array_of(kExportInfo);

// --- the server

constinit const Type kAddressList = array_of(kSocketAddressLegacy);
constexpr Branch kAddressesBranches[] = {
    {"single", &kSocketAddressLegacy},
    {"multi", &kAddressList},
};
constinit const Type kServerAddresses =
    alternate_type("NbdServerAddresses", "Where an NBD server listens: one address, or several.", kAddressesBranches);
constexpr Member kServerAddress = required("addr", kServerAddresses, "where to listen; a list: at each of them");
constexpr Member kServerId = optional("id", kStr, "",
                                      "name of a further server, for the option 'server' of exports; empty: the server "
                                      "of exports that name none");
constexpr Member kMaxConnections =
    optional("max-connections", kUint32, "100", "clients served at the same time, others wait; 0: no limit");
constexpr Member kHandshakeSeconds = optional("handshake-max-seconds", kUint32, "10",
                                              "a client that has not chosen an export by then is cut off; 0: no limit");
constexpr Member kTlsCreds =
    optional("tls-creds", kStr, "no TLS", "id of TLS credentials with endpoint=server; clients must use TLS");
constexpr Member kTlsAuthz = optional("tls-authz", kStr, "whoever TLS lets in",
                                      "id of an authorization object, looked up for each client and asked about the "
                                      "name in its certificate; while it does not exist nobody is let in");
constexpr Member kTlsRequired = optional("tls-required", kBool, "on", "off: clients may use TLS and need not");
constexpr Member kServerMembers[] = {kServerAddress, kServerId, kHandshakeSeconds, kMaxConnections,
                                     kTlsCreds,      kTlsAuthz, kTlsRequired};
constinit const Type kServerOptions = struct_type("NbdServerOptions", "An NBD server.", kServerMembers);
constexpr Member kServerStartMembers[] = {kServerAddress, kServerId, kHandshakeSeconds, kMaxConnections,
                                          kTlsCreds,      kTlsAuthz, kTlsRequired};
constinit const Type kServerStartArguments = struct_type("", "", kServerStartMembers);

constexpr Member kServerStopMembers[] = {
    optional("id", kStr, "", "the server; empty: the one without an id"),
};
constinit const Type kServerStopArguments = struct_type("", "", kServerStopMembers);

constexpr Member kServerAddMembers[] = {
    required("device", kStr, "the node"),
    optional("writable", kBool, "off", "clients may write, if the node can be written"),
    optional("bitmap", kStr, "", "a dirty bitmap that clients see"),
};
constinit const Type kServerAddArguments = derived_type("NbdServerAddOptions", "", kNbdBase, kServerAddMembers);
constexpr Member kServerRemoveMembers[] = {
    required("name", kStr, "id of the export"),
    optional("mode", kRemoveMode, "safe", "what becomes of clients"),
};
constinit const Type kServerRemoveArguments = struct_type("", "", kServerRemoveMembers);

constexpr Member kClientMembers[] = {
    required("address", kStr, "where it connected from"),
    optional("export", kStr, "", "id of the export that it uses; absent in the handshake"),
    optional("name", kStr, "", "what it calls the export"),
    optional("tls-subject", kStr, "", "distinguished name in its certificate, or its PSK identity"),
    optional("pid", kInt, "", "on a unix socket: the process that connected, 0 when it is of another pid namespace"),
    optional("uid", kInt, "", "on a unix socket: its user"),
    optional("gid", kInt, "", "on a unix socket: its group"),
    required("requests", kUint64, "received so far"),
    required("bytes-read", kUint64, "sent to it by READ"),
    required("bytes-written", kUint64, "received from it by WRITE"),
    required("in-flight", kUint32, "requests that are not answered yet"),
    required("seconds", kInt, "since it connected"),
};
constinit const Type kClientInfo = struct_type("NbdClientInfo", "A client of an NBD server.", kClientMembers);
constinit const Type kClientInfoList = array_of(kClientInfo);
constexpr Member kServerInfoMembers[] = {
    optional("id", kStr, "", "its name; absent: the server of exports that name none"),
    required("addresses", kStrList, "URIs of the default export at each of its addresses"),
    required("max-connections", kUint32, "clients served at the same time; 0: no limit"),
    required("handshake-max-seconds", kUint32, "time for a client to choose an export; 0: no limit"),
    required("exports", kStrList, "names of what it offers"),
    required("clients", kClientInfoList, "who is connected, in the order of their coming"),
};
constinit const Type kServerInfo = struct_type("NbdServerInfo", "A running NBD server.", kServerInfoMembers);
constinit const Type kServerInfoList = array_of(kServerInfo);

constexpr Member kFuseQueueMembers[] = {
    required("transport", kTransport, "how its requests come: classic or uring"),
    required("loop", kStr, "the thread that answers them"),
    required("requests", kUint64, "answered so far"),
    required("bytes-read", kUint64, "given to readers"),
    required("bytes-written", kUint64, "taken from writers"),
};
constinit const Type kFuseQueueInfo = struct_type("FuseQueueInfo", "A queue of a FUSE export.", kFuseQueueMembers);
constinit const Type kFuseQueueInfoList = array_of(kFuseQueueInfo);
constexpr Member kFuseInfoMembers[] = {
    required("id", kStr, "its name"),
    required("mountpoint", kStr, "the file that shows the node, as it was named"),
    required("writable", kBool, "it can be written"),
    required("growable", kBool, "writes beyond its end enlarge it"),
    required("allow-other", kBool, "users other than the mounting one can get there"),
    required("transport", kTransport, "how requests come: classic or uring"),
    required("transport-reason", kStr, "why not another way"),
    required("passthrough", kBool, "the kernel reads and writes the image's file itself: queues see no data"),
    required("open-files", kUint64, "descriptors that programs have open"),
    required("kept-for-restart", kBool, "clients do not notice that the daemon is killed and started again"),
    optional("kept-reason", kStr, "", "why they would"),
    required("queues", kFuseQueueInfoList, "in the order of the export's threads"),
};
constinit const Type kFuseInfo = struct_type("FuseExportInfo", "A FUSE export at work.", kFuseInfoMembers);
constinit const Type kFuseInfoList = array_of(kFuseInfo);

constexpr Member kVirtqueueMembers[] = {
    required("index", kUint32, "its number"),
    required("loop", kStr, "the thread that serves it"),
    required("running", kBool, "it has been started and not stopped"),
    required("enabled", kBool, "requests are taken while it runs"),
    required("size", kUint32, "its descriptors; 0: nobody has said"),
    required("packed", kBool, "it is a packed ring, not a split one"),
    required("in-flight", kUint64, "requests that were taken and not answered yet"),
    required("requests", kUint64, "answered so far, for all drivers one after another, as are the next"),
    required("bytes-read", kUint64, "given to the driver"),
    required("bytes-written", kUint64, "taken from the driver"),
    required("kicks", kUint64, "times that the driver has told of requests"),
    required("signals", kUint64, "times that the driver was told of answers"),
    optional("broken", kStr, "", "why it is not served any more"),
};
constinit const Type kVirtqueueInfo =
    struct_type("VirtqueueInfo", "A queue of a virtio-blk device.", kVirtqueueMembers);
constinit const Type kVirtqueueInfoList = array_of(kVirtqueueInfo);
constexpr Member kFrontEndMembers[] = {
    required("peer", kStr, "who connected"),
    required("features", kUint64, "of the device and its rings that were chosen, as bits"),
    required("protocol-features", kUint64, "of the protocol that were chosen, as bits"),
    required("status", kUint64, "the device status, where the front end tells it"),
    required("inflight-tracking", kBool, "requests that are not answered are noted where a restart finds them"),
    required("dirty-log", kBool, "written pages are marked for a migration"),
    required("memory-regions", kUint64, "of the guest's memory that are mapped"),
    required("memory-bytes", kUint64, "in these regions"),
    optional("waits-for-answer-to", kStr, "", "a message of it that is answered when requests have ended"),
    required("queues", kVirtqueueInfoList, "those that were ever used"),
};
constinit const Type kFrontEndInfo =
    struct_type("VhostUserFrontEndInfo", "The virtual machine that is connected.", kFrontEndMembers);
constexpr Member kVhostUserInfoMembers[] = {
    required("id", kStr, "its name"),
    required("socket", kStr, "where virtual machines connect"),
    required("writable", kBool, "the guest can write"),
    required("logical-block-size", kUint32, "bytes"),
    required("num-queues", kUint32, "as the configuration says"),
    required("queue-size", kUint32, "descriptors that requests are laid out for"),
    required("serial", kStr, "what the guest sees as serial number"),
    required("features-offered", kUint64, "as bits"),
    required("connected", kBool, "a front end is connected, or its requests are not over yet"),
    optional("front-end", kFrontEndInfo, "", "which one"),
};
constinit const Type kVhostUserInfo =
    struct_type("VhostUserExportInfo", "A vhost-user-blk export at work.", kVhostUserInfoMembers);
constinit const Type kVhostUserInfoList = array_of(kVhostUserInfo);

constexpr Member kVduseInfoMembers[] = {
    required("id", kStr, "its name"),
    required("name", kStr, "of the device in /dev/vduse and on the vDPA bus"),
    required("writable", kBool, "the driver can write"),
    required("logical-block-size", kUint32, "bytes"),
    required("num-queues", kUint32, "as the configuration says"),
    required("queue-size", kUint32, "most descriptors of a queue"),
    required("serial", kStr, "what the driver sees as serial number"),
    required("attached", kBool, "it is on the vDPA bus"),
    required("taken-over", kBool, "a process before this one has made it"),
    required("running", kBool, "a driver uses it"),
    required("features-offered", kUint64, "as bits"),
    required("features", kUint64, "that the driver has chosen, as bits"),
    required("kept-for-restart", kBool, "requests that are not answered are noted where a restart finds them"),
    optional("kept-reason", kStr, "", "why not"),
    required("queues", kVirtqueueInfoList, "those that were ever used"),
};
constinit const Type kVduseInfo = struct_type("VduseExportInfo", "A vduse-blk export at work.", kVduseInfoMembers);
constinit const Type kVduseInfoList = array_of(kVduseInfo);

constexpr Command kCommands[] = {
    {"nbd-server-start", &kServerStartArguments, nullptr, "Starts an NBD server."},
    {"nbd-server-stop", &kServerStopArguments, nullptr, "Removes the exports of an NBD server and stops it."},
    {"nbd-server-add", &kServerAddArguments, nullptr, "Exports a node by NBD; block-export-add does it, too.",
     kDeprecated},
    {"nbd-server-remove", &kServerRemoveArguments, nullptr, "Begins to remove an export, as block-export-del does.",
     kDeprecated},
    {"query-nbd-servers", nullptr, &kServerInfoList, "Lists the running NBD servers with their clients."},
    {"query-fuse-exports", nullptr, &kFuseInfoList, "Lists the FUSE exports with their ways to the kernel."},
    {"query-vhost-user-exports", nullptr, &kVhostUserInfoList,
     "Lists the vhost-user-blk exports with their front ends and queues."},
    {"query-vduse-exports", nullptr, &kVduseInfoList, "Lists the vduse-blk exports with their drivers and queues."},
    {"block-export-add", &kExportOptions, nullptr, "Offers a node to others."},
    {"block-export-del", &kExportDelArguments, nullptr,
     "Begins to remove an export; BLOCK_EXPORT_DELETED tells when it is gone."},
    {"query-block-exports", nullptr, &kExportInfoList, "Lists the exports, newest first."},
};

constexpr Member kDeletedMembers[] = {required("id", kStr, "the export")};
constinit const Type kDeletedData = struct_type("", "", kDeletedMembers);
constexpr Event kEvents[] = {
    {"BLOCK_EXPORT_DELETED", &kDeletedData, "An export is gone; its id can be used again."},
};

constexpr const Type* kTypes[] = {
    &kBlockExportType, &kAllowOther,         &kTransport,        &kOTrunc,
    &kFuseOptions,     &kRemoveMode,         &kIothreads,        &kNbdBase,
    &kNbdOptions,      &kExportOptions,      &kExportInfo,       &kServerOptions,
    &kServerAddresses, &kServerAddArguments, &kClientInfo,       &kServerInfo,
    &kFuseQueueInfo,   &kFuseInfo,           &kVhostUserOptions, &kVirtqueueInfo,
    &kFrontEndInfo,    &kVhostUserInfo,      &kVduseOptions,     &kVduseInfo,
};

}  // namespace

constinit const Module kBlockExportModule = {kTypes, kCommands, kEvents};

}  // namespace gantry::schema
