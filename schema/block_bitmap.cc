// Dirty bitmaps: the commands that make, change and combine them.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr Member kBitmapMembers[] = {
    required("node", kStr, "the node"),
    required("name", kStr, "the bitmap"),
};
constinit const Type kBlockDirtyBitmap = struct_type("BlockDirtyBitmap", "A dirty bitmap, by name.", kBitmapMembers);

constexpr Member kAddMembers[] = {
    required("node", kStr, "the node whose writes are recorded"),
    required("name", kStr, "the name, unique on the node; at most 1023 bytes"),
    optional("granularity", kUint32, "the cluster size within 4 and 64 KiB", "bytes per bit: a power of two from 512"),
    optional("persistent", kBool, "off", "stored in the image when it is closed"),
    optional("disabled", kBool, "off", "records nothing until it is enabled"),
};
constinit const Type kBlockDirtyBitmapAdd = struct_type("BlockDirtyBitmapAdd", "A new dirty bitmap.", kAddMembers);

constexpr Branch kBitmapOrStrBranches[] = {
    {"local", &kStr},
    {"external", &kBlockDirtyBitmap},
};

}  // namespace

constinit const Type kBlockDirtyBitmapOrStr =
    alternate_type("BlockDirtyBitmapOrStr", "A dirty bitmap, by name or by node and name.", kBitmapOrStrBranches);
constinit const Type kBlockDirtyBitmapOrStrList = array_of(kBlockDirtyBitmapOrStr);

namespace {

constexpr Member kMergeMembers[] = {
    required("node", kStr, "the node of the target"),
    required("target", kStr, "the bitmap that changes"),
    required("bitmaps", kBlockDirtyBitmapOrStrList, "what is added: bitmaps of the node by name, others by both"),
};
constinit const Type kBlockDirtyBitmapMerge =
    struct_type("BlockDirtyBitmapMerge", "A union of dirty bitmaps.", kMergeMembers);

constexpr Member kSha256Members[] = {required("sha256", kStr, "64 hexadecimal digits")};
constinit const Type kBlockDirtyBitmapSha256 =
    struct_type("BlockDirtyBitmapSha256", "The digest of a bitmap.", kSha256Members);

constexpr Command kCommands[] = {
    {"block-dirty-bitmap-add", &kBlockDirtyBitmapAdd, nullptr, "Records from now on what is written to a node."},
    {"block-dirty-bitmap-remove", &kBlockDirtyBitmap, nullptr, "Forgets a dirty bitmap, in the image too."},
    {"block-dirty-bitmap-clear", &kBlockDirtyBitmap, nullptr, "Calls the whole node unwritten."},
    {"block-dirty-bitmap-enable", &kBlockDirtyBitmap, nullptr, "Goes on recording."},
    {"block-dirty-bitmap-disable", &kBlockDirtyBitmap, nullptr, "Stops recording; what is recorded stays."},
    {"block-dirty-bitmap-merge", &kBlockDirtyBitmapMerge, nullptr, "Adds what other bitmaps recorded, all or none."},
    {"x-debug-block-dirty-bitmap-sha256", &kBlockDirtyBitmap, &kBlockDirtyBitmapSha256,
     "The digest of a bitmap's bits, for tests."},
};

constexpr const Type* kTypes[] = {
    &kBlockDirtyBitmap,      &kBlockDirtyBitmapAdd,    &kBlockDirtyBitmapOrStr,
    &kBlockDirtyBitmapMerge, &kBlockDirtyBitmapSha256,
};

}  // namespace

constinit const Module kBlockBitmapModule = {.types = kTypes, .commands = kCommands};

}  // namespace gantry::schema
