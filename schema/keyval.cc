#include "schema/keyval.h"

#include <algorithm>
#include <charconv>
#include <limits>
#include <map>
#include <optional>

#include "schema/json_dialect.h"

namespace gantry::schema {

namespace {

constexpr size_t kMaxFragment = 127;   // letters between two dots
constexpr size_t kMaxFragments = 256;  // as deep as the validator goes

bool is_help(std::string_view word) { return word == "help" || word == "?"; }
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }
bool all_digits(std::string_view text) { return !text.empty() && std::ranges::all_of(text, is_digit); }

/// Saturates.
uint64_t parse_decimal(std::string_view digits) {
    uint64_t value = 0;
    const auto result = std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return result.ec == std::errc() ? value : std::numeric_limits<uint64_t>::max();
}

/// How many characters at the front of `text` make a name: letter, then letters, digits, '-', '_'. A vendor's name
/// starts with "__DOMAIN_", where DOMAIN may have dots.
size_t name_length(std::string_view text) {
    size_t at = 0;
    if (text.starts_with("__")) {
        at = 2;
        while (at < text.size() && (is_letter(text[at]) || is_digit(text[at]) || text[at] == '-' || text[at] == '.'))
            at++;
        if (at == 2 || at == text.size() || text[at] != '_') return 0;
        at++;
    }
    if (at == text.size() || !is_letter(text[at])) return 0;
    while (at < text.size() && (is_letter(text[at]) || is_digit(text[at]) || text[at] == '-' || text[at] == '_')) at++;
    return at;
}

/// One key=value pair (or word) cut off the front of the text.
struct Pair {
    std::string_view key;
    std::optional<std::string> value;  // none: a word without '='
};

/// Cuts the value up to the next single comma, which it also removes.
std::string take_value(std::string_view& rest) {
    std::string value;
    while (!rest.empty()) {
        const size_t comma = rest.find(',');
        value.append(rest.substr(0, comma));
        if (comma == rest.npos) {
            rest = {};
            break;
        }
        rest.remove_prefix(comma + 1);
        if (!rest.starts_with(',')) break;
        value += ',';
        rest.remove_prefix(1);
    }
    return value;
}

Pair take_pair(std::string_view& rest) {
    const size_t end = rest.find_first_of("=,");
    Pair pair{rest.substr(0, end), std::nullopt};
    if (end == rest.npos) {
        rest = {};
    } else if (rest[end] == ',') {
        rest.remove_prefix(end + 1);
    } else {
        rest.remove_prefix(end + 1);
        pair.value = take_value(rest);
    }
    return pair;
}

std::unexpected<Error> inconsistent(std::string_view path) {
    return fail(ErrorKind::kInvalid, "Parameters '{}.*' used inconsistently", path);
}

/// Splits a dotted key and checks each part.
Result<std::vector<std::string_view>> split_key(std::string_view key) {
    std::vector<std::string_view> parts;
    std::string_view rest = key;
    for (;;) {
        const bool index = !parts.empty() && !rest.empty() && is_digit(rest[0]);
        size_t length = 0;
        if (index) {
            while (length < rest.size() && is_digit(rest[length])) length++;
        } else {
            length = name_length(rest);
        }
        const bool ends = length == rest.size();
        if (length == 0 || (!ends && rest[length] != '.')) {
            return fail(ErrorKind::kInvalid, "Invalid parameter '{}'", key);
        }
        if (length > kMaxFragment) {
            return fail(ErrorKind::kInvalid, "Parameter '{}' is too long", rest.substr(0, length));
        }
        parts.push_back(rest.substr(0, length));
        if (parts.size() > kMaxFragments) {
            return fail(ErrorKind::kTooLarge, "Parameter '{}...' is nested too deeply; at most {} levels",
                        key.substr(0, kMaxFragment), kMaxFragments);
        }
        if (ends) return parts;
        rest.remove_prefix(length + 1);
    }
}

Result<> put_dotted(json::object& top, std::string_view key, std::string&& value) {
    TRY(std::vector<std::string_view> parts, split_key(key));
    json::object* at = &top;
    for (size_t i = 0; i + 1 < parts.size(); i++) {
        json::value& child = at->emplace(parts[i], json::object()).first->value();
        if (!child.is_object()) return inconsistent(key.substr(0, parts[i].data() + parts[i].size() - key.data()));
        at = &child.get_object();
    }
    json::value& leaf = at->emplace(parts.back(), json::string()).first->value();
    if (leaf.is_object()) return inconsistent(key);
    leaf = std::move(value);
    return {};
}

/// Turns objects whose keys are all numbers into arrays, from the inside out.
Result<> listify(json::value& node, const std::string& path) {
    if (!node.is_object()) return {};
    json::object& object = node.get_object();
    size_t indices = 0;
    for (auto& [key, value] : object) {
        if (all_digits(key)) indices++;
        CHECK_OK(listify(value, path.empty() ? std::string(key) : path + "." + std::string(key)));
    }
    if (indices == 0) return {};
    if (indices != object.size()) return inconsistent(path);

    // By number: "0" and "00" are the same element. A number too large for the type leaves a gap like any other.
    std::map<uint64_t, json::value*> elements;
    for (auto& [key, value] : object) elements[parse_decimal(key)] = &value;
    json::array array;
    for (auto& [index, value] : elements) {
        if (index != array.size()) {
            return fail(ErrorKind::kInvalid, "Parameter '{}.{}' missing", path, array.size());
        }
        array.push_back(std::move(*value));
    }
    node = std::move(array);
    return {};
}

Result<OptionValue> parse_dotted(std::string_view text, std::string_view implied_key) {
    OptionValue out;
    std::string_view rest = text;
    bool first = true;
    while (!rest.empty()) {
        const bool implied = std::exchange(first, false) && !implied_key.empty();
        Pair pair = take_pair(rest);
        if (!pair.value) {
            if (is_help(pair.key)) {
                out.help = true;
                continue;
            }
            if (!implied || pair.key.empty()) {
                CHECK_OK(split_key(pair.key));
                return fail(ErrorKind::kInvalid, "Expected '=' after parameter '{}'", pair.key);
            }
            pair.value = std::string(pair.key);
            pair.key = implied_key;
        }
        CHECK_OK(put_dotted(out.object, pair.key, std::move(*pair.value)));
    }
    json::value top = std::move(out.object);
    CHECK_OK(listify(top, ""));
    out.object = std::move(top.get_object());
    return out;
}

Result<OptionValue> parse_flat(std::string_view text, std::string_view implied_key) {
    OptionValue out;
    std::string_view rest = text;
    bool first = true;
    while (!rest.empty()) {
        const bool implied = std::exchange(first, false) && !implied_key.empty();
        if (implied && rest.find_first_of("=,") < rest.size() && rest[rest.find_first_of("=,")] == '=') {
            // key=value already: nothing is implied
        } else if (implied) {
            std::string word = take_value(rest);
            if (is_help(word)) {
                out.help = true;
            } else {
                out.object.insert_or_assign(implied_key, std::move(word));
            }
            continue;
        }
        Pair pair = take_pair(rest);
        if (pair.key.empty()) return fail(ErrorKind::kInvalid, "Invalid parameter ''");
        if (!pair.value) {
            if (is_help(pair.key)) {
                out.help = true;
                continue;
            }
            const std::string_view word = pair.key;
            const bool off = word.starts_with("no") && word.size() > 2;
            if (off) pair.key.remove_prefix(2);
            pair.value = off ? "off" : "on";
            out.warnings.push_back(fmt::format("short-form boolean option '{}' deprecated; use {}={} instead", word,
                                               pair.key, *pair.value));
        }
        out.object.insert_or_assign(pair.key, std::move(*pair.value));
    }
    return out;
}

}  // namespace

Result<OptionValue> parse_keyval(std::string_view text, std::string_view implied_key, KeyvalStyle style) {
    return style == KeyvalStyle::kDotted ? parse_dotted(text, implied_key) : parse_flat(text, implied_key);
}

Result<OptionValue> parse_option_value(std::string_view text, std::string_view implied_key, KeyvalStyle style) {
    if (!text.starts_with('{')) return parse_keyval(text, implied_key, style);
    TRY(json::value value, parse_json(text));
    // What starts with '{' and parses is an object.
    return OptionValue{std::move(value.as_object()), InputMode::kJson, false, {}};
}

Result<json::object> parse_option(const Type& type, std::string_view text, std::string_view implied_key,
                                  KeyvalStyle style) {
    TRY(OptionValue value, parse_option_value(text, implied_key, style));
    if (value.help) return fail(ErrorKind::kInvalid, "Help is not available for this option");
    return validate(type, std::move(value.object), value.mode);
}

}  // namespace gantry::schema
