// What the table files share: builtin types, types used across modules, and the modules' lists. Internal to schema/.

#pragma once

#include "schema/types.h"

namespace gantry::schema {

/// What one table file declares. schema.cc and introspect.cc put the modules together.
struct Module {
    std::span<const Type* const> types = {};  // those that have a name
    std::span<const Command> commands = {};
    std::span<const Event> events = {};
};

extern const Module kCommonModule;
extern const Module kSocketsModule;
extern const Module kBlockCoreModule;
extern const Module kBlockInfoModule;
extern const Module kBlockBitmapModule;
extern const Module kBlockCreateModule;
extern const Module kBlockImageModule;
extern const Module kBlockExportModule;
extern const Module kJobModule;
extern const Module kCryptoModule;
extern const Module kQomModule;
extern const Module kControlModule;
extern const Module kMiscModule;
extern const Module kDescriptorsModule;

// common.cc
extern const Type kStr;
extern const Type kBool;
extern const Type kInt;
extern const Type kInt8;
extern const Type kInt16;
extern const Type kInt32;
extern const Type kInt64;
extern const Type kUint8;
extern const Type kUint16;
extern const Type kUint32;
extern const Type kUint64;
extern const Type kSize;
extern const Type kNumber;
extern const Type kNull;
extern const Type kAny;
extern const Type kStrList;
extern const Type kIntList;
extern const Type kUint64List;
extern const Type kOnOffAuto;
extern const Type kIoOperationType;

// sockets.cc
extern const Type kSocketAddress;
extern const Type kSocketAddressLegacy;

// block_core.cc
extern const Type kBlockdevDriver;
extern const Type kBlockdevDetectZeroesOptions;

// block_info.cc
extern const Type kQcow2CompressionType;
extern const Type kSnapshotInfo;
extern const Type kBlockDeviceInfoList;
extern const Type kBlockInfoList;
extern const Type kBlockStatsList;

// block_bitmap.cc
extern const Type kBlockDirtyBitmapOrStr;
extern const Type kBlockDirtyBitmapOrStrList;

// block_export.cc
extern const Type kBlockExportType;

// crypto.cc
extern const Type kBlockdevQcow2Encryption;
extern const Type kCryptoBlockCreateOptions;
extern const Type kCryptoBlockAmendOptions;
extern const Type kQcow2EncryptionInfo;

// qom.cc
extern const Type kObjectType;

inline constexpr std::string_view kUnstable[] = {"unstable"};
inline constexpr std::string_view kDeprecated[] = {"deprecated"};

}  // namespace gantry::schema
