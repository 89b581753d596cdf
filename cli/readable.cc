#include "cli/readable.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>

#include "schema/json_dialect.h"

namespace gantry::cli {

namespace {

bool is_scalar(const json::value& v) {
    return !(v.is_object() && !v.get_object().empty()) && !(v.is_array() && !v.get_array().empty());
}

std::string scalar(const json::value& v) {
    if (v.is_string()) return std::string(v.get_string());
    return schema::to_json(v);
}

void append(std::string& out, const json::value& value, size_t indent, bool first_inline) {
    std::string pad(indent, ' ');
    bool skip_pad = first_inline;
    auto start_line = [&] {
        if (!std::exchange(skip_pad, false)) out += pad;
    };
    if (value.is_object() && !value.get_object().empty()) {
        for (const auto& [key, member] : value.get_object()) {
            start_line();
            if (is_scalar(member)) {
                out += fmt::format("{}: {}\n", std::string_view(key), scalar(member));
            } else {
                out += fmt::format("{}:\n", std::string_view(key));
                append(out, member, indent + 2, false);
            }
        }
    } else if (value.is_array() && !value.get_array().empty()) {
        for (const json::value& item : value.get_array()) {
            start_line();
            out += "- ";
            if (is_scalar(item)) {
                out += scalar(item) + "\n";
            } else {
                append(out, item, indent + 2, true);
            }
        }
    } else {
        start_line();
        out += scalar(value) + "\n";
    }
}

}  // namespace

std::string readable(const json::value& value) {
    if (value.is_object() && value.get_object().empty()) return {};
    std::string out;
    append(out, value, 0, false);
    return out;
}

std::string table(const std::vector<std::vector<std::string>>& rows) {
    std::vector<size_t> widths;
    for (const auto& row : rows) {
        widths.resize(std::max(widths.size(), row.size()));
        for (size_t i = 0; i < row.size(); i++) widths[i] = std::max(widths[i], row[i].size());
    }
    std::string out;
    for (const auto& row : rows) {
        std::string line;
        for (size_t i = 0; i < row.size(); i++)
            line += i + 1 < row.size() ? fmt::format("{:<{}}  ", row[i], widths[i]) : row[i];
        out += line + "\n";
    }
    return out;
}

std::string readable_size(uint64_t bytes) {
    constexpr std::array kUnits = {"B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"};
    size_t unit = 0;
    double value = static_cast<double>(bytes);
    while (value >= 1024 && unit + 1 < kUnits.size()) {
        value /= 1024;
        unit++;
    }
    if (unit == 0) return fmt::format("{} B", bytes);
    return fmt::format("{:.3g} {} ({} bytes)", value, kUnits[unit], bytes);
}

}  // namespace gantry::cli
