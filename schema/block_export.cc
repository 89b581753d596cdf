// Exports and the NBD server.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

// --- exports

constexpr EnumValue kExportTypeValues[] = {{"nbd", "a network block device"}};
// Serving an export type moves its line up, with its options below.
constexpr Absent kAbsentExports[] = {
    {"vhost-user-blk", "not in this build: vhost-user is not built"},
    {"fuse", "not in this build: exports into the file system are not built"},
    {"vduse-blk", "not in this build: vduse is not built"},
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

constexpr std::string_view kNoBitmaps = "not in this build: dirty bitmaps are not built";
constexpr std::string_view kNoTls = "not in this build: TLS is not built";

constexpr Member kNbdBaseMembers[] = {
    optional("name", kStr, "the node's name", "what clients ask for; at most 4096 bytes"),
    optional("description", kStr, "", "text for people who list the exports; at most 4096 bytes"),
};
constinit const Type kNbdBase =
    struct_type("BlockExportOptionsNbdBase", "What clients see of an NBD export.", kNbdBaseMembers);
constexpr Absent kNbdAbsent[] = {
    {"bitmaps", kNoBitmaps},
    {"allocation-depth", "not in this build: the context qemu:allocation-depth is not built"},
};
constinit const Type kNbdOptions =
    derived_type("BlockExportOptionsNbd", "A network block device.", kNbdBase, {}, kNbdAbsent);

}  // namespace

constinit const Type kBlockExportType =
    enum_type("BlockExportType", "The kinds of exports.", kExportTypeValues, kAbsentExports);

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
constexpr Variant kExportVariants[] = {{"nbd", &kNbdOptions}};
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
};
constinit const Type kExportInfo = struct_type("BlockExportInfo", "An export.", kExportInfoMembers);
constinit const Type kExportInfoList = array_of(kExportInfo);

// --- the server

constexpr Member server_address(const Type& type) { return required("addr", type, "where to listen"); }
constexpr Member kMaxConnections =
    optional("max-connections", kUint32, "100", "clients served at the same time, others wait; 0: no limit");
constexpr Member kHandshakeSeconds = optional("handshake-max-seconds", kUint32, "10",
                                              "a client that has not chosen an export by then is cut off; 0: no limit");
constexpr Absent kServerAbsent[] = {
    {"tls-creds", kNoTls},
    {"tls-authz", kNoTls},
};
constexpr Member kServerMembers[] = {server_address(kSocketAddress), kHandshakeSeconds, kMaxConnections};
constinit const Type kServerOptions =
    struct_type("NbdServerOptions", "The NBD server of the process.", kServerMembers, kServerAbsent);
constexpr Member kServerStartMembers[] = {server_address(kSocketAddressLegacy), kHandshakeSeconds, kMaxConnections};
constinit const Type kServerStartArguments = struct_type("", "", kServerStartMembers, kServerAbsent);

constexpr Command kCommands[] = {
    {"nbd-server-start", &kServerStartArguments, nullptr, "Starts the NBD server of the process."},
    {"nbd-server-stop", nullptr, nullptr, "Removes all NBD exports and stops the server."},
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
    &kBlockExportType, &kRemoveMode,    &kIothreads,  &kNbdBase,
    &kNbdOptions,      &kExportOptions, &kExportInfo, &kServerOptions,
};

}  // namespace

constinit const Module kBlockExportModule = {kTypes, kCommands, kEvents};

}  // namespace gantry::schema
