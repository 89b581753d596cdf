// Channel: the way of a client's request into the graph. Everything here runs on the channel's loop.

#include <cerrno>

#include <algorithm>
#include <bit>

#include "block/graph.h"
#include "block/root.h"

namespace gantry::block {

namespace {

/// One inline request in this many is timed; the others count as the last measured one (a clock costs as much as a
/// small read).
constexpr uint32_t kInlineSample = 16;

constexpr bool in_range(uint64_t size, uint64_t offset, uint64_t length) {
    return offset <= size && length <= size - offset;
}

}  // namespace

void ChannelStats::add(const ChannelStats& other) {
    for (size_t i = 0; i < ops.size(); ++i) {
        Op& to = ops[i];
        const Op& from = other.ops[i];
        to.operations += from.operations;
        to.bytes += from.bytes;
        to.failed += from.failed;
        to.invalid += from.invalid;
        to.total_time_ns += from.total_time_ns;
        for (size_t b = 0; b < to.latency_log2_ns.size(); ++b) to.latency_log2_ns[b] += from.latency_log2_ns[b];
    }
}

/// One request from begin to answer.
struct ChannelOp {
    enum class Verb : uint8_t { kRead, kWrite, kZero, kDiscard, kFlush, kPreload };
    Verb verb;
    uint64_t offset = 0;
    uint64_t length = 0;
    IoVec iov = {};
    WriteFlags flags = WriteFlags::kNone;
    bool inline_tried = false;

    static Task<Result<>> run(Channel& channel, ChannelOp op);
    static Task<Result<BlockStatus>> status(Channel& channel, uint64_t offset, uint64_t length);
    static Task<Result<size_t>> statuses(Channel& channel, uint64_t offset, uint64_t length,
                                         std::span<BlockStatus> out);

