// Options: typed access to an object that has passed schema validation.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "runtime/check.h"
#include "schema/value.h"

namespace gantry::schema {

/// A view of a validated object: members have the types the schema says, so the getters CHECK instead of failing.
/// Absent members give the default. The object must outlive the view.
class Options {
  public:
    explicit Options(const json::object& object) : object_(&object) {}

    const json::object& raw() const { return *object_; }
    bool has(std::string_view key) const { return object_->contains(key); }
    const json::value* find(std::string_view key) const { return object_->if_contains(key); }

    std::string str(std::string_view key, std::string_view fallback = {}) const {
        const json::value* v = find(key);
        if (!v) return std::string(fallback);
        GANTRY_CHECK(v->is_string(), "the schema says string");
        return std::string(v->get_string());
    }
    bool flag(std::string_view key, bool fallback = false) const {
        const json::value* v = find(key);
        if (!v) return fallback;
        GANTRY_CHECK(v->is_bool(), "the schema says bool");
        return v->get_bool();
    }
    int64_t integer(std::string_view key, int64_t fallback = 0) const {
        const json::value* v = find(key);
        if (!v) return fallback;
        if (v->is_uint64()) return static_cast<int64_t>(v->get_uint64());
        GANTRY_CHECK(v->is_int64(), "the schema says integer");
        return v->get_int64();
    }
    uint64_t size(std::string_view key, uint64_t fallback = 0) const {
        return static_cast<uint64_t>(integer(key, static_cast<int64_t>(fallback)));
    }
    /// The member must be present.
    const json::object& object(std::string_view key) const {
        const json::value* v = find(key);
        GANTRY_CHECK(v && v->is_object(), "the schema says object");
        return v->get_object();
    }

  private:
    const json::object* object_;
};

}  // namespace gantry::schema
