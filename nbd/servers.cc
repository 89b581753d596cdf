#include "nbd/servers.h"

#include "nbd/export.h"
#include "runtime/task_scope.h"
#include "schema/identifier.h"

namespace gantry::nbd {

namespace {

Servers* the_process_servers = nullptr;

std::unexpected<Error> not_running(std::string_view id) {
    if (id.empty()) return fail(ErrorKind::kInvalid, "NBD server not running");
    return fail(ErrorKind::kInvalid, "NBD server not running: there is none with id '{}'; query-nbd-servers lists them",
                id);
}

}  // namespace

Servers::Servers(Runtime& runtime) : runtime_(runtime), main_(std::make_unique<Server>(runtime)) {}

Servers::~Servers() = default;

Server* Servers::find(std::string_view id) {
    if (id.empty()) return main_.get();
    const auto it = named_.find(id);
    return it == named_.end() ? nullptr : it->second.get();
}

std::vector<Server*> Servers::running() const {
    std::vector<Server*> all;
    if (main_->running()) all.push_back(main_.get());
    for (const auto& [id, server] : named_) {
        if (server->running()) all.push_back(server.get());
    }
    return all;
}

size_t Servers::connections() const {
    size_t sum = main_->connections();
    for (const auto& [id, server] : named_) sum += server->connections();
    return sum;
}

void Servers::hold_clients() {
    held_ = true;
    main_->hold_clients();
    for (const auto& [id, server] : named_) server->hold_clients();
}

void Servers::let_clients_in() {
    held_ = false;
    main_->let_clients_in();
    for (const auto& [id, server] : named_) server->let_clients_in();
}

Task<Result<>> Servers::start(std::string id, ServerOptions options) {
    if (id.empty()) {
        Result<> started = co_await main_->start(std::move(options));
        co_return started;
    }
    if (!schema::is_identifier(id)) {
        co_return fail(
            ErrorKind::kInvalid,
            "Parameter 'id' expects an identifier; '{}' is not letters, digits, '-', '.', '_' after a letter", id);
    }
    if (named_.contains(id)) co_return fail(ErrorKind::kExists, "NBD server already running: '{}'", id);
    Server& server = *named_.emplace(id, std::make_unique<Server>(runtime_, id)).first->second;
    if (held_) server.hold_clients();
    Result<> started = co_await server.start(std::move(options));
    if (!started) named_.erase(id);
    co_return started;
}

Task<Result<>> Servers::stop(std::string id, exports::Registry& exports) {
    Server* server = find(id);
    if (!server || !server->running()) co_return not_running(id);
    co_await server->say_good_bye();
    // Nobody else stops it, now that it no longer runs; exports can no longer be added.
    co_await exports.remove_if([server](const exports::Export& e) {
        return e.type() == "nbd" && static_cast<const NbdExport&>(e).server() == server;
    });
    co_await server->stop();
    if (!id.empty()) named_.erase(id);
    co_return Result<>();
}

Task<void> Servers::say_good_bye() {
    TaskScope scope;
    for (Server* server : running()) scope.spawn(server->say_good_bye());
    co_await scope.join();
}

Task<void> Servers::stop_all() {
    co_await main_->stop();
    while (!named_.empty()) {
        const std::string id = named_.begin()->first;
        Server* server = named_.begin()->second.get();
        co_await server->stop();
        named_.erase(id);
    }
}

void set_process_servers(Servers* servers) { the_process_servers = servers; }
Servers* process_servers() { return the_process_servers; }

}  // namespace gantry::nbd
