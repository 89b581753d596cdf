// block-export-add/del, query-block-exports, nbd-server-start/stop.

#include "qmp/command.h"
#include "qmp/nbd_options.h"

namespace gantry::qmp {

nbd::ServerOptions nbd_server_options(const Services& services, const json::object& arguments) {
    schema::Options options(arguments);
    nbd::ServerOptions out;
    out.address = options.object("addr");
    out.max_connections = static_cast<uint32_t>(options.size("max-connections", out.max_connections));
    out.handshake_max = std::chrono::seconds(options.integer("handshake-max-seconds", out.handshake_max.count()));
    out.resolve_fd = services.resolve_fd;
    return out;
}

namespace {

Task<Result<json::value>> nbd_server_start(Services& services, json::object arguments) {
    nbd::ServerOptions options = nbd_server_options(services, arguments);
    co_return done(co_await services.nbd_server.start(std::move(options)));
}

Task<Result<json::value>> nbd_server_stop(Services& services, json::object) {
    if (!services.nbd_server.running()) co_return fail(ErrorKind::kInvalid, "NBD server not running");
    co_await services.exports.remove_all("nbd");
    co_await services.nbd_server.stop();
    co_return json::value(json::object());
}

Task<Result<json::value>> block_export_add(Services& services, json::object arguments) {
    co_return done(co_await services.exports.add(std::move(arguments)));
}

Task<Result<json::value>> block_export_del(Services& services, json::object arguments) {
    schema::Options options(arguments);
    auto mode = options.str("mode", "safe") == "hard" ? exports::RemoveMode::kHard : exports::RemoveMode::kSafe;
    co_return done(services.exports.remove(options.str("id"), mode));
}

Task<Result<json::value>> query_block_exports(Services& services, json::object) {
    json::array list;
    for (const exports::ExportInfo& info : services.exports.list()) {
        list.push_back({{"id", info.id},
                        {"type", info.type},
                        {"node-name", info.node_name},
                        {"shutting-down", info.shutting_down}});
    }
    co_return json::value(std::move(list));
}

constexpr HandlerRow kHandlers[] = {
    {"nbd-server-start", nbd_server_start},       {"nbd-server-stop", nbd_server_stop},
    {"block-export-add", block_export_add},       {"block-export-del", block_export_del},
    {"query-block-exports", query_block_exports},
};

}  // namespace

std::span<const HandlerRow> export_handlers() { return kHandlers; }

}  // namespace gantry::qmp
