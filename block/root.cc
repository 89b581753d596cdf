#include "block/root.h"

#include "block/graph.h"
#include "runtime/cross_loop.h"
#include "runtime/task_scope.h"

namespace gantry::block {

Root::Root(Graph& graph, std::shared_ptr<Node> node, RootOptions options)
    : graph_(graph), node_(std::move(node)), options_(std::move(options)) {}

Root::~Root() { CHECK(!attached_, "a root is detached before it goes"); }

Task<Channel*> Root::channel(Loop& loop) {
    std::unique_ptr<Channel>& slot = channels_[&loop];
    // Made here, used there: whoever hands the pointer over to the loop does so with a message.
    if (!slot) slot.reset(new Channel(*this, loop));
    co_return slot.get();
}

namespace {

Task<ChannelStats> copy_stats(const Channel* channel) { co_return channel->stats(); }

}  // namespace

Task<ChannelStats> Root::stats() {
    // Channels are never removed while the root lives, but more may come while we wait.
    const Visit visit(*this);
    ChannelStats sum;
    std::vector<Channel*> channels;
    for (const auto& [loop, channel] : channels_) channels.push_back(channel.get());
    for (Channel* channel : channels) {
        const ChannelStats one = co_await run_on(channel->loop(), copy_stats(channel));
        sum.add(one);
    }
    co_return sum;
}

Task<void> Root::wake_parked(Channel* channel, bool report_from_now) {
    if (report_from_now) channel->on_read_error_ = channel->on_write_error_ = OnError::kReport;
    channel->parked_.notify_all();
    co_return;
}

Task<void> Root::resume_parked() {
    const Visit visit(*this);
    std::vector<Channel*> channels;
    for (const auto& [loop, channel] : channels_) channels.push_back(channel.get());
    for (Channel* channel : channels) co_await run_on(channel->loop(), wake_parked(channel, false));
}

Task<void> Root::fail_parked() {
    const Visit visit(*this);
    options_.on_read_error = options_.on_write_error = OnError::kReport;
    std::vector<Channel*> channels;
    for (const auto& [loop, channel] : channels_) channels.push_back(channel.get());
    for (Channel* channel : channels) co_await run_on(channel->loop(), wake_parked(channel, true));
}

Task<void> Root::quiesce_channel(Channel* channel) {
    ++channel->quiesced_;
    while (channel->in_flight_ != 0) co_await channel->idle_.wait();
}

Task<void> Root::resume_channel(Channel* channel, Node* node, Perm granted) {
    CHECK(channel->quiesced_ != 0, "drains nest");
    // The pointer is only looked at by requests, and none runs before the count is zero.
    channel->node_ = node;
    channel->granted_ = granted;
    if (--channel->quiesced_ == 0) channel->resumed_.notify_all();
    co_return;
}

Task<void> Root::drain_begin() {
    ++drained_;
    TaskScope scope;
    // A channel made from here on is born quiesced as often as the root is drained.
    for (const auto& [loop, channel] : channels_) scope.spawn(run_on(*loop, quiesce_channel(channel.get())));
    co_await scope.join();
}

Task<void> Root::drain_end() {
    CHECK(drained_ != 0, "drains nest");
    --drained_;
    TaskScope scope;
    for (const auto& [loop, channel] : channels_)
        scope.spawn(run_on(*loop, resume_channel(channel.get(), node_.get(), options_.perms.need)));
    co_await scope.join();
}

Result<Node::Passthrough> Root::lease_passthrough() {
    auto refuse = [this](std::string_view why) {
        return fail(ErrorKind::kUnsupported, "node '{}' cannot be handed out as a plain file: {}", node_->name(), why);
    };
    if (drained_ != 0) return fail(ErrorKind::kBusy, "node '{}' is being changed, try again", node_->name());
    if (options_.writethrough) return refuse("every write is followed by a flush");
    if (options_.on_read_error != OnError::kReport || options_.on_write_error != OnError::kReport)
        return refuse("an error policy must see every request");
    for (const Node* node = node_.get(); node;) {
        if (!node->bitmaps().empty()) return refuse(fmt::format("node '{}' has dirty bitmaps", node->name()));
        if (node->flags().detect_zeroes != DetectZeroes::kOff)
            return refuse(fmt::format("node '{}' detects zeroes", node->name()));
        for (const Root* other : node->roots()) {
            if (other != this && !other->options_.busy_text.empty())
                return refuse(fmt::format("{} works on node '{}'", other->user(), node->name()));
        }
        const Node* below = nullptr;
        for (const auto& child : node->children()) {
            if (child->role == ChildRole::kFiltered || child->role == ChildRole::kFile) below = child->node.get();
        }
        node = below;
    }
    Result<Node::Passthrough> answer = node_->passthrough();
    if (answer) leased_ = true;
    return answer;
}

void Root::release_passthrough() { leased_ = false; }

}  // namespace gantry::block
