// block-export-add/del, query-block-exports, nbd-server-start/stop/add/remove, query-nbd-servers.

#include "qmp/command.h"
#include "qmp/nbd_options.h"

namespace gantry::qmp {

Result<nbd::ServerOptions> nbd_server_options(const Services& services, const json::object& arguments) {
    schema::Options options(arguments);
    nbd::ServerOptions out;
    const json::value& addr = *options.find("addr");
    json::array addresses = addr.is_array() ? addr.get_array() : json::array{addr};
    if (addresses.empty()) return fail(ErrorKind::kInvalid, "Parameter 'addr' expects at least one address");
    out.address = addresses.front().get_object();
    addresses.erase(addresses.begin());
    out.more_addresses = std::move(addresses);
    out.max_connections = static_cast<uint32_t>(options.size("max-connections", out.max_connections));
    out.handshake_max = std::chrono::seconds(options.integer("handshake-max-seconds", out.handshake_max.count()));
    out.resolve_fd = services.resolve_fd;
    TRY(out.tls, nbd::tls_policy(arguments));
    return out;
}

namespace {

Task<Result<json::value>> nbd_server_start(Services& services, json::object arguments) {
    CO_TRY(nbd::ServerOptions options, nbd_server_options(services, arguments));
    const std::string id = schema::Options(arguments).str("id");
    co_return done(co_await services.nbd_servers.start(id, std::move(options)));
}

Task<Result<json::value>> nbd_server_stop(Services& services, json::object arguments) {
    const std::string id = schema::Options(arguments).str("id");
    co_return done(co_await services.nbd_servers.stop(id, services.exports));
}

// The old way to export: the name is the id, and a node that cannot be written is exported for reading.
Task<Result<json::value>> nbd_server_add(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    const std::string device = options.str("device");
    const std::string name = options.str("name", device);
    const block::Node* node = services.graph.find(device);
    if (!node) {
        co_return fail(ErrorKind::kNotFound, "Cannot find device='{}' nor node-name='{}'", device, device);
    }
    const bool writable = options.flag("writable") && (!node->read_only() || node->flags().auto_read_only);
    json::object e{{"type", "nbd"}, {"id", name}, {"node-name", device}, {"writable", writable}, {"name", name}};
    if (options.has("description")) e["description"] = options.str("description");
    if (options.has("bitmap")) e["bitmaps"] = json::array{options.str("bitmap")};
    co_return done(co_await services.exports.add(std::move(e)));
}

Task<Result<json::value>> nbd_server_remove(Services& services, json::object arguments) {
    const schema::Options options(arguments);
    const std::string id = options.str("name");
    const exports::Export* found = services.exports.find(id);
    if (found && found->type() != "nbd") {
        co_return fail(ErrorKind::kInvalid, "Block export '{}' is not an NBD export", id);
    }
    const auto mode = options.str("mode", "safe") == "hard" ? exports::RemoveMode::kHard : exports::RemoveMode::kSafe;
    co_return done(co_await services.exports.remove(id, mode));
}

Task<Result<json::value>> query_nbd_servers(Services& services, json::object) {
    json::array list;
    for (const nbd::Server* server : services.nbd_servers.running()) list.push_back(server->details());
    co_return json::value(std::move(list));
}

Task<Result<json::value>> block_export_add(Services& services, json::object arguments) {
    co_return done(co_await services.exports.add(std::move(arguments)));
}

Task<Result<json::value>> block_export_del(Services& services, json::object arguments) {
    schema::Options options(arguments);
    auto mode = options.str("mode", "safe") == "hard" ? exports::RemoveMode::kHard : exports::RemoveMode::kSafe;
    co_return done(co_await services.exports.remove(options.str("id"), mode));
}

Task<Result<json::value>> query_block_exports(Services& services, json::object) {
    json::array list;
    for (const exports::ExportInfo& info : services.exports.list()) {
        json::object one{
            {"id", info.id}, {"type", info.type}, {"node-name", info.node_name}, {"shutting-down", info.shutting_down}};
        const exports::Export* found =
            info.type == "fuse" && !info.shutting_down ? services.exports.find(info.id) : nullptr;
        const json::object details = found ? found->details() : json::object();
        const json::value* passthrough = details.if_contains("passthrough");
        for (const char* key : {"transport", "transport-reason"}) {
            if (const json::value* value = details.if_contains(key)) one[key] = *value;
        }
        if (passthrough && passthrough->as_bool()) {
            one["transport"] = "passthrough";
            one["transport-reason"] = "x-passthrough=on; what else there is to ask comes by /dev/fuse";
        }
        list.push_back(std::move(one));
    }
    co_return json::value(std::move(list));
}

/// What the exports of one kind say of themselves.
json::value details_of(Services& services, std::string_view type) {
    json::array list;
    for (const exports::ExportInfo& info : services.exports.list()) {
        const exports::Export* found = services.exports.find(info.id);
        if (info.type != type || info.shutting_down || !found) continue;
        json::object one{{"id", info.id}};
        for (const auto& [key, value] : found->details()) one[key] = value;
        list.push_back(std::move(one));
    }
    return list;
}

Task<Result<json::value>> query_fuse_exports(Services& services, json::object) {
    co_return details_of(services, "fuse");
}

Task<Result<json::value>> query_vhost_user_exports(Services& services, json::object) {
    co_return details_of(services, "vhost-user-blk");
}

Task<Result<json::value>> query_vduse_exports(Services& services, json::object) {
    co_return details_of(services, "vduse-blk");
}

constexpr HandlerRow kHandlers[] = {
    {"nbd-server-start", nbd_server_start},       {"nbd-server-stop", nbd_server_stop},
    {"block-export-add", block_export_add},       {"block-export-del", block_export_del},
    {"query-block-exports", query_block_exports}, {"nbd-server-add", nbd_server_add},
    {"nbd-server-remove", nbd_server_remove},     {"query-nbd-servers", query_nbd_servers},
    {"query-fuse-exports", query_fuse_exports},   {"query-vhost-user-exports", query_vhost_user_exports},
    {"query-vduse-exports", query_vduse_exports},
};

}  // namespace

std::span<const HandlerRow> export_handlers() { return kHandlers; }

}  // namespace gantry::qmp
