// Storing a cluster compressed (spec/qcow2.md section 4).

#include <cerrno>
#include <cstring>

#include "block/formats/qcow2/compress.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "runtime/blocking_pool.h"

namespace gantry::block::qcow2 {

namespace {

std::span<const uint8_t> flat(const IoVec& iov) {
    return {static_cast<const uint8_t*>(iov.data[0].iov_base), iov.data[0].iov_len};
}

}  // namespace

Task<Result<>> Qcow2Node::write_compressed(Request& rq, uint64_t offset, IoVec iov) {
    CO_CHECK(check_writable());
    const Geometry& g = geometry();
    if (g.external_data || cipher_) {
        // Not to be written plainly instead: who asked for a small image would get a large one unawares.
        co_return std::unexpected(Error(ErrorKind::kInvalid,
                                        fmt::format("node '{}': images with {} hold no compressed clusters", name(),
                                                    g.external_data ? "an external data file" : "encryption"),
                                        ENOTSUP));
    }
    const uint64_t cs = g.cluster_size();
    co_await encode_slots_.acquire();
    Result<std::optional<Buffer>> blob = co_await encode(iov, cs);
    encode_slots_.release();
    if (!blob) co_return std::unexpected(std::move(blob).error());
    if (!*blob)
        co_return fail(ErrorKind::kUnsupported, "node '{}': the cluster at {} does not get smaller", name(), offset);

    Metadata& m = *metadata_;
    if (!m.in_session()) CO_CHECK(co_await m.begin_session());
    const uint64_t bytes = (*blob)->size();
    uint64_t host = 0;
    {
        auto guard = co_await m.mutex().lock();
        CO_TRY(host, co_await m.allocator().allocate_bytes(bytes));
    }
    bool linked = false;
    Result<> written = co_await write_blob(rq, host, (*blob)->span());
    if (written) written = co_await link_blob(offset, host, bytes, &linked);
    if (!linked) m.free_later(host, bytes, FreedBy::kNeverDiscard);
    co_return written;
}

/// Nothing when it would not become smaller than the cluster.
Task<Result<std::optional<Buffer>>> Qcow2Node::encode(IoVec iov, uint64_t cluster_bytes) {
    CO_TRY(Buffer out, Buffer::try_alloc(cluster_bytes - 1));
    Buffer copy;
    std::span<const uint8_t> cluster;
    if (iov.count == 1 && iov.bytes == cluster_bytes) {
        cluster = flat(iov);
    } else {
        CO_TRY(copy, Buffer::try_alloc(cluster_bytes));
        copy_from_iovec(iov, 0, copy.data(), iov.bytes);
        std::memset(copy.data() + iov.bytes, 0, cluster_bytes - iov.bytes);  // beyond the end of the disk
        cluster = copy.span();
    }
    const auto type = static_cast<Compression>(image_.header.compression_type);
    const std::optional<size_t> used = co_await run_blocking([&] { return compress(type, cluster, out.span()); });
    if (!used || *used == 0) co_return std::optional<Buffer>();
    Buffer blob = Buffer::alloc(*used);
    std::memcpy(blob.data(), out.data(), *used);
    co_return std::optional<Buffer>(std::move(blob));
}

Task<Result<>> Qcow2Node::write_blob(Request& rq, uint64_t host, std::span<const uint8_t> blob) {
    CO_CHECK(co_await check_place(host, blob.size()));
    // A blob that lay there before is not to be found any more.
    decoded_.forget(host);
    const iovec iov{const_cast<uint8_t*>(blob.data()), blob.size()};
    co_return co_await file().write(rq, host, IoVec(iov));
}

/// `linked`: an entry names the blob, whatever the outcome.
Task<Result<>> Qcow2Node::link_blob(uint64_t offset, uint64_t host, uint64_t bytes, bool* linked) {
    const Geometry& g = geometry();
    const Entry entry{.word = compressed_word(g, host, bytes)};
    if (entry.word == 0) {
        co_return fail(ErrorKind::kTooLarge, "node '{}': a compressed cluster at {:#x} is beyond what an entry can say",
                       name(), host);
    }
    CO_TRY(L2SliceCache::Pin pin, co_await pin_for_change(offset));
    const Entry old = entry_in(pin, offset);
    const Damage damage = describe_entry(g, old.word, old.bitmap, offset).damage;
    if (damage != Damage::kNone) co_return std::unexpected(co_await damaged_for_write(offset, old, damage));
    // A blob that was torn by a power cut is nothing at all.
    metadata_->need_barrier();
    const uint64_t words[] = {entry.word, entry.bitmap};
    const bool logged = store_entries(pin, offset, std::span(words).first(entry_words()));
    *linked = true;
    free_place(old, FreedBy::kNeverDiscard);
    pin.release();
    if (!logged) CO_CHECK(co_await metadata_->write_back());
    kick_write_back();
    co_return Result<>();
}

}  // namespace gantry::block::qcow2
