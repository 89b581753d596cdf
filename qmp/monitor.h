// Monitors and the character devices they sit on.

#pragma once

#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "qmp/services.h"
#include "runtime/io.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"

namespace gantry::qmp {

class Session;

/// Every chardev and monitor of the process. A server socket serves any number of clients at once, each with its own
/// session. Main loop only.
class Monitors {
  public:
    Monitors();
    ~Monitors();
    /// Before the first use of the others.
    void set_services(Services* services) { services_ = services; }

    /// --chardev, validated ChardevOptions. A server socket listens when it returns; with wait=on it has its first
    /// client.
    Task<Result<>> add_chardev(json::object options);
    /// --monitor, validated MonitorOptions.
    Result<> add_monitor(const json::object& options);
    /// A control socket without options: `listener` is bound and listening; `path` is unlinked at the end unless empty.
    void add_listener(UniqueFd listener, std::string path);

    /// Clients that connect wait, ungreeted, until let_clients_in(): for the start-up.
    void hold_clients() { clients_held_ = true; }
    void let_clients_in();

    /// Queues an event on every session that has finished negotiation.
    void broadcast(const json::object& event);
    size_t sessions() const { return sessions_.size(); }
    /// What the first client that has it passed under a name, given away; invalid: nobody has. For parts of the daemon
    /// that do not know which client's command they carry out.
    UniqueFd take_descriptor(std::string_view name);
    /// No further command begins, on any session; events still go out.
    void hold_commands();
    /// After hold_commands(): waits for the commands that run.
    Task<void> commands_done();
    /// add_chardev() stops to wait for a first client, and fails.
    void stop_waiting();
    /// Closes listeners (unlinking the sockets it made), lets sessions write what is queued, ends them.
    Task<void> stop();

  private:
    friend class Session;
    struct Chardev;
    /// A session has finished a command while they are held.
    void command_done() { command_done_.notify_all(); }
    Task<Result<>> open_socket(Chardev& chardev, const json::object& options);
    void start_monitor(Chardev& chardev, bool pretty);
    Task<void> accept_loop(Chardev* chardev, int listener, bool pretty);
    Task<void> serve(UniqueFd in, UniqueFd out, bool pretty);

    Services* services_ = nullptr;
    std::map<std::string, std::unique_ptr<Chardev>, std::less<>> chardevs_;
    std::vector<Session*> sessions_;
    TaskScope scope_;
    bool waits_no_more_ = false;
    CancellableIo* first_client_ = nullptr;  // while add_chardev() waits for one
    WaitQueue command_done_;
    WaitQueue clients_let_in_;
    bool clients_held_ = false;
    bool held_ = false;
    bool stopping_ = false;
};

}  // namespace gantry::qmp
