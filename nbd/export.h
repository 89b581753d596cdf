// NbdExport: a node under a name on the NBD server.

#pragma once

#include <list>
#include <memory>
#include <string>

#include "exports/export.h"
#include "nbd/export_contexts.h"
#include "nbd/handshake/handshake.h"
#include "runtime/sync.h"

namespace gantry::nbd {

class Connection;
class Server;

/// Main loop only. Belongs to one of process_servers(), which its option 'server' names.
class NbdExport final : public exports::Export {
  public:
    static Result<std::unique_ptr<exports::Export>> create(exports::ExportContext context);
    explicit NbdExport(exports::ExportContext context);
    ~NbdExport() override;

    std::string_view type() const override { return "nbd"; }
    Task<Result<>> start() override;
    bool has_clients() const override { return !connections_.empty(); }
    Task<void> stop() override;
    json::object details() const override;

    const std::string& name() const { return name_; }
    Server* server() const { return server_; }
    const std::string& description() const { return description_; }
    /// What the handshake tells; `multi_conn` when the server lets several connections in.
    ExportFacts facts(bool multi_conn) const;

    /// A connection enters (its loop is chosen) and leaves transmission.
    Loop& attach(Connection& connection);
    void detach(Connection& connection);

  private:
    std::string name_;
    std::string description_;
    Server* server_ = nullptr;  // once started; it waits for the export to be gone before it goes
    std::list<Connection*> connections_;
    size_t next_loop_ = 0;
    ExportContexts contexts_;
    WaitQueue left_;
};

/// The smallest block for a disk of `size` bytes on a node aligned to `alignment`: it divides the size, so that no tail
/// is hidden.
uint32_t minimum_block(uint64_t size, uint32_t alignment);

}  // namespace gantry::nbd
