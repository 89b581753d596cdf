// Command handlers: what is behind a name in the schema.

#pragma once

#include <span>
#include <string_view>

#include "qmp/services.h"
#include "runtime/error.h"
#include "runtime/task.h"
#include "schema/options.h"
#include "schema/value.h"

namespace gantry::qmp {

/// `arguments` has passed the schema. The value becomes "return"; an empty object for commands without result. Main
/// loop.
using Handler = Task<Result<json::value>> (*)(Services& services, json::object arguments);

struct HandlerRow {
    std::string_view name;
    Handler handler;
};

/// One table per command file.
std::span<const HandlerRow> misc_handlers();
std::span<const HandlerRow> block_handlers();
std::span<const HandlerRow> bitmap_handlers();
std::span<const HandlerRow> create_handlers();
std::span<const HandlerRow> image_handlers();
std::span<const HandlerRow> export_handlers();
std::span<const HandlerRow> job_handlers();
std::span<const HandlerRow> object_handlers();
std::span<const HandlerRow> fd_handlers();

/// Null when no table has it.
Handler find_handler(std::string_view name);
/// Aborts unless every command of the schema has exactly one handler and the reverse (qmp_capabilities belongs to
/// sessions).
void check_handlers();

/// Looks up, validates and runs a command: the one path of monitors, tests and the command line. Errors carry the QMP
/// class.
Task<Result<json::value>> execute(Services& services, std::string name, json::object arguments);

/// The answer of query-version and the greeting.
json::object version_info();

/// Shorthand of handlers: an empty object on success.
inline Result<json::value> done(Result<> result) {
    if (!result) return std::unexpected(std::move(result).error());
    return json::value(json::object());
}

}  // namespace gantry::qmp
