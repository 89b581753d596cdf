#include "nbd/client/node.h"

#include <algorithm>
#include <cerrno>

#include "block/align.h"
#include "runtime/cross_loop.h"
#include "runtime/loop.h"

namespace gantry::nbd::client {

using block::BlockStatus;
using block::Request;
using block::WriteFlags;

namespace {

/// Of one answer to BLOCK_STATUS that are kept.
constexpr size_t kMaxExtents = 4096;
/// What going over another loop costs, as Operation::cost(): some small requests, or a large one, are better off
/// waiting for a connection of their own loop.
constexpr uint64_t kDetour = 32;
/// How often requests have lost connections come back while there is another one; those have pauses of their own.
constexpr std::chrono::seconds kAskLost{1};

}  // namespace

NbdNode::NbdNode(std::string name, const block::NodeFlags& flags, std::shared_ptr<const ClientConfig> config,
                 const Negotiated& first, std::vector<std::shared_ptr<Link>> links)
    : Node("nbd", std::move(name), flags), config_(std::move(config)), export_(first), links_(std::move(links)) {
    take_limits();
    set_read_only(flags.read_only || export_.can(kReadOnly));
}

NbdNode::~NbdNode() = default;

void NbdNode::take_limits() {
    uint32_t unit = export_.min_block;
    if (unit == 0) {
        // It did not say. One that knows about block status, or whose size is odd, takes single bytes; others are safer
        // with sectors.
        unit = export_.context_id || export_.size % 512 != 0 ? 1 : 512;
    }
    limits_.request_alignment = unit;
    const uint32_t largest = export_.max_payload ? std::min(export_.max_payload, kMaxPayload) : kMaxPayload;
    limits_.max_transfer = std::max<uint64_t>(block::align_down(largest, unit), unit);
    limits_.max_iov = 1024;
    limits_.supports_fua = export_.can(kSendFua);
    limits_.supports_zeroes = export_.can(kSendWriteZeroes);
    limits_.zeroes_alignment = limits_.discard_alignment = unit;
    limits_.optimal_transfer = export_.preferred_block;
    if (!export_.extended) {
        limits_.max_zeroes = limits_.max_discard = block::align_down(UINT32_MAX, std::max(unit, 65536u));
    }
    set_size(export_.size);  // whole blocks: negotiate() refuses others
}

// ---- Requests ----

namespace {

/// A connection that is up before one that may come back, and that before any other one.
uint64_t rank(LinkState state) {
    if (state == LinkState::kUp) return 0;
    return state == LinkState::kWaiting ? 1 : 2;
}

}  // namespace

Link& NbdNode::pick(const Loop& loop) const {
    Link* best = nullptr;
    uint64_t best_cost = UINT64_MAX;
    for (const auto& link : links_) {
        const uint64_t detour = &link->loop() == &loop ? 0 : kDetour;
        const uint64_t cost = (rank(link->state()) << 40) + link->load() + detour;
        if (cost < best_cost) {
            best_cost = cost;
            best = link.get();
        }
    }
    return *best;
}

Task<Result<>> NbdNode::send(Operation& op) {
    Loop& here = Loop::current();
    Link& link = pick(here);
    if (links_[0]->group()->lost.load(std::memory_order_relaxed) != 0) ask_lost_links();
    if (&link.loop() == &here) return link.execute(op);
    return run_on(link.loop(), link.execute(op));
}

/// Requests go to a connection that is up: those that are not would never be asked.
void NbdNode::ask_lost_links() {
    if (links_.size() == 1 || links_[0]->group()->silence.fails_requests()) return;
    const auto now = Clock::now();
    auto before = asked_lost_.load(std::memory_order_relaxed);
    if (now - before < kAskLost || !asked_lost_.compare_exchange_strong(before, now, std::memory_order_relaxed)) return;
    for (const auto& link : links_) {
        if (link->state() == LinkState::kDown) link->loop().post([link] { link->ask_again(); });
    }
}

Task<Result<>> NbdNode::do_read(Request&, uint64_t offset, IoVec iov) {
    Operation op;
    op.command = kCmdRead;
    op.offset = offset;
    op.length = iov.bytes;
    op.data = iov;
    auto result = co_await send(op);
    co_return result;
}

Task<Result<>> NbdNode::do_write(Request&, uint64_t offset, IoVec iov, WriteFlags flags) {
    Operation op;
    op.command = kCmdWrite;
    if (has(flags, WriteFlags::kFua) && export_.can(kSendFua)) op.flags = kCmdFua;
    op.offset = offset;
    op.length = iov.bytes;
    op.data = iov;
    auto result = co_await send(op);
    note_change(flags);
    co_return result;
}

Task<Result<>> NbdNode::do_write_zeroes(Request&, uint64_t offset, uint64_t length, WriteFlags flags) {
    if (!export_.can(kSendWriteZeroes)) {
        co_return fail(ErrorKind::kUnsupported, "node '{}': NBD server '{}' has no WRITE_ZEROES", name(),
                       config_->address.text());
    }
    Operation op;
    op.command = kCmdWriteZeroes;
    if (has(flags, WriteFlags::kFua) && export_.can(kSendFua)) op.flags |= kCmdFua;
    if (!has(flags, WriteFlags::kMayUnmap)) op.flags |= kCmdNoHole;
    if (has(flags, WriteFlags::kNoFallback)) {
        if (!export_.can(kSendFastZero)) {
            co_return fail(ErrorKind::kUnsupported, "node '{}': NBD server '{}' does not say whether zeroes are fast",
                           name(), config_->address.text());
        }
        op.flags |= kCmdFastZero;
    }
    op.offset = offset;
    op.length = length;
    auto result = co_await send(op);
    note_change(flags);
    co_return result;
}

Task<Result<>> NbdNode::do_discard(Request&, uint64_t offset, uint64_t length) {
    if (!export_.can(kSendTrim)) {
        co_return fail(ErrorKind::kUnsupported, "node '{}': NBD server '{}' has no TRIM", name(),
                       config_->address.text());
    }
    Operation op;
    op.command = kCmdTrim;
    op.offset = offset;
    op.length = length;
    auto result = co_await send(op);
    note_change(WriteFlags::kNone);
    co_return result;
}

/// Set when a change has been answered, whether or not a flush began meanwhile: that one may not cover it.
void NbdNode::note_change(WriteFlags flags) {
    const bool stable = has(flags, WriteFlags::kFua) && export_.can(kSendFua);
    if (!stable && !dirty_.load(std::memory_order_relaxed)) dirty_.store(true, std::memory_order_relaxed);
}

Task<Result<>> NbdNode::do_flush(Request&) {
    if (!export_.can(kSendFlush)) co_return Result<>();
    const bool dirty = dirty_.exchange(false, std::memory_order_relaxed);
    if (closing_.load(std::memory_order_relaxed) && !dirty) co_return Result<>();
    Operation op;
    op.command = kCmdFlush;
    auto result = co_await send(op);
    if (!result && dirty) dirty_.store(true, std::memory_order_relaxed);
    if (!result && !op.answered) {
        // The connection is lost, not what was written over it: later flushes may succeed. Any other failure is final.
        co_return std::unexpected(Error(ErrorKind::kCancelled, result.error().message(), EIO));
    }
    co_return result;
}

Task<Result<>> NbdNode::do_preload(Request&, uint64_t offset, uint64_t length) {
    if (!export_.can(kSendCache)) co_return Result<>();
    const uint64_t unit = limits_.request_alignment;
    const uint64_t end = std::min(block::align_up(offset + length, unit), size());
    for (uint64_t at = block::align_down(offset, unit); at < end;) {
        Operation op;
        op.command = kCmdCache;
        op.offset = at;
        op.length = std::min(end - at, limits_.max_transfer);
        at += op.length;
        CO_CHECK(co_await send(op));
    }
    co_return Result<>();
}

BlockStatus NbdNode::status_of(uint64_t offset, uint64_t length, uint64_t flags) const {
    if (config_->wants_depth()) flags = std::min<uint64_t>(flags, 2);
    BlockStatus status;
    status.length = length;
    status.data = !(flags & kStateHole);
    status.zero = flags & kStateZero;
    status.allocated = true;
    status.depth = 1;
    status.file = const_cast<NbdNode*>(this);
    status.host_offset = offset;
    status.has_offset = true;
    return status;
}

Task<Result<BlockStatus>> NbdNode::do_block_status(Request& rq, uint64_t offset, uint64_t length) {
    BlockStatus status;
    CO_CHECK(co_await do_block_statuses(rq, offset, length, std::span(&status, 1)));
    co_return status;
}

Task<Result<size_t>> NbdNode::do_block_statuses(Request&, uint64_t offset, uint64_t length,
                                                std::span<BlockStatus> out) {
    if (!export_.context_id) {
        out[0] = status_of(offset, length, 0);
        co_return size_t{1};
    }
    const uint64_t unit = limits_.request_alignment;
    Operation op;
    op.command = kCmdBlockStatus;
    op.max_extents = std::min(out.size(), kMaxExtents);
    if (op.max_extents == 1) op.flags = kCmdReqOne;
    op.offset = offset;
    op.length = export_.extended ? length : std::min<uint64_t>(length, block::align_down(UINT32_MAX, unit));
    CO_CHECK(co_await send(op));

    size_t count = 0;
    uint64_t at = 0;
    for (const Operation::Extent& extent : op.extents) {
        // The last one may reach beyond what was asked for.
        uint64_t known = std::min(extent.length, op.length - at);
        const bool odd = at + known != length && known % unit != 0;
        if (odd) known = block::align_down(known, unit);
        // A piece of a block: data is never wrong.
        const bool piece = known == 0;
        if (piece) known = std::min(unit, length - at);
        out[count++] = status_of(offset + at, known, piece ? 0 : extent.flags);
        at += known;
        if (odd || at >= op.length) break;
    }
    co_return count;
}

// ---- Life ----

Task<void> NbdNode::quiesce() {
    if (!closed()) co_return;
    closing_.store(true, std::memory_order_relaxed);
    links_[0]->group()->silence.closing();
    for (const auto& link : links_) {
        link->loop().post([link] { link->limit_last_requests(); });
    }
}

Task<void> NbdNode::close() {
    for (const auto& link : links_) co_await run_on(link->loop(), link->close());
}

void NbdNode::cancel_in_flight() {
    for (const auto& link : links_) {
        link->loop().post([link] { link->cancel(); });
    }
}

Task<Result<>> NbdNode::prepare_reopen(const json::object& options, const block::NodeFlags& flags) {
    CO_CHECK(co_await Node::prepare_reopen(options, flags));
    if (!flags.read_only && !flags.auto_read_only && export_.can(kReadOnly)) {
        co_return fail(ErrorKind::kReadOnly,
                       "Can't reopen read-only NBD mount as read/write; export '{}' of '{}' is "
                       "read-only",
                       config_->export_name, config_->address.text());
    }
    reopens_writable_ = !flags.read_only && !export_.can(kReadOnly);
    co_return Result<>();
}

void NbdNode::commit_reopen() {
    for (const auto& link : links_) link->set_writable(reopens_writable_);
}

Task<Result<>> NbdNode::reopened(bool) {
    // auto-read-only
    if (export_.can(kReadOnly)) set_read_only(true);
    co_return Result<>();
}

// ---- For people and queries ----

bool NbdNode::is_tuning(std::string_view option) const {
    return option == "reconnect-delay" || option == "open-timeout" || option == "multi-conn" || Node::is_tuning(option);
}

std::string NbdNode::filename() const {
    const bool plain = !config_->tls && !config_->context_required;
    const std::string uri = plain ? config_->address.uri(config_->export_name) : std::string();
    return uri.empty() ? Node::filename() : uri;
}

Task<Result<block::ImageInfo>> NbdNode::image_info() {
    block::ImageInfo info;
    info.virtual_size = size();
    co_return info;
}

}  // namespace gantry::nbd::client
