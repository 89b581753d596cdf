// The shapes of the schema tables: types, commands and events as plain constant data.

#pragma once

#include <cstdint>
#include <span>
#include <string_view>

namespace gantry::schema {

struct Type;

/// What a JSON value of a type looks like.
enum class Kind : uint8_t {
    kString,     // str
    kBool,       // bool
    kInteger,    // int, int8 .. int64, uint8 .. uint64: `bits` wide, `is_unsigned`
    kSize,       // a non-negative number of bytes; suffixes k M G T P E in key=value input
    kNumber,     // number
    kNull,       // null
    kAny,        // any
    kEnum,       // `values`
    kObject,     // struct or flat union: `base`, `members`, `tag`, `variants`
    kAlternate,  // `branches`, chosen by JSON type
    kArray,      // `element`
};

/// Something the reference has and this build has not: refused with `reason` after the standard sentence.
struct Absent {
    std::string_view name = {};
    std::string_view reason = {};
};

struct EnumValue {
    std::string_view name = {};
    std::string_view doc = {};
    std::span<const std::string_view> features = {};
};

struct Member {
    std::string_view name = {};
    const Type* type = nullptr;
    bool optional = false;
    std::string_view fallback = {};  // the default as help prints it; empty: none worth telling
    std::string_view doc = {};
    std::span<const std::string_view> features = {};
    std::span<const std::string_view> aliases = {};  // old spellings, renamed to `name` on input, not introspected
};

/// One case of a flat union. `type` may be null: no further members.
struct Variant {
    std::string_view value = {};
    const Type* type = nullptr;
};

/// One branch of an alternate.
struct Branch {
    std::string_view name = {};
    const Type* type = nullptr;
};

/// How an old nested shape folds into the flat one before it is checked.
enum class Fold : uint8_t {
    kNone,
    kAlone,   // {"options": {...}} as the only member stands for its contents
    kMerge,   // the contents of "props" join the members beside it
    kLegacy,  // a union whose case members stand in "data"; flat input is accepted too. The result is always flat
};

/// One type. Which fields count depends on `kind`; the helpers below fill them.
struct Type {
    std::string_view name = {};
    Kind kind = Kind::kAny;
    std::string_view doc = {};
    uint8_t bits = 0;
    bool is_unsigned = false;
    std::span<const EnumValue> values = {};
    const Type* base = nullptr;
    std::span<const Member> members = {};
    std::string_view tag = {};
    std::span<const Variant> variants = {};
    std::span<const Branch> branches = {};
    const Type* element = nullptr;
    std::span<const std::string_view> features = {};
    std::span<const Absent> absent = {};  // of an enum: values; of an object: members
    Fold fold = Fold::kNone;
    std::string_view fold_member = {};
};

struct Command {
    std::string_view name = {};
    const Type* arguments = nullptr;  // an object type; null: no arguments
    const Type* returns = nullptr;    // null: the empty object
    std::string_view doc = {};
    std::span<const std::string_view> features = {};
    bool allow_oob = false;
};

struct Event {
    std::string_view name = {};
    const Type* data = nullptr;  // an object type; null: no data member
    std::string_view doc = {};
    std::span<const std::string_view> features = {};
};

// --- Building tables --------------------------------------------------------------------------------------------

constexpr Member required(std::string_view name, const Type& type, std::string_view doc) {
    return {.name = name, .type = &type, .doc = doc};
}
constexpr Member optional(std::string_view name, const Type& type, std::string_view fallback, std::string_view doc) {
    return {.name = name, .type = &type, .optional = true, .fallback = fallback, .doc = doc};
}
constexpr Type enum_type(std::string_view name, std::string_view doc, std::span<const EnumValue> values,
                         std::span<const Absent> absent = {}) {
    return {.name = name, .kind = Kind::kEnum, .doc = doc, .values = values, .absent = absent};
}
constexpr Type struct_type(std::string_view name, std::string_view doc, std::span<const Member> members,
                           std::span<const Absent> absent = {}) {
    return {.name = name, .kind = Kind::kObject, .doc = doc, .members = members, .absent = absent};
}
constexpr Type derived_type(std::string_view name, std::string_view doc, const Type& base,
                            std::span<const Member> members, std::span<const Absent> absent = {}) {
    return {.name = name, .kind = Kind::kObject, .doc = doc, .base = &base, .members = members, .absent = absent};
}
/// `members` holds the common members, the tag (an enum) among them.
constexpr Type union_type(std::string_view name, std::string_view doc, std::span<const Member> members,
                          std::string_view tag, std::span<const Variant> variants,
                          std::span<const Absent> absent = {}) {
    return {.name = name,
            .kind = Kind::kObject,
            .doc = doc,
            .members = members,
            .tag = tag,
            .variants = variants,
            .absent = absent};
}
constexpr Type alternate_type(std::string_view name, std::string_view doc, std::span<const Branch> branches) {
    return {.name = name, .kind = Kind::kAlternate, .doc = doc, .branches = branches};
}
constexpr Type array_of(const Type& element) { return {.kind = Kind::kArray, .element = &element}; }
constexpr Type folding(Type type, Fold fold, std::string_view member) {
    type.fold = fold;
    type.fold_member = member;
    return type;
}

}  // namespace gantry::schema
