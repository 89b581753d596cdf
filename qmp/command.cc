#include "qmp/command.h"

#include <array>

#include "runtime/check.h"
#include "schema/schema.h"
#include "schema/unserved.h"
#include "schema/validate.h"

namespace gantry::qmp {

namespace {

// The version whose interface we follow; clients decide by it what they may send.
constexpr int kQemuMajor = 7;
constexpr int kQemuMinor = 2;
constexpr int kQemuMicro = 22;

std::array<std::span<const HandlerRow>, 9> tables() {
    return {misc_handlers(),   block_handlers(), bitmap_handlers(), create_handlers(), image_handlers(),
            export_handlers(), job_handlers(),   object_handlers(), fd_handlers()};
}

}  // namespace

Handler find_handler(std::string_view name) {
    for (const auto& table : tables()) {
        for (const HandlerRow& row : table) {
            if (row.name == name) return row.handler;
        }
    }
    return nullptr;
}

void check_handlers() {
    for (const schema::Command* command : schema::commands()) {
        CHECK(command->name == "qmp_capabilities" || find_handler(command->name),
              "every command of the schema has a handler");
    }
    for (const auto& table : tables()) {
        for (const HandlerRow& row : table)
            CHECK(schema::find_command(row.name), "every handler is declared in the schema");
    }
}

Task<Result<json::value>> execute(Services& services, std::string name, json::object arguments) {
    const schema::Command* command = schema::find_command(name);
    Handler handler = command ? find_handler(name) : nullptr;
    if (!handler) {
        std::string text = fmt::format("The command {} has not been found", name);
        if (auto reason = schema::unserved_command(name)) text += fmt::format("; {}", *reason);
        co_return std::unexpected(Error(ErrorKind::kNotFound, std::move(text)).with_class(QmpClass::kCommandNotFound));
    }
    CO_TRY(json::object valid, schema::validate_arguments(*command, std::move(arguments)));
    co_return co_await handler(services, std::move(valid));
}

json::object version_info() {
    return {{"qemu", {{"micro", kQemuMicro}, {"minor", kQemuMinor}, {"major", kQemuMajor}}},
            {"package", "gantry " GANTRY_VERSION}};
}

}  // namespace gantry::qmp
