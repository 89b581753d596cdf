#include "schema/schema.h"

#include <algorithm>
#include <map>
#include <vector>

#include "runtime/check.h"
#include "schema/tables.h"

namespace gantry::schema {

namespace {

constexpr const Module* kModules[] = {
    &kCommonModule,      &kSocketsModule,     &kBlockCoreModule,  &kBlockInfoModule,   &kBlockBitmapModule,
    &kBlockExportModule, &kBlockCreateModule, &kBlockImageModule, &kJobModule,         &kQomModule,
    &kCryptoModule,      &kControlModule,     &kMiscModule,       &kDescriptorsModule,
};

/// The modules by name, put together on first use and constant from then on.
struct Index {
    std::vector<const Command*> commands;
    std::vector<const Event*> events;
    std::map<std::string_view, const Command*> command_by_name;
    std::map<std::string_view, const Event*> event_by_name;
    std::map<std::string_view, const Type*> type_by_name;

    Index() {
        for (const Module* module : kModules) {
            for (const Command& command : module->commands) {
                CHECK(command_by_name.emplace(command.name, &command).second, "command names are unique");
                commands.push_back(&command);
            }
            for (const Event& event : module->events) {
                CHECK(event_by_name.emplace(event.name, &event).second, "event names are unique");
                events.push_back(&event);
            }
            for (const Type* type : module->types) {
                CHECK(type_by_name.emplace(type->name, type).second, "type names are unique");
            }
        }
    }
};

const Index& index() {
    static const Index built;
    return built;
}

template <class Map>
auto find(const Map& map, std::string_view name) -> typename Map::mapped_type {
    const auto it = map.find(name);
    return it == map.end() ? nullptr : it->second;
}

}  // namespace

const Command* find_command(std::string_view name) { return find(index().command_by_name, name); }
std::span<const Command* const> commands() { return index().commands; }

const Event* find_event(std::string_view name) { return find(index().event_by_name, name); }
std::span<const Event* const> events() { return index().events; }

const Type* find_type(std::string_view name) { return find(index().type_by_name, name); }
const Type& type(std::string_view name) {
    const Type* found = find_type(name);
    CHECK(found, "code names types that the tables have");
    return *found;
}

bool has_value(const Type& enum_type, std::string_view value) {
    return std::ranges::find(enum_type.values, value, &EnumValue::name) != enum_type.values.end();
}

}  // namespace gantry::schema
