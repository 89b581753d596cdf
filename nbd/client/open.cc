// Opening a node of driver "nbd": options, the first connection, further ones.

#include <algorithm>

#include "block/graph.h"
#include "nbd/client/node.h"
#include "nbd/protocol.h"
#include "runtime/cross_loop.h"
#include "runtime/log.h"

namespace gantry::nbd::client {

namespace {

using block::Node;
using block::OpenContext;

/// Without the option: one connection for each I/O loop, as far as this.
constexpr size_t kDefaultConnections = 4;

Result<std::shared_ptr<const ClientConfig>> parse_config(const OpenContext& context) {
    const schema::Options options = context.options();
    auto config = std::make_shared<ClientConfig>();
    config->node_name = context.node_name();
    TRY(config->address, ServerAddress::parse(options.object("server"), context.graph().descriptor_source));
    config->export_name = options.str("export");
    if (config->export_name.size() > kMaxString) {
        return fail(ErrorKind::kInvalid, "export name too long to send to server: {} bytes, at most {}",
                    config->export_name.size(), kMaxString);
    }
    if (options.has("x-dirty-bitmap")) {
        config->context = options.str("x-dirty-bitmap");
        config->context_required = true;
        if (config->context.empty() || config->context.size() > kMaxString) {
            return fail(ErrorKind::kInvalid, "x-dirty-bitmap '{}' is not the name of a meta context: 1 to {} bytes",
                        printable(config->context), kMaxString);
        }
    }
    if (options.has("tls-creds")) {
        TRY(config->tls, find_tls_object(options.str("tls-creds"), TlsEndpoint::kClient));
    }
    config->tls_hostname = options.str("tls-hostname");
    if (!config->tls_hostname.empty() && !config->tls) {
        return fail(ErrorKind::kInvalid, "tls-hostname needs tls-creds: without TLS there is no name to verify");
    }
    config->reconnect_delay = std::chrono::seconds(options.integer("reconnect-delay"));
    config->open_timeout = std::chrono::seconds(options.integer("open-timeout"));
    return config;
}

Task<void> close_link(std::shared_ptr<Link> link) {
    Loop& loop = link->loop();
    co_await run_on(loop, link->close());
}

Task<void> start_link(std::shared_ptr<Link> link, Negotiated expected, bool writable) {
    link->start(expected, writable);
    co_return;
}

Task<Result<std::shared_ptr<Node>>> open_nbd(OpenContext& context) {
    const schema::Options options = context.options();
    const block::NodeFlags flags = context.flags();
    const int64_t asked = options.integer("multi-conn", -1);
    if (asked > kMaxConnections) {
        co_return fail(ErrorKind::kInvalid, "multi-conn is {}; at most {} connections go to one server", asked,
                       kMaxConnections);
    }
    CO_TRY(const std::shared_ptr<const ClientConfig> config, parse_config(context));

    Runtime& runtime = context.graph().runtime();
    const auto loops = runtime.io_loops();
    // Nodes begin with different loops.
    const size_t begin = std::hash<std::string>()(context.node_name()) % loops.size();
    const auto group = std::make_shared<LinkGroup>();
    std::vector<std::shared_ptr<Link>> links{std::make_shared<Link>(*loops[begin], config, group)};
    const std::shared_ptr<Link> first = links[0];
    context.on_cancel([first] { first->loop().post([first] { first->cancel_open(); }); });
    Result<Negotiated> opened = co_await run_on(first->loop(), first->open());
    context.on_cancel({});
    if (!opened) {
        co_await close_link(first);
        co_return std::unexpected(std::move(opened).error());
    }
    const bool refuses_writes = opened->can(kReadOnly);
    if (refuses_writes && !flags.read_only && !flags.auto_read_only) {
        co_await close_link(first);
        co_return fail(ErrorKind::kReadOnly,
                       "NBD export '{}' of '{}' is read-only; open the node with read-only=on or auto-read-only=on",
                       config->export_name, config->address.text());
    }
    const bool writable = !refuses_writes && !flags.read_only;

    size_t wanted =
        asked < 0 ? std::min(loops.size(), kDefaultConnections) : static_cast<size_t>(std::max<int64_t>(asked, 1));
    if (!opened->can(kCanMultiConn) || !config->address.can_connect_again()) wanted = 1;
    while (links.size() < wanted) {
        links.push_back(std::make_shared<Link>(*loops[(begin + links.size()) % loops.size()], config, group));
    }
    // One connection can come back to a server that does not allow several.
    Negotiated expected = *opened;
    if (wanted == 1) expected.flags &= static_cast<uint16_t>(~kCanMultiConn);
    // The others connect meanwhile: a server may let them wait, or turn them away.
    for (const auto& link : links) co_await run_on(link->loop(), start_link(link, expected, writable));
    log::info("node '{}': connected to NBD server '{}', export '{}', {} bytes, up to {} connections{}{}",
              context.node_name(), config->address.text(), config->export_name, opened->size, links.size(),
              config->tls ? ", TLS" : "",
              opened->extended     ? ", extended headers"
              : opened->structured ? ", structured replies"
                                   : "");
    co_return std::make_shared<NbdNode>(context.node_name(), flags, config, *opened, std::move(links));
}

}  // namespace

}  // namespace gantry::nbd::client

namespace gantry::nbd {

constinit const block::Driver kNbdDriver{.name = "nbd", .open = client::open_nbd, .is_protocol = true};

}  // namespace gantry::nbd
