// The tables against the reference's own schema: from the seed files where they are at hand (GANTRY_SHARED, or
// ../shared beside the source), and always from reference_names.txt, a list of the facts in them.

#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <regex>
#include <set>
#include <sstream>

#include "schema/json_dialect.h"
#include "schema/schema.h"
#include "schema/unserved.h"

namespace gantry::schema {

namespace {

namespace fs = std::filesystem;
using Facts = std::set<std::string>;

const fs::path kHere = fs::path(__FILE__).parent_path();

/// One fact a line,
/// as the head of reference_names.txt explains, where a command's arguments and an event's data are members of the type
/// that has its name.
struct SeedReader {
    Facts facts;

    static std::string type_text(const json::value& type) {
        if (type.is_string()) return std::string(type.get_string());
        if (type.is_array()) return "[" + type_text(type.get_array().at(0)) + "]";
        const json::object& object = type.get_object();
        return type_text(object.at("type"));
    }
    void members(const std::string& owner, const json::value& data) {
        if (!data.is_object()) return;
        for (const auto& member : data.get_object()) {
            facts.insert("member " + owner + " " + std::string(member.key()) + " " + type_text(member.value()));
        }
    }
    void declaration(const json::object& d) {
        const auto name = [&](std::string_view key) -> std::string {
            const json::value* v = d.if_contains(key);
            return v ? std::string(v->get_string()) : std::string();
        };
        const json::value* data = d.if_contains("data");
        if (std::string command = name("command"); !command.empty()) {
            facts.insert("command " + command);
            if (data) members(command, *data);
        } else if (std::string event = name("event"); !event.empty()) {
            facts.insert("event " + event);
            if (data) members(event, *data);
        } else if (std::string type = name("struct"); !type.empty()) {
            members(type, *data);
        } else if (std::string type = name("enum"); !type.empty()) {
            for (const json::value& v : data->get_array()) {
                const json::value& value = v.is_object() ? v.at("name") : v;
                facts.insert("enum " + type + " " + std::string(value.get_string()));
            }
        } else if (std::string type = name("union"); !type.empty()) {
            if (const json::value* base = d.if_contains("base")) members(type, *base);
            for (const auto& v : data->get_object()) {
                facts.insert("case " + type + " " + std::string(v.key()) + " " + type_text(v.value()));
            }
        }
    }
    /// A schema file: declarations in QMP's JSON dialect, comments from '#' to the end of the line.
    void schema_file(const fs::path& path) {
        std::ifstream in(path);
        REQUIRE(in);
        JsonReader reader;
        for (std::string line; std::getline(in, line);) {
            if (!line.starts_with("#")) reader.feed(line + "\n");
        }
        size_t count = 0;
        while (auto message = reader.next()) {
            REQUIRE(*message);
            declaration((*message)->get_object());
            count++;
        }
        REQUIRE(count > 10);
    }
    /// Only command names can be had from these.
    void text_file(const fs::path& path, const std::regex& pattern) {
        std::ifstream in(path);
        REQUIRE(in);
        std::stringstream buffer;
        buffer << in.rdbuf();
        const std::string text = buffer.str();
        for (std::sregex_iterator i(text.begin(), text.end(), pattern), end; i != end; ++i) {
            facts.insert("command " + (*i)[1].str());
        }
    }
};

Facts recorded_facts() {
    Facts facts;
    std::ifstream in(kHere / "reference_names.txt");
    REQUIRE(in);
    for (std::string line; std::getline(in, line);) {
        if (!line.empty() && !line.starts_with("#")) facts.insert(line);
    }
    REQUIRE(facts.size() > 100);
    return facts;
}

std::optional<fs::path> seeds_folder() {
    const char* shared = std::getenv("GANTRY_SHARED");
    const fs::path folder = (shared ? fs::path(shared) : kHere / "../../../../shared") / "seeds";
    if (!fs::exists(folder)) return std::nullopt;
    return folder;
}

Facts seed_facts(const fs::path& folder) {
    SeedReader reader;
    reader.schema_file(folder / "block-core-2.4.json");
    reader.schema_file(folder / "block-export-9.0.json");
    reader.text_file(folder / "qmp-commands-2.4.txt", std::regex("\\.name\\s*=\\s*\"([^\"]+)\""));
    reader.text_file(folder / "block-stream-1.1.diff", std::regex("'command':\\s*'([^']+)'"));
    return reader.facts;
}

/// Where we differ from the facts knowingly, and why.
const std::map<std::string, std::string> kDifferences = {
    {"member BlockDeviceInfo encryption_key_missing bool", "gone from the reference since 8.0"},
    {"member BlockInfo *dirty-bitmaps [BlockDirtyInfo]", "moved to BlockDeviceInfo in 5.2"},
    {"member BlockDirtyInfo status DirtyBitmapStatus", "replaced by recording, busy, inconsistent in 4.0"},
    {"member BlockdevOptionsGenericCOWFormat *backing BlockdevRef", "BlockdevRefOrNull since 2.12"},
    {"case BlockdevOptions raw BlockdevOptionsGenericFormat", "BlockdevOptionsRaw since 2.8"},
    {"member blockdev-add options BlockdevOptions", "flat since 2.9; the old shape is folded"},
    {"member BlockExportOptions *iothread str", "a list too since 10.2"},
    {"argument block-export-add *iothread str", "a list too since 10.2"},
    {"argument nbd-server-start addr object", "a list too"},
    {"member nbd-server-start addr SocketAddressLegacy", "a list too"},
    {"member NbdServerOptions addr SocketAddress", "a list too, and the nested shape"},
    {"case ImageInfoSpecific vmdk ImageInfoSpecificVmdk", "the format is not built"},
};

/// The type that holds the members of a fact's owner; null when it is not served.
const Type* owner_type(const std::string& name) {
    if (const Command* command = find_command(name)) return command->arguments;
    if (const Event* event = find_event(name)) return event->data;
    // The base of the old union is part of the union.
    return find_type(name == "BlockdevOptionsBase" ? "BlockdevOptions" : name);
}

const Member* find_member(const Type* type, std::string_view name) {
    for (; type; type = type->base) {
        const auto it = std::ranges::find(type->members, name, &Member::name);
        if (it != type->members.end()) return &*it;
    }
    return nullptr;
}

bool is_absent(const Type* type, std::string_view name) {
    for (; type; type = type->base) {
        if (std::ranges::find(type->absent, name, &Absent::name) != type->absent.end()) return true;
    }
    return false;
}

std::string table_type(const Type& type) {
    return type.kind == Kind::kArray ? "[" + table_type(*type.element) + "]" : std::string(type.name);
}

/// How introspection names what a type looks like.
std::string_view kind_name(const Type& type) {
    switch (type.kind) {
        case Kind::kInteger:
        case Kind::kSize:
            return "int";
        case Kind::kEnum:
            return "enum";
        case Kind::kObject:
            return "object";
        case Kind::kAlternate:
            return "alternate";
        case Kind::kArray:
            return "array";
        default:
            return type.name;
    }
}

/// A member by [*]NAME and KIND.
std::string member_disagreement(const Type* type, const std::string& text, const std::string& kind) {
    const bool optional = text.starts_with('*');
    const std::string name = optional ? text.substr(1) : text;
    const Member* member = find_member(type, name);
    if (!member) return is_absent(type, name) ? "" : "member is missing";
    if (member->optional != optional) return "optional on one side only";
    return kind_name(*member->type) == kind ? "" : "member is of kind " + std::string(kind_name(*member->type));
}

/// Empty when the tables agree.
std::string disagreement(const std::string& fact) {
    std::istringstream in(fact);
    std::string kind, first, second, third, fourth;
    in >> kind >> first >> second >> third >> fourth;
    if (kind == "argument") {
        if (!find_command(first) && !find_event(first)) return "";
        return member_disagreement(owner_type(first), second, third);
    }
    if (kind == "option") {
        const Type& type = *find_type(first);
        const auto variant = std::ranges::find(type.variants, second, &Variant::value);
        const auto tag = std::ranges::find(type.members, type.tag, &Member::name);
        if (variant == type.variants.end()) return is_absent(tag->type, second) ? "" : "case is missing";
        return member_disagreement(variant->type, third, fourth);
    }
    if (kind == "command") {
        return find_command(first) || unserved_command(first) ? "" : "neither served nor known to be absent";
    }
    if (kind == "event") return find_event(first) || unserved_event(first) ? "" : "neither sent nor known to be absent";
    if (kind == "enum") {
        const Type* type = find_type(first);
        return !type || has_value(*type, second) || is_absent(type, second) ? "" : "value is missing";
    }
    if (kind == "case") {
        const Type* type = find_type(first);
        if (!type) return "";
        const auto variant = std::ranges::find(type->variants, second, &Variant::value);
        if (variant != type->variants.end()) {
            return variant->type->name == third ? "" : "case has type " + std::string(variant->type->name);
        }
        const auto tag = std::ranges::find(type->members, type->tag, &Member::name);
        return is_absent(tag->type, second) ? "" : "case is missing";
    }
    REQUIRE(kind == "member");
    const Type* type = owner_type(first);
    if (!type) return "";
    const bool optional = second.starts_with('*');
    const std::string name = optional ? second.substr(1) : second;
    const Member* member = find_member(type, name);
    if (!member) return is_absent(type, name) ? "" : "member is missing";
    if (member->optional != optional) return "optional on one side only";
    const std::string have = table_type(*member->type);
    return have == third ? "" : "member has type " + have;
}

void hold_against(const Facts& facts) {
    for (const std::string& fact : facts) {
        INFO(fact);
        const std::string difference = disagreement(fact);
        if (kDifferences.contains(fact)) {
            CHECK(difference != "");  // else the entry is out of date
        } else {
            CHECK(difference == "");
        }
    }
}

}  // namespace

TEST_CASE("reference: the tables agree with the recorded names", "[schema][reference]") {
    hold_against(recorded_facts());
}

TEST_CASE("reference: the recorded names are those of the seed files", "[schema][reference]") {
    const auto folder = seeds_folder();
    if (!folder) {
        WARN("skipped: no seed files (set GANTRY_SHARED); the recorded names were checked");
        return;
    }
    const Facts seeds = seed_facts(*folder);
    const Facts recorded = recorded_facts();
    for (const std::string& fact : seeds) {
        INFO(fact);
        CHECK(recorded.contains(fact));
    }
    hold_against(seeds);
}

TEST_CASE("reference: what is served is not called absent", "[schema][reference]") {
    for (const Command* command : commands()) {
        INFO(command->name);
        CHECK_FALSE(unserved_command(command->name));
    }
    for (const Event* event : events()) CHECK_FALSE(unserved_event(event->name));
    for (std::string_view name : {"BlockdevDriver", "BlockExportType", "ObjectType"}) {
        for (const EnumValue& value : type(name).values) {
            INFO(value.name);
            CHECK_FALSE(is_absent(&type(name), value.name));
        }
        for (const Absent& absent : type(name).absent)
            CHECK_THAT(std::string(absent.reason), Catch::StartsWith("not in this build: "));
    }
    CHECK(unserved_driver("vmdk"));
    CHECK_FALSE(unserved_driver("no-such-driver"));
    CHECK(unserved_command("migrate") == "not in this build: there is no virtual machine");
    CHECK_FALSE(unserved_export("vduse-blk"));
    CHECK(unserved_object("throttle-group"));
}

}  // namespace gantry::schema
