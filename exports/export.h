// Export: a node put somewhere for clients. Registry: every export of the process.

#pragma once

#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block/graph.h"
#include "block/root.h"
#include "exports/keeper.h"
#include "runtime/runtime.h"
#include "runtime/unique_fd.h"
#include "schema/options.h"

namespace gantry::exports {

enum class RemoveMode : uint8_t { kSafe, kHard };

/// What the registry has prepared for a new export.
struct ExportContext {
    Runtime* runtime = nullptr;
    block::Graph* graph = nullptr;
    std::unique_ptr<block::Root> root;  // attached with consistent-read (+ write), resize not shared
    std::vector<Loop*> loops;           // where its units (connections, queues) are dealt; never empty
    std::string id;
    bool writable = false;
    json::object options;  // validated BlockExportOptions
    /// The export has ended by itself (its mount is gone): asks for its removal. Main loop, after start() has begun.
    std::function<void()> ended;
    Keeper* keeper = nullptr;      // who holds descriptors beyond the life of this process; null: nobody
    std::function<bool()> ending;  // whether every export is being removed, because the process ends
    /// A socket that was passed to this process, by name or number; null: nobody knows any.
    std::function<Result<UniqueFd>(std::string_view name)> resolve_fd;
};

/// Main loop only. The registry calls start() once, then stop() once, then destroys it.
class Export {
  public:
    explicit Export(ExportContext context) : context_(std::move(context)) {}
    virtual ~Export() = default;
    const std::string& id() const { return context_.id; }
    virtual std::string_view type() const = 0;
    block::Root& root() const { return *context_.root; }
    bool writable() const { return context_.writable; }

    /// What it takes on its node, and lets others take.
    virtual block::EdgePerms perms() const;

    /// Makes it reachable. On failure nothing of it is left.
    virtual Task<Result<>> start() = 0;
    /// Clients that would be cut off by a safe removal.
    virtual bool has_clients() const = 0;
    /// The first step of a safe removal: true when no client would be cut off, and none comes any more.
    virtual Task<bool> let_go() { co_return !has_clients(); }
    /// Cuts clients off, waits until no request and no coroutine of this export is left. Always ends.
    virtual Task<void> stop() = 0;
    virtual void on_resize(uint64_t new_size) {}
    /// Extra members for `gantry status`: clients, address, counters.
    virtual json::object details() const { return {}; }

  protected:
    friend class Registry;
    ExportContext context_;
};

/// One row of the table in cli/registry.cc.
struct ExportType {
    std::string_view name;
    /// Checks options that need no resources; kInvalid etc. before anything is attached.
    Result<std::unique_ptr<Export>> (*create)(ExportContext context);
};

/// BlockExportInfo.
struct ExportInfo {
    std::string id, type, node_name;
    bool shutting_down = false;
};

/// Main loop only. Also holds iothreads by name for the exports (objects of QMP register them here).
class Registry {
  public:
    Registry(Runtime& runtime, block::Graph& graph, std::span<const ExportType> types,
             std::function<void(std::string_view id)> deleted);
    ~Registry();

    /// Who holds descriptors of exports added from now on beyond the life of this process; null: nobody.
    void set_keeper(Keeper* keeper) { keeper_ = keeper; }
    /// Where exports added from now on find sockets that were passed.
    void set_resolve_fd(std::function<Result<UniqueFd>(std::string_view name)> resolve_fd) {
        resolve_fd_ = std::move(resolve_fd);
    }

    /// block-export-add with validated options. Texts: spec/qmp.md sections 3.2 and 10.
    Task<Result<>> add(json::object options);
    /// block-export-del: returns when the removal has begun; deleted(id) is called when the id is free again.
    Task<Result<>> remove(std::string id, RemoveMode mode);
    /// Newest first.
    std::vector<ExportInfo> list() const;
    Export* find(std::string_view id) const;
    /// Removes (hard) every export of `type` ("" = all: the process ends) and waits until they are gone.
    Task<void> remove_all(std::string_view type = {});
    /// The same for those that `concerned` picks; one that is being added is waited for.
    Task<void> remove_if(std::function<bool(const Export&)> concerned);
    size_t size() const;

    /// Loops by name for the option `iothread`.
    Result<> add_iothread(std::string name, Loop* loop);
    /// kBusy while an export uses it.
    Result<> remove_iothread(std::string_view name);
    Loop* iothread(std::string_view name) const;

  private:
    struct Entry;
    Runtime& runtime_;
    block::Graph& graph_;
    std::span<const ExportType> types_;
    std::function<void(std::string_view)> deleted_;
    std::vector<std::unique_ptr<Entry>> entries_;
    Keeper* keeper_ = nullptr;
    bool ending_ = false;
    std::function<Result<UniqueFd>(std::string_view)> resolve_fd_;
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

}  // namespace gantry::exports
