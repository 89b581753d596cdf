// Graph: names, opening and closing, users. Changes of an existing graph: graph_change.cc, reopen.cc; drain: drain.cc.

#include "block/graph.h"

#include <algorithm>

#include "block/crypto/secrets.h"
#include "block/jobs/job.h"
#include "block/last_requests.h"
#include "block/node_flags.h"
#include "block/size_watch.h"
#include "runtime/buffer.h"
#include "runtime/log.h"
#include "schema/identifier.h"

namespace gantry::block {

namespace {

constexpr size_t kMaxNodeName = 31;
constexpr int kMaxDepth = 200;  // of backing chains and nested definitions
constexpr size_t kProbeBytes = 4096;

}  // namespace

Graph::Graph(Runtime& runtime, std::span<const Driver> drivers, Observer* observer)
    : runtime_(runtime),
      drivers_(drivers),
      observer_(observer),
      jobs_(std::make_unique<JobManager>(*this)),
      secrets_(std::make_unique<crypto::Secrets>()) {}

Graph::~Graph() { CHECK(all_.empty(), "close_all() comes before the end of a graph"); }

// ---- Names ----

Node* Graph::find(std::string_view node_name) const {
    auto it = std::ranges::find_if(all_, [&](const auto& node) { return node->name() == node_name && !node->closed_; });
    return it == all_.end() ? nullptr : it->get();
}

Result<Node*> Graph::lookup(std::string_view device, std::string_view node_name) const {
    if (Node* node = find(node_name)) return node;
    return fail(ErrorKind::kNotFound, "Cannot find device='{}' nor node-name='{}'", device, node_name);
}

std::vector<Node*> Graph::nodes() const {
    std::vector<Node*> list;
    for (auto it = all_.rbegin(); it != all_.rend(); ++it) {
        if (!(*it)->closed_) list.push_back(it->get());
    }
    return list;
}

const Driver* Graph::driver(std::string_view name) const {
    auto it = std::ranges::find(drivers_, name, &Driver::name);
    return it == drivers_.end() ? nullptr : &*it;
}

std::string Graph::make_node_name() { return fmt::format("#block{:03}", next_name_++); }

Result<> Graph::check_name(std::string_view name) const {
    if (!schema::is_identifier(name)) return fail(ErrorKind::kInvalid, "Invalid node-name: '{}'", name);
    if (name.size() > kMaxNodeName) return fail(ErrorKind::kInvalid, "Node name too long");
    const bool taken = std::ranges::any_of(all_, [&](const auto& node) { return node->name() == name; }) ||
                       std::ranges::find(opening_names_, name) != opening_names_.end();
    if (taken) return fail(ErrorKind::kExists, "Duplicate nodes with node-name='{}'", name);
    return {};
}

Result<std::shared_ptr<Node>> Graph::still_open(std::shared_ptr<Node> node) const {
    if (!node->closed_) return node;
    return fail(ErrorKind::kNotFound, "Cannot find device='' nor node-name='{}'", node->name());
}

// ---- Opening ----

Task<Result<Node*>> Graph::add(json::object options) {
    auto guard = co_await mutex_.lock();
    if (!options.contains("node-name"))
        co_return fail(ErrorKind::kInvalid, "'node-name' must be specified for the root node");
    Result<std::shared_ptr<Node>> opened = co_await open_node(std::move(options), NodeFlags(), 0);
    if (opened) {
        Node& node = **opened;
        node.monitor_owned_ = true;
        Result<> permitted = co_await update_permissions(PermMode::kMust);
        if (permitted) co_return &node;
        node.monitor_owned_ = false;
        opened = std::unexpected(std::move(permitted).error());
    }
    co_await close_unused();
    co_return std::unexpected(std::move(opened).error());
}

Task<Result<std::shared_ptr<Node>>> Graph::open_node(json::object options, NodeFlags inherited, int depth) {
    if (depth > kMaxDepth)
        co_return fail(ErrorKind::kTooLarge,
                       "more than {} images stand above each other; does one name itself as its backing file?",
                       kMaxDepth);
    const json::value* type = options.if_contains("driver");
    if (!type || !type->is_string()) co_return fail(ErrorKind::kInvalid, "Parameter 'driver' is missing");
    const std::string driver_name(type->get_string());
    const Driver* driver = this->driver(driver_name);
    if (!driver) co_return fail(ErrorKind::kUnsupported, "Parameter 'driver' does not accept value '{}'", driver_name);
    CO_TRY(const NodeFlags flags, flags_from_options(options, inherited));
    const json::value* given = options.if_contains("node-name");
    const std::string name = given ? std::string(given->as_string()) : make_node_name();
    if (given) CO_CHECK(check_name(name));

    OpenContext context(*this, options, name, flags, depth);
    opening_names_.push_back(name);
    openings_.push_back(&context);
    Result<std::shared_ptr<Node>> opened = co_await driver->open(context);
    std::erase(openings_, &context);
    std::erase(opening_names_, name);
    if (!opened) co_return opened;
    Node& node = **opened;
    node.options_ = std::move(options);
    node.inherited_ = inherited;
    node.reopen_options_ = driver->reopen_options;
    all_.push_back(*opened);
    context.hand_over(node);
    node.children_changed();
    node.update_fast_paths();
    Result<> ready = co_await node.opened();
    if (!ready) co_return std::unexpected(std::move(ready).error());  // close_unused() takes it away
    co_return opened;
}

Task<Result<std::string>> Graph::probe(Node& protocol) {
    const std::shared_ptr<Node> alive = protocol.shared_from_this();
    const uint64_t size = std::min<uint64_t>(protocol.size(), kProbeBytes);
    Buffer head = Buffer::alloc(size);
    if (size != 0) {
        const iovec iov = head.iov();
        Request rq = Request::internal();
        CO_CHECK(co_await protocol.read(rq, 0, IoVec(iov)));
    }
    const std::string filename = protocol.filename();
    const Driver* best = nullptr;
    int best_score = 0;
    for (const Driver& driver : drivers_) {
        const int score = driver.probe ? driver.probe(head.data(), size, filename) : 0;
        if (score <= best_score) continue;
        best = &driver;
        best_score = score;
    }
    co_return best ? std::string(best->name) : std::string("raw");
}

// ---- Closing ----

Task<Result<>> Graph::remove(std::string_view node_name) {
    const std::string name(node_name);
    const bool was_opening = cancel_opening(name);
    auto guard = co_await mutex_.lock();
    Node* node = find(name);
    if (!node && was_opening) co_return Result<>();
    if (!node) co_return fail(ErrorKind::kNotFound, "Failed to find node with node-name='{}'", name);
    for (const Root* root : node->roots_) {
        if (!root->options_.busy_text.empty())
            co_return fail(ErrorKind::kBusy, "Node '{}' is busy: {}", name, root->options_.busy_text);
        co_return fail(ErrorKind::kBusy, "Node {} is in use; {} uses it", name, root->user());
    }
    for (const Child* edge : node->parents_) {
        if (edge->role == ChildRole::kBacking)
            co_return fail(ErrorKind::kBusy, "Node '{}' is busy: node is used as backing hd of '{}'", name,
                           edge->parent->name());
    }
    if (!node->monitor_owned_) co_return fail(ErrorKind::kInvalid, "Node {} is not owned by the monitor", name);
    for (const Child* edge : node->parents_)
        co_return fail(ErrorKind::kBusy, "Block device {} is in use; node '{}' uses it as '{}'", name,
                       edge->parent->name(), edge->name);
    node->monitor_owned_ = false;
    co_await close_unused();
    co_return Result<>();
}

Task<void> Graph::close_node(std::shared_ptr<Node> node) {
    node->closed_ = true;
    LastRequests last(node);
    if (node->quiesce_count_ == 0) co_await node->quiesce();
    if (!node->read_only()) {
        Request rq = Request::internal();
        Result<> flushed = co_await node->flush(rq);
        if (!flushed) log::error("node '{}': flush before closing: {}", node->name(), flushed.error().message());
    }
    co_await node->close();
    co_await last.over();
    for (const auto& child : node->children_) std::erase(child->node->parents_, child.get());
    node->children_.clear();
    std::erase(all_, node);
}

Task<void> Graph::close_unused() {
    auto unused = [](const auto& node) {
        return !node->monitor_owned_ && node->parents_.empty() && node->roots_.empty() && node->pins_ == 0;
    };
    for (;;) {
        auto it = std::find_if(all_.rbegin(), all_.rend(), unused);
        if (it == all_.rend()) break;
        co_await close_node(*it);
    }
    Result<> relaxed = co_await update_permissions(PermMode::kRelax);
    if (!relaxed) log::error("after a change of the graph: {}", relaxed.error().message());
}

Task<void> Graph::close_all() {
    auto guard = co_await mutex_.lock();
    for (const auto& node : all_) {
        CHECK(node->roots_.empty(), "close_all() comes after the last user");
        node->monitor_owned_ = false;
    }
    co_await close_unused();
    CHECK(all_.empty(), "every node closes");
}

// ---- Users ----

Task<Result<std::unique_ptr<Root>>> Graph::attach(Node& node, RootOptions options) {
    std::shared_ptr<Node> wanted = node.shared_from_this();
    auto guard = co_await mutex_.lock();
    CO_TRY(std::shared_ptr<Node> alive, still_open(std::move(wanted)));
    std::unique_ptr<Root> root(new Root(*this, alive, std::move(options)));
    alive->roots_.push_back(root.get());
    Result<> permitted = co_await update_permissions(PermMode::kMust);
    if (!permitted) {
        std::erase(alive->roots_, root.get());
        co_return std::unexpected(std::move(permitted).error());
    }
    root->attached_ = true;
    co_return root;
}

Task<void> Graph::detach(std::unique_ptr<Root> root) {
    auto guard = co_await mutex_.lock();
    root->leased_ = false;
    co_await root->drain_begin();
    std::erase(root->node_->roots_, root.get());
    root->attached_ = false;
    while (root->visits_ != 0) co_await root->left_.wait();
    root.reset();
    co_await close_unused();
}

Task<Result<>> Graph::set_perms(Root& root, EdgePerms perms) {
    auto guard = co_await mutex_.lock();
    co_await root.drain_begin();
    const EdgePerms old = root.options_.perms;
    root.options_.perms = perms;
    Result<> permitted = co_await update_permissions(PermMode::kMust);
    if (!permitted) root.options_.perms = old;
    co_await root.drain_end();
    co_return permitted;
}

Result<> Graph::check_not_leased(const Node& node) const {
    Node* key[] = {const_cast<Node*>(&node)};
    for (const Root* root : roots_above(key)) {
        if (!root->leased_) continue;
        return fail(ErrorKind::kBusy, "Node '{}' is busy: {} reads and writes its file directly; remove that first",
                    node.name(), root->user());
    }
    return {};
}

namespace {

std::vector<uint64_t> sizes_of(const std::vector<Node*>& nodes) {
    std::vector<uint64_t> sizes;
    for (const Node* node : nodes) sizes.push_back(node->size());
    return sizes;
}

}  // namespace

Task<Result<>> Graph::update_permissions(PermMode mode, std::function<void()> before_commit) {
    PermissionPass pass(*this);
    CO_CHECK(pass.compute());
    std::vector<Node*> live;
    for (Node* node : pass.changed()) {
        if (!node->perms_known_) continue;
        if (Result<> free = check_not_leased(*node); !free) {
            if (mode == PermMode::kMust) co_return free;
            pass.skip(*node);
            continue;
        }
        live.push_back(node);
    }
    // A node may reopen its file here: nothing may be in flight on it, from users or from the nodes above.
    DrainSection section;
    const bool used = std::ranges::any_of(roots_above(live), &Root::attached_) ||
                      std::ranges::any_of(live, [](const Node* node) { return !node->parents_.empty(); });
    if (used) co_await begin_drain(section, live);
    // A leaf may find that its file changed its size while nobody used it.
    const std::vector<uint64_t> sizes_before = sizes_of(live);
    SizeWatch watch;
    watch.start(live);
    Result<> ready = co_await pass.prepare();
    if (ready) {
        if (before_commit) before_commit();
        pass.commit();
        if (sizes_of(live) != sizes_before) watch.settle();
    }
    if (section.active) co_await end_drain(section);
    co_return ready;
}

}  // namespace gantry::block
