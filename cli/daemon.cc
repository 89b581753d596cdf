#include "cli/daemon.h"

#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <filesystem>

#include "block/jobs/job.h"
#include "block/last_requests.h"
#include "block/repeated_cancel.h"
#include "cli/qmp_client.h"
#include "cli/registry.h"
#include "exports/vduse/record.h"
#include "fuse/restart.h"
#include "qmp/command.h"
#include "qmp/nbd_options.h"
#include "runtime/io.h"
#include "runtime/log.h"
#include "runtime/signal.h"
#include "runtime/socket.h"
#include "schema/keyval.h"
#include "schema/schema.h"

namespace gantry::cli {

namespace {

/// How long exports of the process before this one wait for somebody who wants them.
constexpr auto kLegacyPatience = std::chrono::seconds(30);

}  // namespace

unsigned default_io_loops() {
    cpu_set_t cpus;
    int count = ::sched_getaffinity(0, sizeof cpus, &cpus) == 0 ? CPU_COUNT(&cpus) : 1;
    return static_cast<unsigned>(std::clamp(count, 1, 4));
}

Result<std::unique_ptr<Daemon>> Daemon::create(DaemonSettings settings) {
    qmp::check_handlers();
    check_registry();
    block_signals();
    TRY(auto runtime, Runtime::create(settings.runtime));
    std::unique_ptr<Daemon> daemon(new Daemon(std::move(settings), std::move(runtime)));
    auto signals = SignalWaiter::create();
    if (!signals) {
        daemon->shut_down();
        return std::unexpected(std::move(signals).error());
    }
    daemon->signals_ = std::make_unique<SignalWaiter>(std::move(*signals));
    daemon->runtime_->main_loop().run_until_complete(daemon->watch_signals());
    nbd::set_process_servers(&daemon->nbd_servers_);
    return daemon;
}

Daemon::Daemon(DaemonSettings settings, std::unique_ptr<Runtime> runtime)
    : runtime_(std::move(runtime)),
      export_deleted_(std::move(settings.export_deleted)),
      take_signal_(std::move(settings.take_signal)),
      notifier_(std::move(settings.notifier)),
      sockets_(std::move(settings.sockets)),
      fd_store_(notifier_, sockets_, settings.fd_store),
      keeper_(fd_store_),
      mapping_logs_(keeper_),
      events_(monitors_),
      graph_(*runtime_, drivers(), &events_),
      exports_(*runtime_, graph_, export_types(),
               [this](std::string_view id) {
                   events_.export_deleted(id);
                   if (export_deleted_) export_deleted_(id);
               }),
      nbd_servers_(*runtime_),
      objects_(*runtime_, exports_, graph_.secrets()),
      services_{*runtime_,
                graph_,
                exports_,
                nbd_servers_,
                objects_,
                monitors_,
                [this] { request_quit(); },
                [this](std::string_view name) { return resolve_fd(name); }},
      watchdog_(*runtime_, notifier_),
      hand_over_(settings.hand_over) {
    monitors_.set_services(&services_);
    exports_.set_keeper(&keeper_);
    exports_.set_resolve_fd([this](std::string_view name) -> Result<UniqueFd> {
        if (UniqueFd passed = monitors_.take_descriptor(name)) return passed;
        return resolve_fd(name);
    });
    fuse::announce_legacies(keeper_);
    if (keeper_.active()) {
        graph_.mapping_log_source = [this](const std::string& node_name) { return mapping_logs_.open(node_name); };
    }
    graph_.descriptor_source = [this](std::string_view name) { return find_descriptor(name); };
    // Who connects during the start-up finds everything that the command line asks for, or nobody.
    nbd_servers_.hold_clients();
    monitors_.hold_clients();
}

Daemon::~Daemon() {
    CHECK(ended_, "the daemon is shut down before it is destroyed");
    nbd::set_process_servers(nullptr);
}

Result<> Daemon::apply(const OptionUse& option) { return runtime_->main_loop().run_until_complete(apply_task(option)); }

Result<json::value> Daemon::execute(std::string command, json::object arguments) {
    return runtime_->main_loop().run_until_complete(qmp::execute(services_, std::move(command), std::move(arguments)));
}

Task<Result<>> Daemon::apply_task(OptionUse option) {
    using schema::parse_option;
    if (quit_.is_set()) co_return fail(ErrorKind::kCancelled, "ended by a signal");
    if (option.name == "object") {
        CO_TRY(json::object object, parse_option(schema::type("ObjectOptions"), option.value, "qom-type"));
        co_return co_await objects_.add(std::move(object));
    }
    if (option.name == "blockdev") {
        CO_TRY(json::object object, parse_option(schema::type("BlockdevOptions"), option.value, "driver"));
        if (!object.contains("node-name")) {
            co_return fail(ErrorKind::kInvalid, "'node-name' must be specified for the root node");
        }
        Result<block::Node*> node = co_await graph_.add(std::move(object));
        if (!node) co_return std::unexpected(std::move(node).error());
        co_return Result<>();
    }
    if (option.name == "chardev") {
        std::vector<std::string> warnings;
        CO_TRY(json::object object, schema::parse_chardev(option.value, warnings));
        for (const std::string& warning : warnings) log::warn("--chardev {}: {}", option.value, warning);
        co_return co_await monitors_.add_chardev(std::move(object));
    }
    if (option.name == "monitor") {
        CO_TRY(json::object object, parse_option(schema::type("MonitorOptions"), option.value, "chardev"));
        co_return monitors_.add_monitor(object);
    }
    if (option.name == "nbd-server") {
        CO_TRY(json::object object, parse_option(schema::type("NbdServerOptions"), option.value, ""));
        CO_TRY(nbd::ServerOptions options, qmp::nbd_server_options(services_, object));
        co_return co_await nbd_servers_.start(schema::Options(object).str("id"), std::move(options));
    }
    if (option.name == "export") {
        CO_TRY(json::object object, parse_option(schema::type("BlockExportOptions"), option.value, "type"));
        co_return co_await exports_.add(std::move(object));
    }
    if (option.name == "image-references") {
        allow_image_references(option.value);
        co_return Result<>();
    }
    if (option.name == "mapping-logs") {
        CO_CHECK(check_mapping_log_directory(option.value));
        graph_.mapping_log_source = [directory = option.value](const std::string& node_name) {
            return open_mapping_log(directory, node_name);
        };
        co_return Result<>();
    }
    CHECK(option.name == "control-socket", "every option is handled");
    co_return co_await add_control_socket(std::move(option.value));
}

void Daemon::allow_image_references(std::string_view value) {
    block::ImageReferencePolicy& policy = graph_.image_references();
    policy.allow_all = value == "all";
    if (policy.allow_all || value == "none") {
        policy.allowed_directories.clear();
    } else {
        policy.allowed_directories.emplace_back(value);
    }
}

Task<Result<>> Daemon::add_control_socket(std::string path) {
    if (path == "auto") {
        if (sockets_.has("qmp")) {
            CO_TRY(UniqueFd listener, sockets_.duplicate("qmp"));
            monitors_.add_listener(std::move(listener), {});
            co_return Result<>();
        }
        std::string directory = control_directory();
        std::error_code error;
        std::filesystem::create_directories(directory, error);
        struct stat st{};
        if (::stat(directory.c_str(), &st) != 0)
            co_return fail_errno(errno, "Control socket directory '{}'", directory);
        if (st.st_uid != ::geteuid()) {
            co_return fail(ErrorKind::kPermission,
                           "Control socket directory '{}' belongs to uid {}, not to us; set XDG_RUNTIME_DIR", directory,
                           st.st_uid);
        }
        path = fmt::format("{}/{}.qmp", directory, ::getpid());
    }
    CO_TRY(UniqueFd listener, listen_unix(path, 0600));
    monitors_.add_listener(std::move(listener), path);
    co_return Result<>();
}

Result<UniqueFd> Daemon::resolve_fd(std::string_view name) {
    int number = -1;
    auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
    bool numeric = error == std::errc() && end == name.data() + name.size();
    if (!numeric) return sockets_.duplicate(name);
    UniqueFd copy(::fcntl(number, F_DUPFD_CLOEXEC, 3));
    if (!copy) return fail_errno(errno, "File descriptor '{}'", name);
    return copy;
}

Result<UniqueFd> Daemon::find_descriptor(std::string_view name) {
    int number = -1;
    auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), number);
    if (error != std::errc() || end != name.data() + name.size()) {
        if (UniqueFd passed = monitors_.take_descriptor(name)) return passed;
        return fail(ErrorKind::kNotFound, "File descriptor named '{}' has not been found; getfd passes one", name);
    }
    UniqueFd copy(::fcntl(number, F_DUPFD_CLOEXEC, 3));
    if (!copy) return fail_errno(errno, "File descriptor '{}'", name);
    return copy;
}