    bool changes() const { return verb == Verb::kWrite || verb == Verb::kZero || verb == Verb::kDiscard; }
    OpKind kind() const;
    const char* name() const;
    Result<> check(const Channel& channel) const;
    Task<Result<>> start(Channel& channel, Request& rq) const;
    /// The request ended: a drain may be waiting.
    static void leave(Channel& channel);
    static void account(Channel& channel, OpKind kind, uint64_t bytes, uint64_t ns);
    enum class Action : uint8_t { kReport, kIgnore, kStop };
    Action decide(const Channel& channel, const Error& error) const;
    void announce(Channel& channel, const Error& error, Action action) const;
};

OpKind ChannelOp::kind() const {
    switch (verb) {
        case Verb::kRead:
        case Verb::kPreload:
            return OpKind::kRead;
        case Verb::kWrite:
        case Verb::kZero:
            return OpKind::kWrite;
        case Verb::kDiscard:
            return OpKind::kUnmap;
        case Verb::kFlush:
            return OpKind::kFlush;
    }
    return OpKind::kRead;
}

const char* ChannelOp::name() const {
    switch (verb) {
        case Verb::kRead:
            return "read";
        case Verb::kWrite:
            return "write";
        case Verb::kZero:
            return "write zeroes";
        case Verb::kDiscard:
            return "discard";
        case Verb::kFlush:
            return "flush";
        case Verb::kPreload:
            return "preload";
    }
    return "";
}

Result<> ChannelOp::check(const Channel& channel) const {
    if (verb == Verb::kFlush) return {};
    const Node& node = *channel.node_;
    if (changes()) {
        Perm wanted = Perm::kWrite;
        if (has(flags, WriteFlags::kUnchanged)) wanted |= Perm::kWriteUnchanged;
        if (node.read_only() || !any(channel.granted_ & wanted))
            return fail(ErrorKind::kReadOnly, "{} on node '{}': Image is read-only", name(), node.name());
    }
    if (in_range(node.size(), offset, length)) return {};
    return fail(changes() ? ErrorKind::kNoSpace : ErrorKind::kInvalid,
                "{} of {} bytes at {}: beyond the end of node '{}' ({} bytes)", name(), length, offset, node.name(),
                node.size());
}

Task<Result<>> ChannelOp::start(Channel& channel, Request& rq) const {
    Node& node = *channel.node_;
    switch (verb) {
        case Verb::kRead:
            return node.read(rq, offset, iov);
        case Verb::kWrite:
            return node.write(rq, offset, iov, channel.writethrough_ ? flags | WriteFlags::kFua : flags);
        case Verb::kZero:
            return node.write_zeroes(rq, offset, length, channel.writethrough_ ? flags | WriteFlags::kFua : flags);
        case Verb::kDiscard:
            return node.discard(rq, offset, length);
        case Verb::kFlush:
            return node.flush(rq);
        case Verb::kPreload:
            return node.preload(rq, offset, length);
    }
    return ready_task(Result<>());
}

void ChannelOp::leave(Channel& channel) {
    CHECK(channel.in_flight_ != 0, "a request ends once");
    if (--channel.in_flight_ == 0 && channel.quiesced_ != 0) channel.idle_.notify_all();
}

void ChannelOp::account(Channel& channel, OpKind kind, uint64_t bytes, uint64_t ns) {
    ChannelStats::Op& op = channel.stats_.ops[static_cast<size_t>(kind)];
    ++op.operations;
    op.bytes += bytes;
    op.total_time_ns += ns;
    ++op.latency_log2_ns[std::min<unsigned>(std::bit_width(ns), 63)];
}

ChannelOp::Action ChannelOp::decide(const Channel& channel, const Error& error) const {
    // What only says "cannot be done this way" is an answer, not a failure of the medium.
    if (error.kind() == ErrorKind::kUnsupported || error.kind() == ErrorKind::kInvalid || verb == Verb::kPreload)
        return Action::kReport;
    switch (verb == Verb::kRead ? channel.on_read_error_ : channel.on_write_error_) {
        case OnError::kReport:
            return Action::kReport;
        case OnError::kIgnore:
            return Action::kIgnore;
        case OnError::kEnospc:
            return error.kind() == ErrorKind::kNoSpace ? Action::kStop : Action::kReport;
        case OnError::kStop:
            return Action::kStop;
    }
    return Action::kReport;
}

void ChannelOp::announce(Channel& channel, const Error& error, Action action) const {
    Observer* observer = channel.root_.graph_.observer();
    const bool configured = channel.on_read_error_ != OnError::kReport || channel.on_write_error_ != OnError::kReport;
    if (!observer || !configured) return;
    // Stops are bounded by the requests parked. Of the others one at a time is under way: a client cannot flood the
    // main loop.
    auto node = channel.node_->weak_from_this();
    auto pending = action == Action::kStop ? nullptr : channel.event_pending_;
    if (pending && pending->exchange(true)) return;
    channel.root_.graph_.runtime().main_loop().post(
        [observer, node, pending, user = channel.root_.user(), write = verb != Verb::kRead, action,
         nospace = error.kind() == ErrorKind::kNoSpace, reason = error.message()] {
            if (pending) pending->store(false);
            const auto alive = node.lock();
            if (!alive || alive->closed()) return;
            const char* word = action == Action::kReport ? "report" : action == Action::kIgnore ? "ignore" : "stop";
            observer->io_error(user, *alive, write ? "write" : "read", word, nospace, reason);
        });
}

Task<Result<>> ChannelOp::run(Channel& channel, ChannelOp op) {
    const auto began = Clock::now();
    const OpKind kind = op.kind();
    for (;;) {
        while (channel.quiesced_ != 0) co_await channel.resumed_.wait();
        Result<> allowed = op.check(channel);
        if (!allowed) {
            ++channel.stats_.ops[static_cast<size_t>(kind)].invalid;
            co_return allowed;
        }
        ++channel.in_flight_;
        Request rq{.loop = &channel.loop_,
                   .channel = &channel,
                   .epoch = channel.next_epoch_++,
                   .inline_tried = op.inline_tried};
        Result<> done = co_await op.start(channel, rq);
        if (done) {
            if (op.verb != Verb::kPreload)
                account(channel, kind, op.length, static_cast<uint64_t>((Clock::now() - began).count()));
            leave(channel);
            co_return done;
        }
        ++channel.stats_.ops[static_cast<size_t>(kind)].failed;
        const Action action = op.decide(channel, done.error());
        op.announce(channel, done.error(), action);
        if (action == Action::kStop) {
            // Parked: no longer in flight, so that a drain can end; it begins anew when somebody has helped.
            channel.root_.parked_count_.fetch_add(1, std::memory_order_relaxed);
            leave(channel);
            co_await channel.parked_.wait();
            channel.root_.parked_count_.fetch_sub(1, std::memory_order_relaxed);
            op.inline_tried = false;
            continue;
        }
        leave(channel);
        if (action == Action::kReport) co_return done;
        if (op.verb == Verb::kRead) fill_iovec(op.iov, 0, op.iov.bytes);
        co_return Result<>();
    }
}

Task<Result<BlockStatus>> ChannelOp::status(Channel& channel, uint64_t offset, uint64_t length) {
    while (channel.quiesced_ != 0) co_await channel.resumed_.wait();
    Node& node = *channel.node_;
    if (length == 0 || !in_range(node.size(), offset, length)) {
        co_return fail(ErrorKind::kInvalid, "block status of {} bytes at {}: outside of node '{}' ({} bytes)", length,
                       offset, node.name(), node.size());
    }
    ++channel.in_flight_;
    Request rq{.loop = &channel.loop_, .channel = &channel, .epoch = channel.next_epoch_++};
    Result<BlockStatus> answer = co_await node.block_status(rq, offset, length);
    leave(channel);
    co_return answer;
}

Task<Result<size_t>> ChannelOp::statuses(Channel& channel, uint64_t offset, uint64_t length,
                                         std::span<BlockStatus> out) {
    while (channel.quiesced_ != 0) co_await channel.resumed_.wait();
    Node& node = *channel.node_;
    if (length == 0 || !in_range(node.size(), offset, length)) {
        co_return fail(ErrorKind::kInvalid, "block status of {} bytes at {}: outside of node '{}' ({} bytes)", length,
                       offset, node.name(), node.size());
    }
    ++channel.in_flight_;
    Request rq{.loop = &channel.loop_, .channel = &channel, .epoch = channel.next_epoch_++};
    Result<size_t> answer = co_await node.block_statuses(rq, offset, length, out);
    leave(channel);
    co_return answer;
}

Channel::Channel(Root& root, Loop& loop)
    : root_(root),
      loop_(loop),
      node_(&root.node()),
      quiesced_(root.drained_),
      granted_(root.options_.perms.need),
      on_read_error_(root.options_.on_read_error),
      on_write_error_(root.options_.on_write_error),
      writethrough_(root.options_.writethrough),
      event_pending_(std::make_shared<std::atomic<bool>>(false)) {}

Channel::~Channel() {
    CHECK(in_flight_ == 0 && resumed_.empty() && parked_.empty(), "a channel is destroyed without requests");
}

uint64_t Channel::size() const { return node_->size(); }

bool Channel::read_only() const { return !any(granted_ & Perm::kWrite) || node_->read_only(); }

Task<Result<>> Channel::read(uint64_t offset, IoVec iov, bool inline_tried) {
    return ChannelOp::run(*this, {.verb = ChannelOp::Verb::kRead,
                                  .offset = offset,
                                  .length = iov.bytes,
                                  .iov = iov,
                                  .inline_tried = inline_tried});
}

Task<Result<>> Channel::write(uint64_t offset, IoVec iov, WriteFlags flags, bool inline_tried) {
    return ChannelOp::run(*this, {.verb = ChannelOp::Verb::kWrite,
                                  .offset = offset,
                                  .length = iov.bytes,
                                  .iov = iov,
                                  .flags = flags,
                                  .inline_tried = inline_tried});
}

Task<Result<>> Channel::write_zeroes(uint64_t offset, uint64_t length, WriteFlags flags) {
    return ChannelOp::run(*this, {.verb = ChannelOp::Verb::kZero, .offset = offset, .length = length, .flags = flags});
}

Task<Result<>> Channel::discard(uint64_t offset, uint64_t length) {
    return ChannelOp::run(*this, {.verb = ChannelOp::Verb::kDiscard, .offset = offset, .length = length});
}

Task<Result<>> Channel::flush() { return ChannelOp::run(*this, {.verb = ChannelOp::Verb::kFlush}); }

Task<Result<>> Channel::preload(uint64_t offset, uint64_t length) {
    return ChannelOp::run(*this, {.verb = ChannelOp::Verb::kPreload, .offset = offset, .length = length});
}

Task<Result<BlockStatus>> Channel::block_status(uint64_t offset, uint64_t length) {
    return ChannelOp::status(*this, offset, length);
}

Task<Result<size_t>> Channel::block_statuses(uint64_t offset, uint64_t length, std::span<BlockStatus> out) {
    return ChannelOp::statuses(*this, offset, length, out);
}

int Channel::try_read(uint64_t offset, const IoVec& iov) {
    if (quiesced_ != 0 || on_read_error_ != OnError::kReport) return -EAGAIN;
    Node& node = *node_;
    ChannelStats::Op& op = stats_.ops[static_cast<size_t>(OpKind::kRead)];
    if (!in_range(node.size(), offset, iov.bytes)) [[unlikely]] {
        ++op.invalid;
        return -EINVAL;
    }
    Request rq{.loop = &loop_, .channel = this, .epoch = next_epoch_++};
    const bool measured = inline_count_++ % kInlineSample == 0;
    const auto began = measured ? Clock::now() : Clock::time_point();
    const int result = node.try_read(rq, offset, iov);
    if (result == -EAGAIN) return result;
    if (result != 0) [[unlikely]] {
        ++op.failed;
        return result;
    }
    if (measured) inline_ns_ = static_cast<uint64_t>((Clock::now() - began).count());
    ChannelOp::account(*this, OpKind::kRead, iov.bytes, inline_ns_);
    return 0;
}

int Channel::try_write(uint64_t offset, const IoVec& iov, WriteFlags flags) {
    if (quiesced_ != 0 || writethrough_ || has(flags, WriteFlags::kFua) || on_write_error_ != OnError::kReport)
        return -EAGAIN;
    Node& node = *node_;
    ChannelStats::Op& op = stats_.ops[static_cast<size_t>(OpKind::kWrite)];
    if (read_only()) [[unlikely]] {
        ++op.invalid;
        return -EROFS;
    }
    if (!in_range(node.size(), offset, iov.bytes)) [[unlikely]] {
        ++op.invalid;
        return -ENOSPC;
    }
    Request rq{.loop = &loop_, .channel = this, .epoch = next_epoch_++};
    const bool measured = inline_count_++ % kInlineSample == 0;
    const auto began = measured ? Clock::now() : Clock::time_point();
    const int result = node.try_write(rq, offset, iov, flags);
    if (result == -EAGAIN) return result;
    if (result != 0) [[unlikely]] {
        ++op.failed;
        return result;
    }
    if (measured) inline_ns_ = static_cast<uint64_t>((Clock::now() - began).count());
    ChannelOp::account(*this, OpKind::kWrite, iov.bytes, inline_ns_);
    return 0;
}

}  // namespace gantry::block
