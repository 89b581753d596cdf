#include "schema/help.h"

#include <fmt/format.h>

#include <algorithm>
#include <vector>

#include "runtime/check.h"

namespace gantry::schema {

namespace {

struct Line {
    std::string left;
    std::string right;
};

/// Two columns; the left one as wide as its longest entry, within reason.
std::string columns(const std::vector<Line>& lines) {
    constexpr size_t kWidest = 34;
    size_t width = 0;
    for (const Line& line : lines) width = std::max(width, std::min(line.left.size(), kWidest));
    std::string out;
    for (const Line& line : lines) {
        const std::string text = fmt::format("  {:<{}}  {}", line.left, width, line.right);
        out += text.substr(0, text.find_last_not_of(' ') + 1) + "\n";
    }
    return out;
}

std::string explain(const Member& member) {
    std::string out(member.doc);
    if (!member.optional) return out + " (required)";
    if (!member.fallback.empty()) out += fmt::format(" (default: {})", member.fallback);
    return out;
}

void add_members(std::vector<Line>& lines, const Type& type) {
    if (type.base) add_members(lines, *type.base);
    for (const Member& member : type.members) {
        lines.push_back({fmt::format("{}=<{}>", member.name, type_label(*member.type)), explain(member)});
    }
}

const Type& tag_type(const Type& type) {
    const auto tag = std::ranges::find(type.members, type.tag, &Member::name);
    CHECK(tag != type.members.end(), "a union's tag is one of its own members");
    return *tag->type;
}

std::string members_text(const Type& type) {
    std::vector<Line> lines;
    add_members(lines, type);
    return columns(lines);
}

}  // namespace

std::string type_label(const Type& type) {
    switch (type.kind) {
        case Kind::kString:
            return "string";
        case Kind::kArray:
            return "[" + type_label(*type.element) + "]";
        case Kind::kEnum: {
            constexpr size_t kFew = 4;
            if (type.values.size() > kFew) return std::string(type.name);
            std::string out;
            for (const EnumValue& value : type.values) out += fmt::format("{}{}", out.empty() ? "" : "|", value.name);
            return out;
        }
        default:
            return std::string(type.name);
    }
}

std::string help_values(const Type& type) {
    const Type& values = type.kind == Kind::kEnum ? type : tag_type(type);
    std::vector<Line> lines;
    for (const EnumValue& value : values.values) lines.push_back({std::string(value.name), std::string(value.doc)});
    return columns(lines);
}

std::string help_for_variant(const Type& union_type, std::string_view value) {
    std::string out = fmt::format("{} options:\n", value);
    const auto variant = std::ranges::find(union_type.variants, value, &Variant::value);
    if (variant != union_type.variants.end() && variant->type) out += members_text(*variant->type);
    return out;
}

std::string help_for(const Type& type) {
    std::string out;
    if (!type.doc.empty()) out += fmt::format("{}\n", type.doc);
    if (type.kind == Kind::kEnum) return out + help_values(type);
    if (type.kind == Kind::kAlternate) {
        std::vector<Line> lines;
        for (const Branch& branch : type.branches)
            lines.push_back({type_label(*branch.type), std::string(branch.name)});
        return out + columns(lines);
    }
    out += members_text(type);
    for (const Variant& variant : type.variants) {
        if (variant.type) out += fmt::format("\n{}={}:\n{}", type.tag, variant.value, members_text(*variant.type));
    }
    return out;
}

std::string help_for(const Command& command) {
    std::string out = fmt::format("{}\n{}\n", command.name, command.doc);
    if (command.arguments) {
        // The type's own sentence would repeat the command's.
        Type arguments = *command.arguments;
        arguments.doc = {};
        out += "\nArguments:\n" + help_for(arguments);
    }
    if (command.returns) out += fmt::format("\nReturns: {}\n", type_label(*command.returns));
    return out;
}

}  // namespace gantry::schema
