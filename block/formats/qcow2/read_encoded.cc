// Reading compressed clusters.

#include "block/formats/qcow2/qcow2_node.h"
#include "runtime/blocking_pool.h"

namespace gantry::block::qcow2 {

Task<Result<Buffer>> Qcow2Node::read_blob(Request& rq, uint64_t host, uint64_t bytes) {
    const uint64_t file_size = file().size();
    if (host >= file_size) {
        co_return std::unexpected(
            corrupt(fmt::format("Compressed cluster at {:#x} lies beyond the end of the file {:#x}", host, file_size),
                    host, bytes));
    }
    // The last sector of a blob need not be whole.
    Buffer blob = Buffer::alloc(std::min(bytes, file_size - host));
    const iovec iov = blob.iov();
    if (file().try_read(rq, host, IoVec(iov)) == 0) co_return std::move(blob);
    Result<> read = co_await file().read(rq, host, IoVec(iov));
    if (!read) {
        co_return std::unexpected(std::move(read).error().context(
            fmt::format("node '{}': reading {} bytes of a compressed cluster at {:#x}", name(), blob.size(), host)));
    }
    co_return std::move(blob);
}

Task<Result<>> Qcow2Node::decode(Request& rq, const Extent& extent, std::span<uint8_t> cluster) {
    const uint64_t host = extent.offset;
    const uint64_t bytes = extent.cookie;
    CO_TRY(Buffer blob, co_await read_blob(rq, host, bytes));
    const auto type = static_cast<Compression>(image_.header.compression_type);
    Result<> decoded = co_await run_blocking([&] { return decompress(type, blob.span(), cluster); });
    decodes_.fetch_add(1, std::memory_order_relaxed);
    if (decoded) co_return decoded;
    if (decoded.error().kind() != ErrorKind::kCorrupt) co_return decoded;
    co_return std::unexpected(
        corrupt(fmt::format("Compressed cluster at {:#x} cannot be decoded: {}", host, decoded.error().message()), host,
                bytes));
}

Task<Result<>> Qcow2Node::read_encoded(Request& rq, const Extent& extent, uint64_t offset, IoVec iov) {
    const Extent blob = extent;
    const uint64_t in_cluster = geometry().offset_in_cluster(offset);
    const uint64_t cluster_bytes = geometry().cluster_size();
    if (in_cluster == 0 && iov.count == 1 && iov.bytes == cluster_bytes) {
        // All of it, into one place: nobody will ask for the rest.
        co_await decode_slots_.acquire();
        Result<> decoded =
            co_await decode(rq, blob, {static_cast<uint8_t*>(iov.data[0].iov_base), iov.data[0].iov_len});
        decode_slots_.release();
        co_return decoded;
    }
    bool mine = false;
    const std::shared_ptr<DecodedClusters::Entry> entry = decoded_.find_or_begin(blob.offset, mine);
    if (mine) {
        co_await decode_slots_.acquire();
        entry->data = Buffer::alloc(cluster_bytes);
        Result<> decoded = co_await decode(rq, blob, entry->data.span());
        if (!decoded) entry->error = std::move(decoded).error();
        decode_slots_.release();
        decoded_.finish(entry);
    } else {
        co_await entry->done.wait();
    }
    if (entry->error) co_return std::unexpected(*entry->error);
    copy_to_iovec(iov, 0, entry->data.data() + in_cluster, iov.bytes);
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
