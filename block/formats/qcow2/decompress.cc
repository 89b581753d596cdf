#include "block/formats/qcow2/decompress.h"

#include <libdeflate.h>
#include <zlib.h>
#include <zstd.h>

#include <memory>

namespace gantry::block::qcow2 {

namespace {

// Each decoder first tries the quick call of its library, which wants whole and exact streams (as almost all are). What
// that does not like is judged by the slow one, which can tell how far it came. Contexts are kept for each thread:
// making one costs as much as decoding a small cluster.

bool inflate_whole(std::span<const uint8_t> blob, std::span<uint8_t> cluster) {
    static thread_local const std::unique_ptr<libdeflate_decompressor, void (*)(libdeflate_decompressor*)> decoder(
        libdeflate_alloc_decompressor(), libdeflate_free_decompressor);
    if (!decoder) return false;
    size_t read = 0, written = 0;
    return libdeflate_deflate_decompress_ex(decoder.get(), blob.data(), blob.size(), cluster.data(), cluster.size(),
                                            &read, &written) == LIBDEFLATE_SUCCESS &&
           written == cluster.size();
}

bool decode_zstd_whole(std::span<const uint8_t> blob, std::span<uint8_t> cluster) {
    static thread_local const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> context(ZSTD_createDCtx(),
                                                                                         ZSTD_freeDCtx);
    const size_t frame = ZSTD_findFrameCompressedSize(blob.data(), blob.size());
    if (!context || ZSTD_isError(frame)) return false;
    return ZSTD_decompressDCtx(context.get(), cluster.data(), cluster.size(), blob.data(), frame) == cluster.size();
}

Result<> inflate_raw(std::span<const uint8_t> blob, std::span<uint8_t> cluster) {
    if (inflate_whole(blob, cluster)) return {};
    z_stream stream{};
    // Writers keep to a 4 KiB window; a reader may as well accept the largest.
    if (inflateInit2(&stream, -15) != Z_OK) return fail(ErrorKind::kNoMemory, "no memory for a decompressor");
    stream.next_in = const_cast<Bytef*>(blob.data());
    stream.avail_in = static_cast<uInt>(blob.size());
    stream.next_out = cluster.data();
    stream.avail_out = static_cast<uInt>(cluster.size());
    const int rc = inflate(&stream, Z_FINISH);
    const size_t missing = stream.avail_out;
    inflateEnd(&stream);
    if (missing == 0 && (rc == Z_STREAM_END || rc == Z_BUF_ERROR || rc == Z_OK)) return {};
    if (rc == Z_DATA_ERROR || rc == Z_NEED_DICT) {
        return fail(ErrorKind::kCorrupt, "invalid deflate stream after {} of {} bytes", cluster.size() - missing,
                    cluster.size());
    }
    return fail(ErrorKind::kCorrupt, "deflate stream ends after {} of {} bytes", cluster.size() - missing,
                cluster.size());
}

Result<> decode_zstd(std::span<const uint8_t> blob, std::span<uint8_t> cluster) {
    if (decode_zstd_whole(blob, cluster)) return {};
    const std::unique_ptr<ZSTD_DCtx, size_t (*)(ZSTD_DCtx*)> context(ZSTD_createDCtx(), ZSTD_freeDCtx);
    if (!context) return fail(ErrorKind::kNoMemory, "no memory for a decompressor");
    // The frame's header chooses the window; 8 MiB is four times the largest cluster.
    ZSTD_DCtx_setParameter(context.get(), ZSTD_d_windowLogMax, 23);
    ZSTD_inBuffer in{blob.data(), blob.size(), 0};
    ZSTD_outBuffer out{cluster.data(), cluster.size(), 0};
    while (out.pos < out.size) {
        const size_t in_before = in.pos;
        const size_t out_before = out.pos;
        const size_t rc = ZSTD_decompressStream(context.get(), &out, &in);
        if (ZSTD_isError(rc)) {
            return fail(ErrorKind::kCorrupt, "invalid zstd frame after {} of {} bytes: {}", out.pos, out.size,
                        ZSTD_getErrorName(rc));
        }
        if (out.pos == out.size) break;
        if (rc == 0 || (in.pos == in_before && out.pos == out_before)) {
            return fail(ErrorKind::kCorrupt, "zstd frame ends after {} of {} bytes", out.pos, out.size);
        }
    }
    return {};
}

}  // namespace

Result<> decompress(Compression type, std::span<const uint8_t> blob, std::span<uint8_t> cluster) {
    return type == Compression::kZstd ? decode_zstd(blob, cluster) : inflate_raw(blob, cluster);
}

}  // namespace gantry::block::qcow2
