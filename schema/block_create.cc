// Making images: blockdev-create and the options of every format that can be made.

#include "schema/tables.h"

namespace gantry::schema {

extern const Type kBlockdevRef;

namespace {

constexpr EnumValue kPreallocValues[] = {
    {"off", "space is taken when it is written"},
    {"metadata", "tables are complete, data is not"},
    {"falloc", "the file system reserves the space"},
    {"full", "the space is written"},
};
constinit const Type kPreallocMode = enum_type("PreallocMode", "How much space is taken ahead.", kPreallocValues);

constexpr EnumValue kVersionValues[] = {
    {"v2", "compat=0.10"},
    {"v3", "compat=1.1"},
};
constinit const Type kQcow2Version = enum_type("BlockdevQcow2Version", "Versions of qcow2.", kVersionValues);

constexpr Member kFileMembers[] = {
    required("filename", kStr, "path of the file; one that exists is emptied"),
    required("size", kSize, "bytes"),
    optional("preallocation", kPreallocMode, "off", "how much space is taken ahead; metadata is refused"),
    optional("nocow", kBool, "off", "switch copy-on-write off where the file system has it (btrfs)"),
    optional("extent-size-hint", kSize, "1 MiB",
             "extents of the file where the file system takes hints (XFS); 0: none"),
};
constinit const Type kFileOptions = struct_type("BlockdevCreateOptionsFile", "A plain file.", kFileMembers);

constexpr Member kQcow2Members[] = {
    required("file", kBlockdevRef, "the node that becomes the image; emptied"),
    optional("data-file", kBlockdevRef, "none", "the node that holds the data instead of the image's own file"),
    optional("data-file-raw", kBool, "off", "the data file is always a raw image of the disk"),
    optional("extended-l2", kBool, "off", "clusters of 32 subclusters; needs clusters of 16 KiB or more"),
    required("size", kSize, "bytes of the disk, a multiple of 512"),
    optional("version", kQcow2Version, "v3", "version of the format"),
    optional("backing-file", kStr, "none", "name of the backing file as it is stored; it is not opened"),
    optional("backing-fmt", kBlockdevDriver, "", "format of the backing file"),
    optional("encrypt", kCryptoBlockCreateOptions, "none", "how the data is encrypted"),
    optional("cluster-size", kSize, "65536", "a power of two from 512 to 2 MiB"),
    optional("preallocation", kPreallocMode, "off", "how much space is taken ahead"),
    optional("lazy-refcounts", kBool, "off", "reference counts may be written late"),
    optional("refcount-bits", kInt, "16", "width of a reference count: 1, 2, 4, 8, 16, 32 or 64"),
    optional("compression-type", kQcow2CompressionType, "zlib",
             "how compressed clusters are stored; zstd needs version v3"),
};
constinit const Type kQcow2Options = struct_type("BlockdevCreateOptionsQcow2", "A qcow2 image.", kQcow2Members);

constexpr Member kBaseMembers[] = {required("driver", kBlockdevDriver, "the format, or the protocol for a plain file")};
constexpr Variant kVariants[] = {
    {"file", &kFileOptions},
    {"qcow2", &kQcow2Options},
};
constinit const Type kCreateOptions =
    union_type("BlockdevCreateOptions", "An image to be made.", kBaseMembers, "driver", kVariants);

constexpr Member kCreateMembers[] = {
    required("job-id", kStr, "name of the job that does it"),
    required("options", kCreateOptions, "what to make"),
};
constinit const Type kCreateArguments = struct_type("", "", kCreateMembers);

constexpr Command kCommands[] = {
    {"blockdev-create", &kCreateArguments, nullptr,
     "Starts a job that makes an image; the job stays until it is dismissed."},
};

constexpr const Type* kTypes[] = {
    &kPreallocMode, &kQcow2Version, &kFileOptions, &kQcow2Options, &kCreateOptions,
};

}  // namespace

constinit const Module kBlockCreateModule = {kTypes, kCommands};

}  // namespace gantry::schema
