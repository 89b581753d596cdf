#include "block/formats/qcow2/compress.h"

#include <zlib.h>
#include <zstd.h>

#include <memory>

namespace gantry::block::qcow2 {

namespace {

constexpr int kDeflateWindowBits = -12;  // raw, 4 KiB
constexpr int kDeflateMemory = 9;

std::optional<size_t> deflate_raw(std::span<const uint8_t> cluster, std::span<uint8_t> blob) {
    z_stream stream{};
    if (deflateInit2(&stream, Z_DEFAULT_COMPRESSION, Z_DEFLATED, kDeflateWindowBits, kDeflateMemory,
                     Z_DEFAULT_STRATEGY) != Z_OK) {
        return std::nullopt;
    }
    stream.next_in = const_cast<Bytef*>(cluster.data());
    stream.avail_in = static_cast<uInt>(cluster.size());
    stream.next_out = blob.data();
    stream.avail_out = static_cast<uInt>(blob.size());
    const int rc = deflate(&stream, Z_FINISH);
    const size_t used = blob.size() - stream.avail_out;
    deflateEnd(&stream);
    if (rc != Z_STREAM_END) return std::nullopt;
    return used;
}

std::optional<size_t> encode_zstd(std::span<const uint8_t> cluster, std::span<uint8_t> blob) {
    const std::unique_ptr<ZSTD_CCtx, size_t (*)(ZSTD_CCtx*)> context(ZSTD_createCCtx(), ZSTD_freeCCtx);
    if (!context) return std::nullopt;
    const size_t used = ZSTD_compress2(context.get(), blob.data(), blob.size(), cluster.data(), cluster.size());
    if (ZSTD_isError(used)) return std::nullopt;
    return used;
}

}  // namespace

std::optional<size_t> compress(Compression type, std::span<const uint8_t> cluster, std::span<uint8_t> blob) {
    return type == Compression::kZstd ? encode_zstd(cluster, blob) : deflate_raw(cluster, blob);
}

}  // namespace gantry::block::qcow2
