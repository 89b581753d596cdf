#include "schema/validate.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>

#include "runtime/check.h"
#include "schema/scalar_text.h"

namespace gantry::schema {

namespace {

constexpr size_t kMaxDepth = 256;  // objects within objects; a graph of nodes is nowhere near

/// Where a value stands, from the inside out. Lives on the stack beside the value.
struct Path {
    const Path* parent = nullptr;
    std::string_view name;  // empty for the top and for list elements
    size_t index = 0;
    bool element = false;

    /// The nearest name, which is all some messages give: list elements and the top are "null".
    std::string_view last() const { return name.empty() ? "null" : name; }
};

std::string full_name(const Path& path, InputMode mode) {
    std::string out = path.parent ? full_name(*path.parent, mode) : std::string();
    if (path.element) {
        const bool dotted = mode == InputMode::kKeyval;
        out += dotted ? fmt::format("{}{}", out.empty() ? "" : ".", path.index) : fmt::format("[{}]", path.index);
    } else if (!path.name.empty()) {
        if (!out.empty()) out += '.';
        out += path.name;
    }
    return out;
}

std::string_view expected_name(const Type& type) {
    switch (type.kind) {
        case Kind::kString:
        case Kind::kEnum:
            return "string";
        case Kind::kBool:
            return "boolean";
        case Kind::kInteger:
        case Kind::kSize:
            return "integer";
        case Kind::kNumber:
            return "number";
        case Kind::kNull:
            return "null";
        case Kind::kObject:
            return "object";
        case Kind::kArray:
            return "array";
        case Kind::kAlternate:
        case Kind::kAny:
            return type.name;
    }
    return type.name;
}

const Absent* find_absent(std::span<const Absent> absent, std::string_view name) {
    const auto it = std::ranges::find(absent, name, &Absent::name);
    return it == absent.end() ? nullptr : &*it;
}

/// Of an object type: looks through its bases too.
const Absent* find_absent_member(const Type* type, std::string_view name) {
    for (; type; type = type->base) {
        if (const Absent* found = find_absent(type->absent, name)) return found;
    }
    return nullptr;
}

const Variant* find_variant(const Type& type, std::string_view value) {
    const auto it = std::ranges::find(type.variants, value, &Variant::value);
    return it == type.variants.end() ? nullptr : &*it;
}

class Validator {
  public:
    explicit Validator(InputMode mode) : mode_(mode) {}

    Result<json::value> value(const Type& type, json::value&& in, const Path& path) {
        if (keyval() && in.is_string() && type.kind != Kind::kAlternate) return from_text(type, in.get_string(), path);
        switch (type.kind) {
            case Kind::kAny:
                return std::move(in);
            case Kind::kString:
                if (in.is_string()) return std::move(in);
                break;
            case Kind::kBool:
                if (in.is_bool()) return std::move(in);
                break;
            case Kind::kNumber:
                if (in.is_number()) return std::move(in);
                break;
            case Kind::kNull:
                if (in.is_null()) return std::move(in);
                break;
            case Kind::kInteger:
            case Kind::kSize:
                return integer(type, in, path);
            case Kind::kEnum:
                if (in.is_string()) return enumerator(type, in.get_string(), path);
                break;
            case Kind::kObject:
                if (!in.is_object()) break;
                {
                    TRY(json::object out, object(type, std::move(in.get_object()), path));
                    return json::value(std::move(out));
                }
            case Kind::kArray:
                if (in.is_array()) return array(type, std::move(in.get_array()), path);
                break;
            case Kind::kAlternate:
                return alternate(type, std::move(in), path);
        }
        return wrong_type(type, path);
    }

    Result<json::object> object(const Type& type, json::object&& in, const Path& path) {
        if (++depth_ > kMaxDepth) {
            return fail(ErrorKind::kTooLarge, "Parameter '{}' is nested too deeply; at most {} levels", path.last(),
                        kMaxDepth);
        }
        auto out = object_at_depth(type, std::move(in), path);
        depth_--;
        return out;
    }

  private:
    bool keyval() const { return mode_ == InputMode::kKeyval; }

    template <class... Args>
    static std::unexpected<Error> refuse(fmt::format_string<Args...> format, Args&&... args) {
        return fail(ErrorKind::kInvalid, format, std::forward<Args>(args)...);
    }
    std::unexpected<Error> wrong_type(const Type& type, const Path& path) const {
        const bool scalar = type.kind != Kind::kObject && type.kind != Kind::kArray && type.kind != Kind::kAlternate;
        if (keyval() && scalar) return refuse("Parameters '{}.*' are unexpected", full_name(path, mode_));
        const std::string name = type.kind == Kind::kAlternate ? std::string(path.last()) : full_name(path, mode_);
        return refuse("Invalid parameter type for '{}', expected: {}", name.empty() ? "null" : name,
                      expected_name(type));
    }
    std::unexpected<Error> missing(const Path& parent, std::string_view name) const {
        return refuse("Parameter '{}' is missing", full_name(Path{&parent, name}, mode_));
    }
    std::unexpected<Error> unexpected(const Path& parent, std::string_view name, const Absent* absent) const {
        return refuse("Parameter '{}' is unexpected{}{}", full_name(Path{&parent, name}, mode_), absent ? "; " : "",
                      absent ? absent->reason : "");
    }