void Daemon::request_quit() { quit_.set(); }

void Daemon::run() { runtime_->main_loop().run_until_complete(main_task()); }

void Daemon::shut_down() {
    if (!ended_) runtime_->main_loop().run_until_complete(end_task());
}

Task<void> Daemon::main_task() {
    nbd_servers_.let_clients_in();
    monitors_.let_clients_in();
    watchdog_.start();
    if (notifier_.active()) scope_.spawn(report_status());
    if (!keeper_.waiting().empty()) scope_.spawn(give_up_left());
    co_await quit_.wait();
    signals_->cancel();
    notifier_.stopping();
    co_await watchdog_.stop();
    co_await end_task();
}

Task<void> Daemon::watch_signals() {
    scope_.spawn(wait_for_signals());
    co_return;
}

Task<int> Daemon::next_signal() {
    int number = co_await signals_->next();
    while (number != 0 && take_signal_ && take_signal_(number, signals_->by_terminal())) {
        number = co_await signals_->next();
    }
    co_return number;
}

Task<void> Daemon::wait_for_signals() {
    int number = co_await next_signal();
    // With TLS credentials SIGHUP has their files read again; without, it ends the daemon as it ends the reference.
    while (number == SIGHUP && !objects_.tls().empty() && !quit_.is_set()) {
        const Result<> reloaded = co_await objects_.tls().reload({});
        if (reloaded) {
            log::info("signal {}: TLS credentials read again", number);
        } else {
            log::error("signal {}: {}", number, reloaded.error().message());
        }
        number = co_await next_signal();
    }
    if (number == 0) co_return;
    log::info("signal {}: ending", number);
    if (hand_over_ && number == SIGTERM && keeper_.active()) keeper_.set_leave(exports::Keeper::Leave::kEverything);
    quit_.set();
    graph_.cancel_opening("");
    monitors_.stop_waiting();
}

