// --chardev: the checks that its older syntax words in its own way.

#include <algorithm>

#include "schema/keyval.h"
#include "schema/schema.h"

namespace gantry::schema {

namespace {

bool has_member(const Type* type, std::string_view name) {
    for (; type; type = type->base) {
        if (std::ranges::find(type->members, name, &Member::name) != type->members.end()) return true;
        // A known but absent one is refused by the validator, which has the reason.
        if (std::ranges::find(type->absent, name, &Absent::name) != type->absent.end()) return true;
    }
    return false;
}

Result<> check_words(const Type& options, const json::object& object) {
    const json::value* id = object.if_contains("id");
    if (!id) return fail(ErrorKind::kInvalid, "chardev: no id specified");
    const json::value* backend = object.if_contains("backend");
    if (!backend) {
        return fail(ErrorKind::kInvalid, "chardev: \"{}\" missing backend", std::string_view(id->get_string()));
    }
    const std::string_view kind = backend->get_string();
    const auto variant = std::ranges::find(options.variants, kind, &Variant::value);
    if (variant == options.variants.end()) {
        const auto absent = std::ranges::find(type("ChardevBackendKind").absent, kind, &Absent::name);
        const bool known = absent != type("ChardevBackendKind").absent.end();
        return fail(ErrorKind::kInvalid, "'{}' is not a valid char driver name{}{}", kind, known ? "; " : "",
                    known ? absent->reason : "");
    }
    for (const auto& member : object) {
        if (has_member(&options, member.key()) || has_member(variant->type, member.key())) continue;
        return fail(ErrorKind::kInvalid, "Invalid parameter '{}'", std::string_view(member.key()));
    }
    return {};
}

}  // namespace

Result<json::object> parse_chardev(std::string_view text, std::vector<std::string>& warnings) {
    const Type& options = type("ChardevOptions");
    TRY(OptionValue value, parse_option_value(text, "backend", KeyvalStyle::kFlat));
    if (value.help) return fail(ErrorKind::kInvalid, "Help is not available for this option");
    std::ranges::move(value.warnings, std::back_inserter(warnings));
    if (value.mode == InputMode::kKeyval) CHECK_OK(check_words(options, value.object));
    return validate(options, std::move(value.object), value.mode);
}

}  // namespace gantry::schema
