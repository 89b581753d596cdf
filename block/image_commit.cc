// Committing an image into its backing file.

#include <algorithm>

#include "block/image_control.h"
#include "runtime/buffer.h"
#include "runtime/log.h"

namespace gantry::block {

namespace {

constexpr uint64_t kPiece = uint64_t{1} << 20;
constexpr uint64_t kLook = uint64_t{1} << 30;

/// Options that reopen `node` as it is, for it and everything that backs it: each keeps its backing node.
std::vector<json::object> reopen_chain(Node& node) {
    std::vector<json::object> chain;
    for (Node* one = &node; one;) {
        json::object options = one->options();
        options["node-name"] = one->name();
        options["driver"] = one->driver();
        const Child* below = one->child("backing");
        if (below) options["backing"] = below->node->name();
        chain.push_back(std::move(options));
        one = below ? below->node.get() : nullptr;
    }
    return chain;
}

/// What `top` itself says about [offset, offset + length) goes to the same place below.
Task<Result<>> copy_range(Channel& from, Channel& to, uint64_t offset, uint64_t length, std::span<uint8_t> bytes) {
    while (length > 0) {
        const iovec piece{bytes.data(), std::min<uint64_t>(length, bytes.size())};
        CO_CHECK(co_await from.read(offset, IoVec(piece)));
        CO_CHECK(co_await to.write(offset, IoVec(piece)));
        offset += piece.iov_len;
        length -= piece.iov_len;
    }
    co_return Result<>();
}

Task<Result<>> copy_allocated(Channel& from, Channel& to, uint64_t size, Progress progress) {
    Buffer bytes = Buffer::alloc(kPiece);
    for (uint64_t offset = 0; offset < size;) {
        CO_TRY(const BlockStatus status, co_await from.block_status(offset, std::min(size - offset, kLook)));
        const uint64_t length =
            status.depth == 1 && !status.zero ? std::min(status.length, 16 * kPiece) : status.length;
        if (status.depth == 1) {
            if (status.zero) {
                CO_CHECK(co_await to.write_zeroes(offset, length, WriteFlags::kMayUnmap));
            } else {
                CO_CHECK(co_await copy_range(from, to, offset, length, bytes.span()));
            }
        }
        offset += length;
        if (progress && !progress(offset, size)) co_return fail(ErrorKind::kCancelled, "The commit was cancelled");
    }
    co_return co_await to.flush();
}

/// Both ends, held so that nobody else writes to either.
Task<Result<>> commit_between(Graph& graph, Node& top, Node& backing, Progress progress) {
    if (backing.size() < top.size()) {
        CO_CHECK(co_await graph.resize(backing, static_cast<int64_t>(top.size())));
    }
    constexpr Perm kChanging = Perm::kWrite | Perm::kResize;
    RootOptions reader, writer;
    reader.perms = {Perm::kConsistentRead, Perm::kConsistentRead | Perm::kWriteUnchanged};
    reader.user = writer.user = "a commit";
    // The edge between the two lives with a changing backing file as long as nobody above it minds.
    writer.perms = {Perm::kConsistentRead | Perm::kWrite, ~kChanging};
    reader.perms.share = ~Perm::kResize;
    CO_TRY(std::unique_ptr<Root> to, co_await graph.attach(backing, std::move(writer)));
    Result<std::unique_ptr<Root>> from = co_await graph.attach(top, std::move(reader));
    Result<> done;
    if (from) {
        Loop& loop = graph.runtime().main_loop();
        Channel* source = co_await (*from)->channel(loop);
        Channel* target = co_await to->channel(loop);
        done = co_await copy_allocated(*source, *target, top.size(), std::move(progress));
        co_await graph.detach(std::move(*from));
    } else {
        done = std::unexpected(std::move(from).error());
    }
    co_await graph.detach(std::move(to));
    co_return done;
}

Task<Result<>> empty(Graph& graph, Node& top) {
    DrainedNode drained(graph, top);
    CO_CHECK(co_await drained.begin());
    Result<> done = co_await top.image_operations()->make_empty();
    if (done) {
        Request rq = Request::internal();
        done = co_await top.flush(rq);
    }
    co_await drained.end();
    co_return done;
}

}  // namespace

Task<Result<>> commit_image(Graph& graph, Node& given, bool empty_top, Progress progress) {
    const std::shared_ptr<Node> top = given.shared_from_this();
    const Child* edge = top->child("backing");
    if (!edge) co_return fail(ErrorKind::kInvalid, "Image of node '{}' does not have a backing file", top->name());
    const std::shared_ptr<Node> backing = edge->node;
    if (empty_top && !top->image_operations()) {
        co_return fail(ErrorKind::kUnsupported,
                       "Block format '{}' used by node '{}' does not support being emptied; commit it without",
                       top->driver(), top->name());
    }
    if (empty_top && top->read_only()) {
        co_return fail(ErrorKind::kReadOnly, "Image is read-only; node '{}' cannot be emptied after the commit",
                       top->name());
    }
    const bool reopen = backing->read_only();
    std::vector<json::object> before = reopen_chain(*backing);
    if (reopen) {
        std::vector<json::object> writable = before;
        writable.front()["read-only"] = false;
        writable.front().erase("auto-read-only");
        CO_CHECK(co_await graph.reopen(std::move(writable)));
    }
    Result<> done = co_await commit_between(graph, *top, *backing, std::move(progress));
    if (reopen) {
        Result<> back = co_await graph.reopen(std::move(before));
        if (!back) {
            log::error("node '{}': stays writable after the commit: {}", backing->name(), back.error().message());
            if (done) done = std::move(back);
        }
    }
    if (done && empty_top) done = co_await empty(graph, *top);
    co_return done;
}

}  // namespace gantry::block