// STATUS= follows the exports, at most once a second.
Task<void> Daemon::report_status() {
    std::string last;
    while (!quit_.is_set()) {
        std::string text = fmt::format("{} exports, {} NBD clients, {} monitors", exports_.size(),
                                       nbd_servers_.connections(), monitors_.sessions());
        if (text != last) notifier_.status(text);
        last = std::move(text);
        (void)co_await status_pause_.after(std::chrono::seconds(1));
    }
}

// Exports may still come over QMP; nobody waits for ever.
Task<void> Daemon::give_up_left() {
    const bool expired = co_await left_pause_.after(kLegacyPatience);
    if (!expired || quit_.is_set()) co_return;
    vduse::give_up_records(keeper_);
    co_await fuse::give_up_legacies(keeper_);
}

// What closing nodes write at last has its own time.
void Daemon::cancel_requests() {
    graph_.cancel_opening("");
    for (block::Node* node : graph_.nodes()) {
        if (!block::LastRequests::concern(*node)) node->cancel_in_flight();
    }
}

// spec/qmp.md section 12.12.
Task<void> Daemon::end_task() {
    // A command that began before may still add an export, a job or the server itself: these go in two rounds.
    monitors_.hold_commands();
    block::RepeatedCancel cancel([this] { cancel_requests(); });
    co_await graph_.jobs().cancel_all();
    co_await nbd_servers_.say_good_bye();
    co_await exports_.remove_all();
    co_await monitors_.commands_done();
    co_await graph_.jobs().cancel_all();
    co_await exports_.remove_all();
    co_await nbd_servers_.stop_all();
    co_await cancel.over();
    left_pause_.cancel();
    if (keeper_.leave() == exports::Keeper::Leave::kNothing) {
        vduse::give_up_records(keeper_);
        co_await fuse::give_up_legacies(keeper_);
    }
    co_await graph_.close_all();
    mapping_logs_.drop_empty();
    co_await monitors_.stop();
    objects_.clear();
    quit_.set();
    if (signals_) signals_->cancel();
    status_pause_.cancel();
    co_await scope_.join();
    ended_ = true;
}

}  // namespace gantry::cli
