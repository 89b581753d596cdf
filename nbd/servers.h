// The NBD servers of the process: the one without a name, and those that were started under one.

#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "nbd/server.h"

namespace gantry::nbd {

/// Main loop only.
class Servers {
  public:
    explicit Servers(Runtime& runtime);
    ~Servers();  // all are stopped

    /// The server that exports belong to which name none. It need not run.
    Server& main() { return *main_; }
    /// Null: no server of that name was started. "" is main().
    Server* find(std::string_view id);
    /// Those that run, main() first.
    std::vector<Server*> running() const;
    size_t connections() const;

    /// For the start-up: clients of every server wait until let_clients_in().
    void hold_clients();
    void let_clients_in();

    /// nbd-server-start. "NBD server already running"; kInvalid for a name that is no identifier.
    Task<Result<>> start(std::string id, ServerOptions options);
    /// nbd-server-stop: the server takes leave of its clients, its exports are removed, it ends. "NBD server not
    /// running".
    Task<Result<>> stop(std::string id, exports::Registry& exports);
    /// Every server takes leave of its clients; their exports are still there.
    Task<void> say_good_bye();
    /// Ends every server that is left; the exports are gone.
    Task<void> stop_all();

  private:
    Runtime& runtime_;
    std::unique_ptr<Server> main_;
    std::map<std::string, std::unique_ptr<Server>, std::less<>> named_;
    bool held_ = false;
};

/// The servers that exports of type "nbd" belong to. Set once at start-up, before any export is made.
void set_process_servers(Servers* servers);
Servers* process_servers();

}  // namespace gantry::nbd
