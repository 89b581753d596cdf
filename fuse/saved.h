// What a process before this one has saved, looked at without trust: whatever is missing or of another kind is nothing.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "schema/value.h"

namespace gantry::fuse {

inline bool flag_in(const json::object& saved, std::string_view key) {
    const json::value* value = saved.if_contains(key);
    return value && value->is_bool() && value->get_bool();
}

/// 0 for what is no such number.
inline uint64_t number_in(const json::object& saved, std::string_view key) {
    const json::value* value = saved.if_contains(key);
    boost::system::error_code error;
    const uint64_t number = value && value->is_number() ? value->to_number<uint64_t>(error) : 0;
    return error ? 0 : number;
}

inline std::string text_in(const json::object& saved, std::string_view key) {
    const json::value* value = saved.if_contains(key);
    return value && value->is_string() ? std::string(value->get_string()) : std::string();
}

/// Null: there is none.
inline const json::object* object_in(const json::object& saved, std::string_view key) {
    const json::value* value = saved.if_contains(key);
    return value ? value->if_object() : nullptr;
}

/// The same, or an empty one.
inline const json::object& members_in(const json::object& saved, std::string_view key) {
    static const json::object empty;
    const json::object* found = object_in(saved, key);
    return found ? *found : empty;
}

}  // namespace gantry::fuse
