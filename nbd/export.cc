#include "nbd/export.h"

#include <algorithm>
#include <bit>

#include "nbd/connection.h"
#include "nbd/servers.h"
#include "schema/options.h"

namespace gantry::nbd {

namespace {

constexpr uint32_t kPreferredBlock = 4096;
constexpr uint32_t kMaxMinimumBlock = 65536;

/// The beginning of a text that is too long to be quoted whole.
std::string_view beginning(std::string_view text) { return text.substr(0, 64); }

}  // namespace

const exports::ExportType kNbdExportType = {"nbd", &NbdExport::create};

uint32_t minimum_block(uint64_t size, uint32_t alignment) {
    uint32_t block = std::clamp<uint32_t>(std::bit_floor(std::max(alignment, 1u)), 1, kMaxMinimumBlock);
    while (block > 1 && size % block != 0) block /= 2;
    return block;
}

Result<std::unique_ptr<exports::Export>> NbdExport::create(exports::ExportContext context) {
    const schema::Options options(context.options);
    const std::string name = options.str("name", options.str("node-name"));
    const std::string description = options.str("description");
    if (name.size() > kMaxString) {
        return fail(ErrorKind::kInvalid, "export name '{}...' too long; at most {} bytes", beginning(name), kMaxString);
    }
    if (description.size() > kMaxString) {
        return fail(ErrorKind::kInvalid, "description '{}...' too long; at most {} bytes", beginning(description),
                    kMaxString);
    }
    if (name.find('\0') != std::string::npos || description.find('\0') != std::string::npos) {
        return fail(ErrorKind::kInvalid, "export name and description cannot contain NUL bytes");
    }
    return std::make_unique<NbdExport>(std::move(context));
}

NbdExport::NbdExport(exports::ExportContext context) : Export(std::move(context)) {
    const schema::Options options(context_.options);
    name_ = options.str("name", options.str("node-name"));
    description_ = options.str("description");
}

NbdExport::~NbdExport() { CHECK(connections_.empty(), "an NBD export is destroyed while clients use it"); }

Task<Result<>> NbdExport::start() {
    Servers* servers = process_servers();
    CHECK(servers, "the NBD servers are set before exports are made");
    const std::string id = schema::Options(context_.options).str("server");
    const auto missing = [&] {
        return fail(ErrorKind::kInvalid, "NBD server not running: there is none with id '{}'; start it first", id);
    };
    if (!servers->find(id)) co_return missing();
    CO_CHECK(co_await contexts_.acquire(root(), context_.options, writable(), root().user()));
    // It may have been stopped, and be gone, while the nodes of the bitmaps were waited for.
    Server* server = servers->find(id);
    Result<> added = missing();
    if (server) added = server->add_export(*this);
    if (!added) {
        co_await contexts_.release();
        co_return added;
    }
    server_ = server;
    co_return Result<>();
}

Task<void> NbdExport::stop() {
    if (server_) server_->remove_export(*this);
    for (Connection* connection : connections_) connection->cut();
    while (!connections_.empty()) co_await left_.wait();
    co_await contexts_.release();
}

ExportFacts NbdExport::facts(bool multi_conn) const {
    const block::Node& node = root().node();
    const block::Limits& limits = node.limits();
    ExportFacts facts;
    facts.name = name_;
    facts.description = description_;
    facts.size = node.size();
    facts.flags = kHasFlags | kSendFlush | kSendFua | kSendCache;
    if (writable()) {
        facts.flags |= kSendTrim | kSendWriteZeroes | kSendFastZero;
    } else {
        facts.flags |= kReadOnly;
    }
    // One node behind all connections, no cache of their own: what one connection flushed all have.
    if (multi_conn) facts.flags |= kCanMultiConn;
    facts.minimum_block = minimum_block(facts.size, limits.request_alignment);
    facts.contexts = contexts_.list();
    facts.preferred_block = std::max(kPreferredBlock, facts.minimum_block);
    // The block layer splits: larger requests than advertised are served all the same, up to kMaxPayload.
    const uint64_t transfer = limits.max_transfer == 0 ? kMaxPayload : limits.max_transfer;
    facts.maximum_payload =
        static_cast<uint32_t>(std::clamp<uint64_t>(transfer & ~uint64_t{65535}, 1u << 20, kMaxPayload));
    return facts;
}

Loop& NbdExport::attach(Connection& connection) {
    connections_.push_back(&connection);
    return *context_.loops[next_loop_++ % context_.loops.size()];
}

void NbdExport::detach(Connection& connection) {
    std::erase(connections_, &connection);
    left_.notify_all();
}

json::object NbdExport::details() const {
    json::array clients;
    for (const Connection* connection : connections_) clients.push_back(connection->details());
    json::object details{{"name", name_}, {"writable", writable()}, {"clients", std::move(clients)}};
    if (server_ && !server_->id().empty()) details["server"] = server_->id();
    return details;
}

}  // namespace gantry::nbd
