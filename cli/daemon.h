// Daemon: the parts of gantryd put together, and its life from the first option to the last event.

#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "cli/mapping_logs.h"
#include "cli/options.h"
#include "cli/store_keeper.h"
#include "qmp/events.h"
#include "qmp/monitor.h"
#include "qmp/objects.h"
#include "qmp/services.h"
#include "runtime/runtime.h"
#include "runtime/signal.h"
#include "runtime/timer.h"
#include "systemd/activation.h"
#include "systemd/fd_store.h"
#include "systemd/notify.h"
#include "systemd/watchdog.h"

namespace gantry::cli {

struct DaemonSettings {
    RuntimeOptions runtime;
    systemd::Notifier notifier;
    systemd::ActivationSockets sockets;
    /// Told of every export that is gone. Main loop.
    std::function<void(std::string_view id)> export_deleted;
    /// Asked about each signal (SIGTERM, SIGINT, SIGHUP; `by_terminal`: the whole foreground job has got it): true
    /// keeps it from ending the daemon. Main loop.
    std::function<bool(int number, bool by_terminal)> take_signal;
    systemd::FdStore::Use fd_store = systemd::FdStore::Use::kAuto;
    bool hand_over = false;  // SIGTERM leaves mounts to the next process
};

/// One per CPU this process may use, at most 4.
unsigned default_io_loops();

/// Main thread only. create(), then options in order, then run() until quit, SIGTERM, SIGINT, or SIGHUP when there are
/// no TLS credentials to be read again.
class Daemon {
  public:
    static Result<std::unique_ptr<Daemon>> create(DaemonSettings settings);
    ~Daemon();

    /// One of --object, --blockdev, --chardev, --monitor, --nbd-server, --export, --image-references, --mapping-logs,
    /// --control-socket, by name.
    Result<> apply(const OptionUse& option);
    /// Runs a QMP command on the daemon itself.
    Result<json::value> execute(std::string command, json::object arguments);
    /// Serves until the end is requested, then ends in order: listeners, jobs, exports, nodes, monitors.
    void run();
    /// The same end without serving first (start-up failed).
    void shut_down();
    /// The start-up has failed: what the process before this one has left stays for the next attempt.
    void leave_inherited() { keeper_.set_leave(exports::Keeper::Leave::kInherited); }
    void request_quit();
    /// The end is requested: by quit, or by a signal, which counts from create() on.
    bool quitting() const { return quit_.is_set(); }

    qmp::Services& services() { return services_; }
    systemd::Notifier& notifier() { return notifier_; }
    Runtime& runtime() { return *runtime_; }

  private:
    Daemon(DaemonSettings settings, std::unique_ptr<Runtime> runtime);

    Task<Result<>> apply_task(OptionUse option);
    Task<Result<>> add_control_socket(std::string path);
    void allow_image_references(std::string_view value);
    Result<UniqueFd> resolve_fd(std::string_view name);
    /// For nodes: a descriptor that a monitor has passed, or that this process got from whoever started it.
    Result<UniqueFd> find_descriptor(std::string_view name);
    Task<void> main_task();
    Task<void> watch_signals();
    Task<int> next_signal();
    Task<void> wait_for_signals();
    Task<void> report_status();
    Task<void> give_up_left();
    Task<void> end_task();
    void cancel_requests();

    std::unique_ptr<Runtime> runtime_;
    std::function<void(std::string_view)> export_deleted_;
    std::function<bool(int, bool)> take_signal_;
    systemd::Notifier notifier_;
    systemd::ActivationSockets sockets_;
    systemd::FdStore fd_store_;
    StoreKeeper keeper_;
    KeptMappingLogs mapping_logs_;
    qmp::Monitors monitors_;
    qmp::Events events_;
    block::Graph graph_;
    exports::Registry exports_;
    nbd::Servers nbd_servers_;
    qmp::Objects objects_;
    qmp::Services services_;
    systemd::Watchdog watchdog_;
    TaskScope scope_;
    std::unique_ptr<SignalWaiter> signals_;
    Timer status_pause_, left_pause_;
    const bool hand_over_;
    AsyncEvent quit_;
    bool ended_ = false;
};

}  // namespace gantry::cli
