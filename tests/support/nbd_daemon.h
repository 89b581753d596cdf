// NbdDaemon: graph, exports and NBD server on threads of their own, driven by blocking calls from a test.

#pragma once

#include <future>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "exports/export.h"
#include "nbd/servers.h"
#include "runtime/log.h"
#include "runtime/task_scope.h"
#include "tests/support/export_disk.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

namespace gantry::test {

/// One at a time (process_servers()). Calls come from the test's thread.
class NbdDaemon {
    template <class T>
    struct Value;
    template <class T>
    struct Value<Task<T>> {
        using type = T;
    };

  public:
    explicit NbdDaemon(RuntimeOptions options = runtime_options_from_env()) {
        log::set_level(log::Level::kError);
        std::promise<void> up;
        thread_ = std::thread([this, options, &up] { main(options, &up); });
        up.get_future().get();
    }
    ~NbdDaemon() {
        call([this] { return shut_down(); });
        runtime_->main_loop().stop();
        thread_.join();
    }

    /// Runs the task that `make` returns on the main loop; its value.
    template <class F>
    auto call(F make) -> typename Value<decltype(make())>::type {
        using T = typename Value<decltype(make())>::type;
        std::promise<T> result;
        runtime_->main_loop().post([this, &make, &result] { scope_->spawn(fulfil<T>(make(), &result)); });
        return result.get_future().get();
    }
    /// Runs a plain function on the main loop.
    template <class F>
    auto on_main(F f) {
        using T = decltype(f());
        std::promise<T> result;
        runtime_->main_loop().post([&] {
            if constexpr (std::is_void_v<T>) {
                f();
                result.set_value();
            } else {
                result.set_value(f());
            }
        });
        return result.get_future().get();
    }

    /// "" or the error's text.
    std::string start_server(nbd::ServerOptions options) {
        return text(call([&] { return servers_->main().start(options); }));
    }
    std::string start_server(uint32_t max_connections = 100,
                             std::chrono::seconds handshake = std::chrono::seconds(10)) {
        nbd::ServerOptions options;
        options.address = {{"type", "unix"}, {"path", socket_path()}};
        options.max_connections = max_connections;
        options.handshake_max = handshake;
        return start_server(options);
    }
    void stop_server() {
        call([this] { return servers_->main().stop(); });
    }
    std::string add_disk(json::object options) {
        options["driver"] = "memory";
        auto added = call([&] { return graph_->add(options); });
        return added ? "" : added.error().message();
    }
    std::string add_export(json::object options) {
        if (!options.contains("type")) options["type"] = "nbd";
        return text(call([&] { return registry_->add(options); }));
    }
    std::string remove_export(std::string_view id, exports::RemoveMode mode = exports::RemoveMode::kSafe) {
        return text(call([&] { return registry_->remove(std::string(id), mode); }));
    }
    /// An export of a fresh disk: node "disk", id and name "disk".
    void serve_disk(json::object node = {}, bool writable = true) {
        node["node-name"] = "disk";
        const std::string errors = start_server() + add_disk(node) +
                                   add_export({{"id", "disk"}, {"node-name", "disk"}, {"writable", writable}});
        if (!errors.empty()) throw std::runtime_error(errors);
    }
    ExportDisk& disk(std::string_view name = "disk") {
        return *on_main([&] { return static_cast<ExportDisk*>(graph_->find(name)); });
    }
    /// Waits until `condition`, asked on the main loop, holds; false after 10 s.
    bool eventually(std::function<bool()> condition) {
        return call([condition] { return wait_until(condition); });
    }
    std::vector<std::string> deleted() {
        const std::lock_guard lock(m_);
        return deleted_;
    }
    std::string socket_path() const { return dir_.file("nbd.sock"); }

    Runtime& runtime() { return *runtime_; }
    block::Graph& graph() { return *graph_; }
    exports::Registry& registry() { return *registry_; }
    nbd::Servers& servers() { return *servers_; }
    nbd::Server& server() { return servers_->main(); }
    const TempDir& dir() const { return dir_; }

  private:
    template <class T>
    static Task<void> fulfil(Task<T> task, std::promise<T>* result) {
        if constexpr (std::is_void_v<T>) {
            co_await std::move(task);
            result->set_value();
        } else {
            T value = co_await std::move(task);
            result->set_value(std::move(value));
        }
    }
    static std::string text(const Result<>& r) { return r ? "" : r.error().message(); }

    void main(RuntimeOptions options, std::promise<void>* up) {
        auto made = Runtime::create(options);
        if (!made) throw std::runtime_error(made.error().message());
        runtime_ = std::move(*made);
        static const block::Driver kDrivers[] = {kExportDiskDriver};
        scope_ = std::make_unique<TaskScope>();
        graph_ = std::make_unique<block::Graph>(*runtime_, kDrivers, nullptr);
        servers_ = std::make_unique<nbd::Servers>(*runtime_);
        nbd::set_process_servers(servers_.get());
        types_.push_back(nbd::kNbdExportType);
        registry_ = std::make_unique<exports::Registry>(*runtime_, *graph_, types_, [this](std::string_view id) {
            const std::lock_guard lock(m_);
            deleted_.emplace_back(id);
        });
        runtime_->main_loop().post([up] { up->set_value(); });
        runtime_->main_loop().run();
        registry_.reset();
        servers_.reset();
        nbd::set_process_servers(nullptr);
        graph_.reset();
        scope_.reset();
        runtime_.reset();
    }
    Task<void> shut_down() {
        co_await registry_->remove_all();
        co_await servers_->stop_all();
        co_await graph_->close_all();
    }

    TempDir dir_;
    std::thread thread_;
    std::unique_ptr<Runtime> runtime_;
    std::unique_ptr<TaskScope> scope_;
    std::unique_ptr<block::Graph> graph_;
    std::unique_ptr<nbd::Servers> servers_;
    std::unique_ptr<exports::Registry> registry_;
    std::vector<exports::ExportType> types_;
    std::mutex m_;
    std::vector<std::string> deleted_;
};

}  // namespace gantry::test
