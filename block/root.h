// Root and Channel: how an export or a job holds a node and sends requests into the graph.

#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "block/node.h"
#include "runtime/sync.h"

namespace gantry::block {

class Root;

/// What happens to a request that failed (BlockdevOnError).
enum class OnError : uint8_t { kReport, kIgnore, kEnospc, kStop };

enum class OpKind : uint8_t { kRead, kWrite, kFlush, kUnmap, kCount };

/// Plain counters, written by one loop only; readers on the main loop fetch them by message (Root::stats()).
struct ChannelStats {
    struct Op {
        uint64_t operations = 0, bytes = 0, failed = 0, invalid = 0, total_time_ns = 0;
        std::array<uint64_t, 64> latency_log2_ns{};
    };
    std::array<Op, static_cast<size_t>(OpKind::kCount)> ops;
    void add(const ChannelStats& other);
};

/// The requests of one Root on one Loop. Its own loop only. Requests begun while quiesced wait here.
/// Client-facing: bounds are checked here (kInvalid; for writes kNoSpace), statistics kept, the error policy applied.
class Channel {
  public:
    Channel(Root& root, Loop& loop);
    ~Channel();
    Channel(const Channel&) = delete;

    Loop& loop() const { return loop_; }
    uint64_t size() const;
    bool read_only() const;

    /// `inline_tried`: try_read() / try_write() of the same range has just said -EAGAIN.
    Task<Result<>> read(uint64_t offset, IoVec iov, bool inline_tried = false);
    Task<Result<>> write(uint64_t offset, IoVec iov, WriteFlags flags = WriteFlags::kNone, bool inline_tried = false);
    Task<Result<>> write_zeroes(uint64_t offset, uint64_t length, WriteFlags flags);
    Task<Result<>> discard(uint64_t offset, uint64_t length);
    Task<Result<>> flush();
    Task<Result<>> preload(uint64_t offset, uint64_t length);
    Task<Result<BlockStatus>> block_status(uint64_t offset, uint64_t length);
    /// Node::block_statuses; `out` stays valid until completion.
    Task<Result<size_t>> block_statuses(uint64_t offset, uint64_t length, std::span<BlockStatus> out);

    /// Plain non-blocking attempts (see Node::try_read): 0, -EAGAIN (also while quiesced), or -errno. Counted in the
    /// statistics unless -EAGAIN. try_write never answers with kFua or when the root is writethrough.
    int try_read(uint64_t offset, const IoVec& iov);
    int try_write(uint64_t offset, const IoVec& iov, WriteFlags flags);
    /// Node::expect; not while quiesced.
    void expect(uint64_t offset) const { node_->expect(offset); }

    /// While quiesced exporters stop taking requests from their clients: `while (ch.quiesced()) co_await ch.resumed();`
    bool quiesced() const { return quiesced_ != 0; }
    WaitQueue::Awaiter resumed() { return resumed_.wait(); }
    uint64_t in_flight() const { return in_flight_; }
    const ChannelStats& stats() const { return stats_; }

  private:
    friend class Root;
    friend struct ChannelOp;
    Root& root_;
    Loop& loop_;
    Node* node_ = nullptr;    // rewritten by the undrain message
    uint64_t in_flight_ = 0;  // requests that a drain waits for (parked ones are not counted)
    uint32_t quiesced_ = 0;
    Perm granted_ = Perm::kNone;  // what the root takes; rewritten like node_
    OnError on_read_error_;
    OnError on_write_error_;
    bool writethrough_;
    uint32_t inline_count_ = 0;
    uint64_t inline_ns_ = 0;  // duration of the last inline request that was measured
    uint64_t next_epoch_ = 1;
    std::shared_ptr<std::atomic<bool>> event_pending_;  // an io_error event is on its way to the main loop
    WaitQueue resumed_;
    WaitQueue idle_;  // drain waits here for in_flight_ == 0
    WaitQueue parked_;
    ChannelStats stats_;
};

struct RootOptions {
    EdgePerms perms;
    std::string user;  // "an export", for refusals: "NBD export 'a'", "job 'b'"
    std::string
        busy_text;  // "block device is in use by block job: backup": blockdev-del's refusal; empty: "Node X is in use"
    OnError on_read_error = OnError::kReport;
    OnError on_write_error = OnError::kReport;
    bool writethrough = false;                            // every write carries kFua
    std::function<void(uint64_t new_size)> on_resize;     // main loop, after undrain
    std::function<void(Node& new_node)> on_node_changed;  // main loop, after undrain
};

/// A user of a node from outside the graph. Made by Graph::attach(); main loop only, except through its Channels.
class Root {
  public:
    ~Root();
    Root(const Root&) = delete;

    Node& node() const { return *node_; }
    const std::string& user() const { return options_.user; }
    const RootOptions& options() const { return options_; }
    Graph& graph() const { return graph_; }

    /// The channel for `loop`, made on first use. Valid until the Root is detached. Main loop.
    Task<Channel*> channel(Loop& loop);
    /// Sum over channels, fetched from their loops.
    Task<ChannelStats> stats();
    /// Lets requests parked by the error policy try again.
    Task<void> resume_parked();
    /// Lets parked requests fail with their error, and later ones too (the policy becomes report): before a user goes
    /// away.
    Task<void> fail_parked();
    uint64_t parked() const { return parked_count_.load(std::memory_order_relaxed); }

    /// Quiesces every channel and waits until nothing is in flight; nestable. Normally called by the graph.
    Task<void> drain_begin();
    Task<void> drain_end();

    /// A plain descriptor for exporters that bypass us; while it is held, changes that would break it are refused
    /// naming the user.
    Result<Node::Passthrough> lease_passthrough();
    void release_passthrough();
    bool passthrough_leased() const { return leased_; }

  private:
    friend class Graph;
    friend class GraphTransaction;
    friend class PermissionPass;
    friend class Channel;
    friend struct ChannelOp;
    Root(Graph& graph, std::shared_ptr<Node> node, RootOptions options);
    static Task<void> quiesce_channel(Channel* channel);
    static Task<void> resume_channel(Channel* channel, Node* node, Perm granted);
    static Task<void> wake_parked(Channel* channel, bool report_from_now);

    Graph& graph_;
    std::shared_ptr<Node> node_;
    RootOptions options_;
    std::map<Loop*, std::unique_ptr<Channel>> channels_;
    std::atomic<uint64_t> parked_count_{0};
    /// Somebody on the main loop walks the channels; detach() waits for it.
    struct Visit {
        explicit Visit(Root& root) : root_(root) { ++root_.visits_; }
        ~Visit() {
            if (--root_.visits_ == 0) root_.left_.notify_all();
        }
        Visit(const Visit&) = delete;
        Root& root_;
    };
    uint32_t visits_ = 0;
    WaitQueue left_;
    uint32_t drained_ = 0;
    bool leased_ = false;
    bool attached_ = false;
};

}  // namespace gantry::block
