#include <charconv>
#include <cmath>

#include "runtime/check.h"
#include "schema/json_dialect.h"
#include "schema/unicode.h"

namespace gantry::schema {

namespace {

void write_escape(std::string& out, uint32_t unit) {
    constexpr char kHex[] = "0123456789ABCDEF";
    out += "\\u";
    for (int shift = 12; shift >= 0; shift -= 4) out += kHex[unit >> shift & 0xf];
}

void write_string(std::string& out, std::string_view text) {
    constexpr uint32_t kReplacement = 0xfffd;
    out += '"';
    while (!text.empty()) {
        const DecodedCharacter c = decode_utf8(text);
        const uint32_t code = c.valid ? c.code : kReplacement;
        text.remove_prefix(c.length);
        constexpr std::string_view kBytes = "\"\\\b\f\n\r\t";
        constexpr std::string_view kNames = "\"\\bfnrt";
        const size_t named = code < 0x80 ? kBytes.find(static_cast<char>(code)) : kBytes.npos;
        if (named != kBytes.npos) {
            out += '\\';
            out += kNames[named];
        } else if (code >= 0x20 && code < 0x7f) {
            out += static_cast<char>(code);
        } else if (code < 0x10000) {
            write_escape(out, code);
        } else {
            write_escape(out, 0xd800 + ((code - 0x10000) >> 10));
            write_escape(out, 0xdc00 + ((code - 0x10000) & 0x3ff));
        }
    }
    out += '"';
}

/// The fewest digits that read back as `d`, laid out like %.17g: plain from 1e-4 to below 1e17, else with an exponent.
void write_double(std::string& out, double d) {
    CHECK(std::isfinite(d), "JSON has no infinities");
    char buffer[64];
    const double magnitude = std::fabs(d);
    const bool plain = magnitude == 0 || (magnitude >= 1e-4 && magnitude < 1e17);
    const auto end = std::to_chars(buffer, buffer + sizeof(buffer), d,
                                   plain ? std::chars_format::fixed : std::chars_format::scientific);
    out.append(buffer, end.ptr);
}

template <class Int>
void write_integer(std::string& out, Int i) {
    char buffer[24];
    const auto end = std::to_chars(buffer, buffer + sizeof(buffer), i);
    out.append(buffer, end.ptr);
}

struct Writer {
    std::string& out;
    bool pretty;
    size_t level = 0;

    void line() {
        if (!pretty) return;
        out += '\n';
        out.append(level * 4, ' ');
    }
    void separator(bool first) {
        if (!first) out += pretty ? "," : ", ";
        line();
    }
    void value(const json::value& v) {
        switch (v.kind()) {
            case json::kind::null:
                out += "null";
                break;
            case json::kind::bool_:
                out += v.get_bool() ? "true" : "false";
                break;
            case json::kind::int64:
                write_integer(out, v.get_int64());
                break;
            case json::kind::uint64:
                write_integer(out, v.get_uint64());
                break;
            case json::kind::double_:
                write_double(out, v.get_double());
                break;
            case json::kind::string:
                write_string(out, v.get_string());
                break;
            case json::kind::array: {
                out += '[';
                level++;
                bool first = true;
                for (const json::value& element : v.get_array()) {
                    separator(first);
                    first = false;
                    value(element);
                }
                level--;
                line();
                out += ']';
                break;
            }
            case json::kind::object: {
                out += '{';
                level++;
                bool first = true;
                for (const auto& member : v.get_object()) {
                    separator(first);
                    first = false;
                    write_string(out, member.key());
                    out += ": ";
                    value(member.value());
                }
                level--;
                line();
                out += '}';
                break;
            }
        }
    }
};

}  // namespace

void write_json(std::string& out, const json::value& value, JsonLayout layout) {
    Writer{out, layout == JsonLayout::kPretty}.value(value);
}

std::string to_json(const json::value& value, JsonLayout layout) {
    std::string out;
    write_json(out, value, layout);
    return out;
}

}  // namespace gantry::schema