    // --- scalars

    Result<json::value> from_text(const Type& type, std::string_view text, const Path& path) {
        switch (type.kind) {
            case Kind::kString:
            case Kind::kAny:
                return json::value(text);
            case Kind::kEnum:
                return enumerator(type, text, path);
            case Kind::kBool:
                if (const auto flag = parse_bool_text(text)) return json::value(*flag);
                return refuse("Parameter '{}' expects 'on' or 'off'", full_name(path, mode_));
            case Kind::kInteger: {
                if (type.is_unsigned && type.bits == 64) {
                    const auto number = parse_unsigned_text(text);
                    if (number) return integer(type, json::value(*number), path);
                } else if (const auto number = parse_signed_text(text)) {
                    return integer(type, json::value(*number), path);
                }
                return refuse("Parameter '{}' expects integer", full_name(path, mode_));
            }
            case Kind::kSize:
                if (const auto size = parse_size_text(text)) return integer(type, json::value(*size), path);
                return refuse("Parameter '{}' expects size", full_name(path, mode_));
            case Kind::kNumber:
                if (const auto number = parse_number_text(text)) return json::value(*number);
                return refuse("Parameter '{}' expects number", full_name(path, mode_));
            default:
                return refuse("Invalid parameter type for '{}', expected: {}", full_name(path, mode_),
                              expected_name(type));
        }
    }

    Result<json::value> integer(const Type& type, const json::value& in, const Path& path) {
        const bool wide = type.kind == Kind::kSize || (type.is_unsigned && type.bits == 64);
        if (in.is_uint64() && in.get_uint64() > uint64_t{std::numeric_limits<int64_t>::max()}) {
            if (wide) return json::value(in.get_uint64());
            if (type.bits == 64) return wrong_type(type, path);
            return out_of_range(type, path);
        }
        if (!in.is_int64() && !in.is_uint64()) {
            // An integer beyond 64 bits has become a double on the way in; anything else is of the wrong type.
            if (wide && in.is_double() && std::abs(in.get_double()) >= 0x1p63) return expects_wide(type, path);
            return wrong_type(type, path);
        }
        const int64_t number = in.is_int64() ? in.get_int64() : static_cast<int64_t>(in.get_uint64());
        if (wide && number < 0) return expects_wide(type, path);
        if (type.kind == Kind::kInteger && type.bits < 64) {
            const int64_t low = type.is_unsigned ? 0 : -(int64_t{1} << (type.bits - 1));
            const int64_t high = (int64_t{1} << (type.is_unsigned ? type.bits : type.bits - 1)) - 1;
            if (number < low || number > high) return out_of_range(type, path);
        }
        return json::value(number);
    }
    std::unexpected<Error> out_of_range(const Type& type, const Path& path) const {
        return refuse("Parameter '{}' expects {}int{}_t", path.last(), type.is_unsigned ? "u" : "", type.bits);
    }
    std::unexpected<Error> expects_wide(const Type& type, const Path& path) const {
        return refuse("Parameter '{}' expects {}", full_name(path, mode_),
                      type.kind == Kind::kSize ? "size" : "uint64");
    }

    Result<json::value> enumerator(const Type& type, std::string_view text, const Path& path) {
        if (std::ranges::find(type.values, text, &EnumValue::name) != type.values.end()) return json::value(text);
        const Absent* absent = find_absent(type.absent, text);
        return refuse("Parameter '{}' does not accept value '{}'{}{}", path.last(), text, absent ? "; " : "",
                      absent ? absent->reason : "");
    }

    // --- composites

    Result<json::value> array(const Type& type, json::array&& in, const Path& path) {
        for (size_t i = 0; i < in.size(); i++) {
            const Path at{&path, {}, i, true};
            TRY(json::value element, value(*type.element, std::move(in[i]), at));
            in[i] = std::move(element);
        }
        return json::value(std::move(in));
    }

    Result<json::value> alternate(const Type& type, json::value&& in, const Path& path) {
        const auto branch = [&](std::initializer_list<Kind> kinds) -> const Type* {
            for (const Branch& b : type.branches) {
                if (std::ranges::find(kinds, b.type->kind) != kinds.end()) return b.type;
            }
            return nullptr;
        };
        const Type* chosen = nullptr;
        switch (in.kind()) {
            case json::kind::string:
                // The empty reference is how one writes null where null cannot be written.
                if (in.get_string().empty() && branch({Kind::kNull})) return json::value(nullptr);
                chosen = branch({Kind::kString, Kind::kEnum});
                if (!chosen && keyval()) chosen = branch({Kind::kInteger, Kind::kSize, Kind::kBool, Kind::kNumber});
                break;
            case json::kind::object:
                chosen = branch({Kind::kObject});
                break;
            case json::kind::array:
                chosen = branch({Kind::kArray});
                break;
            case json::kind::null:
                chosen = branch({Kind::kNull});
                break;
            case json::kind::bool_:
                chosen = branch({Kind::kBool});
                break;
            case json::kind::int64:
            case json::kind::uint64:
                chosen = branch({Kind::kInteger, Kind::kSize, Kind::kNumber});
                break;
            case json::kind::double_:
                chosen = branch({Kind::kNumber});
                break;
        }
        if (!chosen) return wrong_type(type, path);
        return value(*chosen, std::move(in), path);
    }

