// Operations on images that are open: internal snapshots, the name of the backing file, amend.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

// --- internal snapshots

constexpr Member kSnapshotMembers[] = {
    required("device", kStr, "the node"),
    required("name", kStr, "name of the new snapshot"),
};
constinit const Type kSnapshotArguments = struct_type("", "", kSnapshotMembers);

constexpr Member kDeleteMembers[] = {
    required("device", kStr, "the node"),
    optional("id", kStr, "", "id of the snapshot"),
    optional("name", kStr, "", "name of the snapshot; with an id both must fit"),
};
constinit const Type kDeleteArguments = struct_type("", "", kDeleteMembers);

// --- change-backing-file

constexpr Member kBackingMembers[] = {
    required("device", kStr, "a node of the chain"),
    required("image-node-name", kStr, "the node whose image names a backing file"),
    required("backing-file", kStr, "the name to be stored; empty: none"),
};
constinit const Type kBackingArguments = struct_type("", "", kBackingMembers);

// --- amend

constexpr Member kQcow2Members[] = {
    optional("encrypt", kCryptoBlockAmendOptions, "", "what changes about its encryption"),
};
constinit const Type kAmendQcow2 = struct_type("BlockdevAmendOptionsQcow2", "Changes of a qcow2 image.", kQcow2Members);
constexpr Member kAmendBaseMembers[] = {required("driver", kBlockdevDriver, "the node's driver")};
constexpr Variant kAmendVariants[] = {{"qcow2", &kAmendQcow2}};
constinit const Type kAmendOptions = union_type("BlockdevAmendOptions", "Changes of an image's properties.",
                                                kAmendBaseMembers, "driver", kAmendVariants);

constexpr Member kAmendMembers[] = {
    required("job-id", kStr, "name of the job that does it"),
    required("node-name", kStr, "the node"),
    required("options", kAmendOptions, "what to change"),
    optional("force", kBool, "off", "also what may make encrypted data unreachable"),
};
constinit const Type kAmendArguments = struct_type("", "", kAmendMembers);

constexpr Command kCommands[] = {
    {"blockdev-snapshot-internal-sync", &kSnapshotArguments, nullptr,
     "Keeps the present contents of an image inside it."},
    {"blockdev-snapshot-delete-internal-sync", &kDeleteArguments, &kSnapshotInfo,
     "Deletes a snapshot inside an image and returns what it was."},
    {"change-backing-file", &kBackingArguments, nullptr,
     "Changes the name of the backing file in an image; the open nodes stay as they are."},
    {"x-blockdev-amend", &kAmendArguments, nullptr,
     "Starts a job that changes properties of an image; the job stays until it is dismissed.", kUnstable},
};

constexpr const Type* kTypes[] = {&kAmendQcow2, &kAmendOptions};

}  // namespace

constinit const Module kBlockImageModule = {kTypes, kCommands};

}  // namespace gantry::schema
