// query-qmp-schema describes itself and everything served, and help knows every type.

#include "schema/introspect.h"

#include <catch2/catch.hpp>
#include <map>

#include "schema/help.h"
#include "schema/json_dialect.h"
#include "schema/schema.h"
#include "schema/validate.h"

namespace gantry::schema {

namespace {

/// The answer by name.
struct Schema {
    std::map<std::string, json::object> entries;

    Schema() {
        for (const json::value& entry : introspect()) {
            const json::object& object = entry.get_object();
            const bool fresh = entries.emplace(std::string(object.at("name").get_string()), object).second;
            REQUIRE(fresh);
        }
    }
    const json::object& at(const json::value& name) const { return entries.at(std::string(name.get_string())); }
    const json::object& arguments(std::string_view command) const {
        return at(entries.at(std::string(command)).at("arg-type"));
    }
    static const json::object& member(const json::object& object, std::string_view name) {
        for (const json::value& m : object.at("members").get_array()) {
            if (m.at("name") == json::value(name)) return m.get_object();
        }
        FAIL("no member " << name);
        return object;
    }
    const json::object& variant(const json::object& object, std::string_view value) const {
        for (const json::value& v : object.at("variants").get_array()) {
            if (v.at("case") == json::value(value)) return at(v.at("type"));
        }
        FAIL("no case " << value);
        return object;
    }
};

}  // namespace

TEST_CASE("introspection: every type that is named has an entry", "[schema][introspect]") {
    const Schema schema;
    const auto exists = [&](const json::value& name) {
        return schema.entries.contains(std::string(name.get_string()));
    };
    for (const auto& [name, entry] : schema.entries) {
        INFO(name);
        for (std::string_view key : {"arg-type", "ret-type", "element-type"}) {
            if (const json::value* type = entry.if_contains(key)) CHECK(exists(*type));
        }
        if (const json::value* members = entry.if_contains("members")) {
            for (const json::value& m : members->get_array()) {
                if (const json::value* type = m.get_object().if_contains("type")) CHECK(exists(*type));
            }
        }
        if (const json::value* variants = entry.if_contains("variants")) {
            const json::object& tag = schema.at(Schema::member(entry, entry.at("tag").get_string()).at("type"));
            CHECK(tag.at("values").get_array().size() == variants->get_array().size());
            for (const json::value& v : variants->get_array()) CHECK(exists(v.at("type")));
        }
    }
}

TEST_CASE("introspection: the answer fits its own description", "[schema][introspect]") {
    const Type& entry_type = type("SchemaInfo");
    for (json::value& entry : introspect()) {
        INFO(to_json(entry));
        auto checked = validate_value(entry_type, entry);
        CHECK((checked ? std::string() : checked.error().message()) == "");
    }
    CHECK(validate_value(*find_command("query-commands")->returns, command_list()));
    CHECK(validate_value(*find_command("query-events")->returns, event_list()));
}

TEST_CASE("introspection: the shapes clients probe for", "[schema][introspect]") {
    const Schema schema;
    CHECK(to_json(json::value(schema.entries.at("0"))) == R"({"name": "0", "meta-type": "object", "members": []})");
    CHECK(to_json(json::value(schema.entries.at("quit"))) ==
          R"({"name": "quit", "meta-type": "command", "arg-type": "0", "ret-type": "0"})");

    const json::object& node = schema.arguments("blockdev-add");
    CHECK(node.at("tag") == json::value("driver"));
    CHECK_FALSE(Schema::member(node, "driver").contains("default"));
    CHECK(Schema::member(node, "node-name").at("default").is_null());
    const json::object& file = schema.variant(node, "file");
    CHECK(file.at("features") == json::value(json::array{"dynamic-auto-read-only"}));
    const json::object& qcow2 = schema.variant(node, "qcow2");
    const json::object& backing = schema.at(Schema::member(qcow2, "backing").at("type"));
    CHECK(backing.at("meta-type") == json::value("alternate"));
    CHECK(backing.at("members").get_array().size() == 3);
    // The list of blockdev-reopen has the very same type as the argument of blockdev-add.
    const json::object& list = schema.at(Schema::member(schema.arguments("blockdev-reopen"), "options").at("type"));
    CHECK(list.at("element-type") == node.at("name"));
    CHECK(list.at("name") == json::value("[" + std::string(node.at("name").get_string()) + "]"));

    const json::object& addresses = schema.at(Schema::member(schema.arguments("nbd-server-start"), "addr").at("type"));
    CHECK(addresses.at("meta-type") == json::value("alternate"));
    const json::object& address = schema.at(addresses.at("members").get_array().at(0).at("type"));
    const json::object& unix_address = schema.variant(address, "unix");
    const json::object& data = schema.at(Schema::member(unix_address, "data").at("type"));
    CHECK(Schema::member(data, "path").at("type") == json::value("str"));
}

TEST_CASE("introspection: every command and event is listed", "[schema][introspect]") {
    const Schema schema;
    for (const Command* command : commands()) {
        INFO(command->name);
        CHECK(schema.entries.at(std::string(command->name)).at("meta-type") == json::value("command"));
    }
    for (const Event* event : events()) {
        INFO(event->name);
        CHECK(schema.entries.at(std::string(event->name)).at("meta-type") == json::value("event"));
    }
    CHECK(command_list().size() == commands().size());
    CHECK(event_list().size() == events().size());
}

TEST_CASE("help: members with type, default and explanation", "[schema][help]") {
    const std::string text = help_for_variant(type("ObjectOptions"), "iothread");
    CHECK_THAT(text, Catch::StartsWith("iothread options:\n"));
    CHECK_THAT(text, Catch::Contains("poll-max-ns=<int>") && Catch::Contains("(default: 32768)"));
    CHECK_THAT(help_values(type("ObjectOptions")), Catch::Contains("  iothread"));
    CHECK_THAT(help_for(type("BlockdevOptions")),
               Catch::Contains("driver=qcow2:\n") && Catch::Contains("file=<BlockdevRef>"));
    CHECK_THAT(help_for(*find_command("block_resize")), Catch::Contains("size=<int>") && Catch::Contains("(required)"));
    for (const Command* command : commands()) {
        INFO(command->name);
        CHECK(help_for(*command).ends_with('\n'));
        CHECK_FALSE(command->doc.empty());
    }
}

TEST_CASE("tables: every member, value and case is whole", "[schema]") {
    for (const Command* command : commands()) {
        if (command->arguments) CHECK(command->arguments->kind == Kind::kObject);
    }
    for (std::string_view name : {"BlockdevOptions", "BlockExportOptions", "ObjectOptions", "NbdServerOptions",
                                  "MonitorOptions", "ChardevOptions", "SocketAddress", "JobStatus", "BlockdevDriver"}) {
        CHECK(find_type(name));
    }
    // Each value of a union's tag that has a case names one that exists.
    for (std::string_view name : {"BlockdevOptions", "BlockExportOptions", "ObjectOptions", "ChardevOptions"}) {
        const Type& u = type(name);
        for (const Member& member : u.members) {
            if (member.name != u.tag) continue;
            for (const Variant& variant : u.variants) CHECK(has_value(*member.type, variant.value));
            CHECK(u.variants.size() == member.type->values.size());
        }
    }
}

}  // namespace gantry::schema
