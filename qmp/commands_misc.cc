// query-version, query-commands, query-qmp-schema, query-events, query-status, quit.

#include "qmp/command.h"
#include "schema/introspect.h"

namespace gantry::qmp {

namespace {

Task<Result<json::value>> query_version(Services&, json::object) { co_return json::value(version_info()); }

Task<Result<json::value>> query_commands(Services&, json::object) { co_return json::value(schema::command_list()); }

Task<Result<json::value>> query_qmp_schema(Services&, json::object) { co_return json::value(schema::introspect()); }

Task<Result<json::value>> query_events(Services&, json::object) { co_return json::value(schema::event_list()); }

// Health checks of management tools ask it; there is no machine that could be stopped.
Task<Result<json::value>> query_status(Services&, json::object) {
    co_return json::value(json::object{{"running", true}, {"singlestep", false}, {"status", "running"}});
}

Task<Result<json::value>> quit(Services& services, json::object) {
    services.request_quit();
    co_return json::value(json::object());
}

constexpr HandlerRow kHandlers[] = {
    {"query-version", query_version}, {"query-commands", query_commands}, {"query-qmp-schema", query_qmp_schema},
    {"query-events", query_events},   {"query-status", query_status},     {"quit", quit},
};

}  // namespace

std::span<const HandlerRow> misc_handlers() { return kHandlers; }

}  // namespace gantry::qmp
