#include <algorithm>
#include <map>
#include <optional>

#include "block/repeated_cancel.h"
#include "exports/export.h"
#include "runtime/log.h"
#include "runtime/task_scope.h"
#include "schema/identifier.h"

namespace gantry::exports {

enum class State : uint8_t { kStarting, kRunning, kStopping };

struct Registry::Entry {
    std::string id;
    std::string type;
    State state = State::kStarting;
    bool hard = false;                   // a hard removal was asked for, whatever a safe one comes to
    bool ended = false;                  // it said so before it was running
    std::vector<std::string> iothreads;  // that it keeps in use
    std::string node_name;               // while it has no root
    std::unique_ptr<Export> exported;
};

struct Registry::Impl {
    std::map<std::string, Loop*, std::less<>> iothreads;
    WaitQueue changed;  // an entry's state
    TaskScope scope;    // removals
    size_t next_loop = 0;

    /// The export has no coroutine left: gives its node back, then its id.
    static Task<void> finish_removal(Registry* registry, Entry* entry);
    static Task<Result<>> bring_up(Registry& registry, Entry& entry, json::object options, const ExportType& type,
                                   std::vector<Loop*> loops);
    /// Begins the hard removal of the export of this id, if there is one.
    static void remove_hard(Registry& registry, std::string id);
    static void erase(Registry& registry, Entry* entry);
};

namespace {

/// How messages name the export.
std::string user_name(std::string_view type, std::string_view id) {
    const std::string_view shown = type == "nbd" ? "NBD" : type == "fuse" ? "FUSE" : type;
    return fmt::format("{} export '{}'", shown, id);
}

/// The option `iothread`: a name or a list of names.
std::vector<std::string> iothread_names(const json::object& options) {
    std::vector<std::string> names;
    const json::value* value = options.if_contains("iothread");
    if (value && value->is_string()) names.emplace_back(value->get_string());
    if (value && value->is_array()) {
        for (const json::value& name : value->get_array()) names.emplace_back(name.as_string());
    }
    return names;
}

}  // namespace

block::EdgePerms Export::perms() const {
    block::EdgePerms perms;
    perms.need = block::Perm::kConsistentRead;
    if (writable()) perms.need |= block::Perm::kWrite;
    perms.share = block::Perm::kAll & ~block::Perm::kResize;
    return perms;
}

Registry::Registry(Runtime& runtime, block::Graph& graph, std::span<const ExportType> types,
                   std::function<void(std::string_view id)> deleted)
    : runtime_(runtime), graph_(graph), types_(types), deleted_(std::move(deleted)), impl_(std::make_unique<Impl>()) {}

Registry::~Registry() { CHECK(entries_.empty(), "exports are removed before their registry"); }

Task<Result<>> Registry::add(json::object options) {
    const schema::Options view(options);
    const std::string id = view.str("id");
    const std::string type_name = view.str("type");
    const std::string node_name = view.str("node-name");
    if (!schema::is_identifier(id)) co_return fail(ErrorKind::kInvalid, "Invalid block export id");
    if (std::ranges::any_of(entries_, [&](const auto& e) { return e->id == id; })) {
        co_return fail(ErrorKind::kExists, "Block export id '{}' is already in use", id);
    }
    const auto type = std::ranges::find(types_, type_name, &ExportType::name);
    if (type == types_.end()) {
        co_return fail(ErrorKind::kUnsupported, "block export type '{}' is not served by this build", type_name);
    }
    const block::Node* node = graph_.find(node_name);
    if (!node) co_return fail(ErrorKind::kNotFound, "Cannot find device='' nor node-name='{}'", node_name);

    auto entry = std::make_unique<Entry>();
    entry->id = id;
    entry->type = type_name;
    entry->node_name = node_name;
    entry->iothreads = iothread_names(options);
    if (view.flag("fixed-iothread") && view.has("iothread") && view.find("iothread")->is_array()) {
        co_return fail(ErrorKind::kInvalid, "fixed-iothread=on goes with one iothread, not with a list of them");
    }
    std::vector<Loop*> loops;
    for (const std::string& name : entry->iothreads) {
        Loop* loop = iothread(name);
        if (!loop) co_return fail(ErrorKind::kNotFound, "iothread \"{}\" not found", name);
        loops.push_back(loop);
    }
    if (loops.empty()) {
        // Dealt over the shared loops, each export beginning with another one.
        const auto shared = runtime_.io_loops();
        loops.assign(shared.begin(), shared.end());
        std::ranges::rotate(loops, loops.begin() + static_cast<ptrdiff_t>(impl_->next_loop++ % loops.size()));
    }
    // A node that turns writable when somebody asks for it (auto-read-only) is judged by the attempt.
    if (view.flag("writable") && node->read_only() && !node->flags().auto_read_only) {
        co_return fail(ErrorKind::kReadOnly, "Cannot export read-only node as writable");
    }

    Entry& reserved = *entry;
    entries_.push_back(std::move(entry));
    Result<> up = co_await Impl::bring_up(*this, reserved, std::move(options), *type, std::move(loops));
    if (!up) {
        Impl::erase(*this, &reserved);
        co_return std::unexpected(std::move(up).error());
    }
    reserved.state = State::kRunning;
    impl_->changed.notify_all();
    log::info("export '{}' added: type={} node={} writable={}", id, type_name, node_name,
              reserved.exported->writable());
    if (reserved.ended) Impl::remove_hard(*this, id);
    co_return Result<>();
}

Task<Result<>> Registry::Impl::bring_up(Registry& registry, Entry& entry, json::object options, const ExportType& type,
                                        std::vector<Loop*> loops) {
    const schema::Options view(options);
    ExportContext context;
    context.runtime = &registry.runtime_;
    context.graph = &registry.graph_;
    context.loops = std::move(loops);
    context.id = entry.id;
    context.writable = view.flag("writable");
    context.options = options;
    context.keeper = registry.keeper_;
    context.ending = [&registry] { return registry.ending_; };
    context.resolve_fd = registry.resolve_fd_;
    const bool writable = context.writable;
    context.ended = [&registry, &entry] {
        entry.ended = true;
        if (entry.state != State::kStarting) Impl::remove_hard(registry, entry.id);
    };
    CO_TRY(entry.exported, type.create(std::move(context)));

    block::RootOptions root;
    root.user = user_name(entry.type, entry.id);
    root.writethrough = view.flag("writethrough");
    Export* exported = entry.exported.get();
    root.perms = exported->perms();
    root.on_resize = [exported](uint64_t size) { exported->on_resize(size); };

    block::Node* node = registry.graph_.find(entry.node_name);
    if (!node) co_return fail(ErrorKind::kNotFound, "Cannot find device='' nor node-name='{}'", entry.node_name);
    auto attached = co_await registry.graph_.attach(*node, std::move(root));
    if (!attached) {
        if (writable && attached.error().kind() == ErrorKind::kReadOnly) {
            co_return fail(ErrorKind::kReadOnly, "Cannot export read-only node as writable; {}",
                           attached.error().message());
        }
        co_return std::unexpected(std::move(attached).error());
    }
    exported->context_.root = std::move(*attached);
    Result<> started = co_await exported->start();
    if (started) co_return started;
    auto held = std::move(exported->context_.root);
    co_await registry.graph_.detach(std::move(held));
    co_return started;
}

void Registry::Impl::erase(Registry& registry, Entry* entry) {
    std::erase_if(registry.entries_, [entry](const auto& e) { return e.get() == entry; });
    registry.impl_->changed.notify_all();
}

Task<Result<>> Registry::remove(std::string id, RemoveMode mode) {
    const auto it = std::ranges::find_if(entries_, [&](const auto& e) { return e->id == id; });
    if (it == entries_.end() || (*it)->state == State::kStarting) {
        co_return fail(ErrorKind::kNotFound, "Export '{}' is not found", id);
    }
    Entry* entry = it->get();
    if (entry->state == State::kStopping) {
        entry->hard |= mode == RemoveMode::kHard;
        if (mode == RemoveMode::kHard) co_return Result<>();
        co_return fail(ErrorKind::kBusy, "Export '{}' is already shutting down", id);
    }
    entry->hard = mode == RemoveMode::kHard;
    entry->state = State::kStopping;
    if (!entry->hard) {
        const bool gone = co_await entry->exported->let_go();
        if (!gone && !entry->hard) {
            entry->state = State::kRunning;
            impl_->changed.notify_all();
            co_return fail(ErrorKind::kBusy,
                           "export '{}' still in use; disconnect its clients, or remove it with mode=hard", id);
        }
    }
    impl_->scope.spawn(Impl::finish_removal(this, entry));
    co_return Result<>();
}

void Registry::Impl::remove_hard(Registry& registry, std::string id) {
    registry.impl_->scope.spawn([](Registry* r, std::string name) -> Task<void> {
        [[maybe_unused]] const Result<> begun = co_await r->remove(std::move(name), RemoveMode::kHard);
    }(&registry, std::move(id)));
}

Task<void> Registry::Impl::finish_removal(Registry* registry, Entry* entry) {
    // The requests of its clients must end, whether a lost server comes back or not; those, too, that they or layers
    // of the graph only make now.
    std::optional<block::RepeatedCancel> cancel;
    if (entry->exported->has_clients()) {
        cancel.emplace([entry] { block::Graph::cancel_in_flight(entry->exported->root().node()); });
    }
    co_await entry->exported->stop();
    if (cancel) co_await cancel->over();
    auto root = std::move(entry->exported->context_.root);
    entry->node_name = root->node().name();
    co_await registry->graph_.detach(std::move(root));
    entry->exported.reset();
    const std::string id = entry->id;
    erase(*registry, entry);
    log::info("export '{}' removed", id);
    if (registry->deleted_) registry->deleted_(id);
}

std::vector<ExportInfo> Registry::list() const {
    std::vector<ExportInfo> all;
    for (auto it = entries_.rbegin(); it != entries_.rend(); ++it) {
        const Entry& e = **it;
        if (e.state == State::kStarting) continue;
        const bool attached = e.exported && e.exported->context_.root;
        all.push_back(
            {e.id, e.type, attached ? e.exported->root().node().name() : e.node_name, e.state == State::kStopping});
    }
    return all;
}

Export* Registry::find(std::string_view id) const {
    for (const auto& e : entries_) {
        if (e->id == id && e->state != State::kStarting) return e->exported.get();
    }
    return nullptr;
}

Task<void> Registry::remove_all(std::string_view type) {
    ending_ |= type.empty();
    const auto concerned = [&](const std::unique_ptr<Entry>& e) { return type.empty() || e->type == type; };
    for (;;) {
        std::vector<std::string> ids;
        for (const auto& e : entries_) {
            if (concerned(e) && e->state == State::kRunning) ids.push_back(e->id);
        }
        for (const std::string& id : ids) Impl::remove_hard(*this, id);
        if (std::ranges::none_of(entries_, concerned)) break;
        // One that is being added is waited for, too.
        co_await impl_->changed.wait();
    }
}

Task<void> Registry::remove_if(std::function<bool(const Export&)> concerned) {
    // What has no export yet, or none any more, will have one or be gone soon.
    const auto left = [&](const std::unique_ptr<Entry>& e) { return !e->exported || concerned(*e->exported); };
    for (;;) {
        std::vector<std::string> ids;
        for (const auto& e : entries_) {
            if (left(e) && e->state == State::kRunning) ids.push_back(e->id);
        }
        for (const std::string& id : ids) Impl::remove_hard(*this, id);
        // A removal that need not wait is over by now.
        if (std::ranges::none_of(entries_, left)) break;
        co_await impl_->changed.wait();
    }
}

size_t Registry::size() const { return entries_.size(); }

Result<> Registry::add_iothread(std::string name, Loop* loop) {
    if (!impl_->iothreads.emplace(name, loop).second) {
        return fail(ErrorKind::kExists, "attempt to add duplicate property '{}' to object (type 'container')", name);
    }
    return {};
}

Result<> Registry::remove_iothread(std::string_view name) {
    for (const auto& e : entries_) {
        if (std::ranges::find(e->iothreads, name) != e->iothreads.end()) {
            return fail(ErrorKind::kBusy, "export '{}' runs on iothread '{}'", e->id, name);
        }
    }
    const auto it = impl_->iothreads.find(name);
    if (it == impl_->iothreads.end()) return fail(ErrorKind::kNotFound, "object '{}' not found", name);
    impl_->iothreads.erase(it);
    return {};
}

Loop* Registry::iothread(std::string_view name) const {
    const auto it = impl_->iothreads.find(name);
    return it == impl_->iothreads.end() ? nullptr : it->second;
}

}  // namespace gantry::exports