    Result<json::object> object_at_depth(const Type& type, json::object&& in, const Path& path) {
        if (type.fold == Fold::kAlone && in.size() == 1) {
            json::value* inner = in.if_contains(type.fold_member);
            if (inner && inner->is_object()) {
                json::object unwrapped = std::move(inner->get_object());
                return flat_object(type, std::move(unwrapped), Path{&path, type.fold_member});
            }
        }
        if (type.fold == Fold::kMerge) CHECK_OK(merge(type, in, path));
        return flat_object(type, std::move(in), path);
    }

    Result<> merge(const Type& type, json::object& in, const Path& path) {
        json::value* member = in.if_contains(type.fold_member);
        if (!member) return {};
        const Path at{&path, type.fold_member};
        if (!member->is_object()) {
            return refuse("Invalid parameter type for '{}', expected: object", full_name(at, mode_));
        }
        json::object inner = std::move(member->get_object());
        in.erase(type.fold_member);
        for (auto& [key, value] : inner) {
            if (!in.emplace(key, std::move(value)).second) return unexpected(at, key, nullptr);
        }
        return {};
    }

    Result<json::object> flat_object(const Type& type, json::object&& in, const Path& path) {
        json::object out;
        CHECK_OK(take_members(type, in, out, path));
        const Type* variant = nullptr;
        bool nested = false;
        if (!type.tag.empty()) {
            const Variant* found = find_variant(type, out.at(type.tag).get_string());
            variant = found ? found->type : nullptr;
            nested = type.fold == Fold::kLegacy && in.contains(type.fold_member);
            if (nested) {
                CHECK_OK(take_nested(type, variant, in, out, path));
            } else {
                // On the command line people write the flat shape.
                if (type.fold == Fold::kLegacy && variant && in.size() == 1 && !keyval()) {
                    return missing(path, type.fold_member);
                }
                if (variant) CHECK_OK(take_members(*variant, in, out, path));
            }
        }
        for (const auto& member : in) {
            if (nested ? known(type, member.key()) : out.contains(member.key())) continue;
            const Absent* absent = find_absent_member(&type, member.key());
            if (!absent) absent = find_absent_member(variant, member.key());
            return unexpected(path, member.key(), absent);
        }
        return out;
    }

    /// Of a nested union: the tag's own members and the box of the rest.
    static bool known(const Type& type, std::string_view name) {
        if (name == type.fold_member) return true;
        return std::ranges::find(type.members, name, &Member::name) != type.members.end();
    }

    Result<> take_nested(const Type& type, const Type* variant, json::object& in, json::object& out, const Path& path) {
        static constexpr Type kNothing = struct_type("", "", {});
        const Path at{&path, type.fold_member};
        json::value& box = in.at(type.fold_member);
        if (!box.is_object()) {
            return refuse("Invalid parameter type for '{}', expected: object", full_name(at, mode_));
        }
        TRY(json::object inner, object(variant ? *variant : kNothing, std::move(box.get_object()), at));
        for (auto& [key, value] : inner) out.insert_or_assign(key, std::move(value));
        return {};
    }

    /// Moves the members that `type` and its bases declare from `in` to `out`; the keys stay in `in`.
    Result<> take_members(const Type& type, json::object& in, json::object& out, const Path& path) {
        if (type.base) CHECK_OK(take_members(*type.base, in, out, path));
        for (const Member& member : type.members) {
            for (std::string_view alias : member.aliases) {
                const auto old = in.find(alias);
                if (old == in.end()) continue;
                json::value value = std::move(old->value());
                in.erase(old);
                if (!in.emplace(member.name, std::move(value)).second) return unexpected(path, alias, nullptr);
            }
            json::value* found = in.if_contains(member.name);
            if (!found) {
                if (member.optional) continue;
                return missing(path, member.name);
            }
            TRY(json::value checked, value(*member.type, std::move(*found), Path{&path, member.name}));
            out.insert_or_assign(member.name, std::move(checked));
        }
        return {};
    }

    const InputMode mode_;
    size_t depth_ = 0;
};

}  // namespace

Result<json::object> validate(const Type& type, json::object input, InputMode mode) {
    CHECK(type.kind == Kind::kObject, "only object types have members");
    return Validator(mode).object(type, std::move(input), Path{});
}

Result<json::value> validate_value(const Type& type, json::value input, std::string_view path, InputMode mode) {
    return Validator(mode).value(type, std::move(input), Path{nullptr, path});
}

Result<json::object> validate_arguments(const Command& command, json::object arguments) {
    static constexpr Type kNoArguments = struct_type("", "", {});
    return validate(command.arguments ? *command.arguments : kNoArguments, std::move(arguments));
}

}  // namespace gantry::schema
