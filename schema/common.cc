// Builtins and types without a better home.

#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr Type integer(std::string_view name, uint8_t bits, bool is_unsigned) {
    return {.name = name, .kind = Kind::kInteger, .bits = bits, .is_unsigned = is_unsigned};
}

constexpr EnumValue kOnOffAutoValues[] = {
    {"auto", "decided by the program"},
    {"on", "always"},
    {"off", "never"},
};
constexpr EnumValue kIoOperationTypeValues[] = {
    {"read", "a read"},
    {"write", "a write, a discard or a flush"},
};

}  // namespace

constinit const Type kStr = {.name = "str", .kind = Kind::kString};
constinit const Type kBool = {.name = "bool", .kind = Kind::kBool};
constinit const Type kInt = integer("int", 64, false);
constinit const Type kInt8 = integer("int8", 8, false);
constinit const Type kInt16 = integer("int16", 16, false);
constinit const Type kInt32 = integer("int32", 32, false);
constinit const Type kInt64 = integer("int64", 64, false);
constinit const Type kUint8 = integer("uint8", 8, true);
constinit const Type kUint16 = integer("uint16", 16, true);
constinit const Type kUint32 = integer("uint32", 32, true);
constinit const Type kUint64 = integer("uint64", 64, true);
constinit const Type kSize = {.name = "size", .kind = Kind::kSize, .bits = 64, .is_unsigned = true};
constinit const Type kNumber = {.name = "number", .kind = Kind::kNumber};
constinit const Type kNull = {.name = "null", .kind = Kind::kNull};
constinit const Type kAny = {.name = "any", .kind = Kind::kAny};
constinit const Type kStrList = array_of(kStr);
constinit const Type kIntList = array_of(kInt);
constinit const Type kUint64List = array_of(kUint64);

constinit const Type kOnOffAuto = enum_type("OnOffAuto", "A switch that may be left to the program.", kOnOffAutoValues);
constinit const Type kIoOperationType =
    enum_type("IoOperationType", "The direction of a request.", kIoOperationTypeValues);

namespace {
constexpr const Type* kTypes[] = {
    &kStr,    &kBool,   &kInt,  &kInt8,   &kInt16, &kInt32, &kInt64,     &kUint8,           &kUint16,
    &kUint32, &kUint64, &kSize, &kNumber, &kNull,  &kAny,   &kOnOffAuto, &kIoOperationType,
};
}  // namespace

constinit const Module kCommonModule = {.types = kTypes};

}  // namespace gantry::schema
