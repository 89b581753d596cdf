#include "block/formats/qcow2/session_mark.h"

#include <algorithm>

#include "block/formats/qcow2/be.h"

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kHeadBytes = 8;
constexpr uint64_t kSessionBytes = 16;
constexpr uint64_t kWholeBytes = kHeadBytes + kSessionBytes;
constexpr uint64_t kFeatureRowBytes = 48;

void put(uint8_t* at, const SessionExtension& session) {
    store_be32(at, kExtensionSession);
    store_be32(at + 4, kSessionBytes);
    store_be64(at + kHeadBytes, session.session);
    store_be64(at + kHeadBytes + 8, session.flags);
}

/// The list ends behind `at`, by a mark or with the space.
void put_end(std::span<uint8_t> cluster, uint64_t at, uint64_t end) {
    std::fill_n(cluster.data() + at, std::min(kHeadBytes, end - at), uint8_t{0});
}

}  // namespace

bool put_session(std::span<uint8_t> cluster, const Header& header, const SessionExtension& session) {
    const uint64_t end = std::min<uint64_t>(header.extensions_end(), cluster.size());
    uint64_t at = header.header_length, last_at = 0, last_bytes = 0;
    uint32_t last_type = kExtensionEnd;
    if (at > end) return false;
    while (end - at >= kHeadBytes) {
        const uint32_t type = load_be32(cluster.data() + at);
        const uint64_t bytes = load_be32(cluster.data() + at + 4);
        if (type == kExtensionEnd) break;
        if (bytes > end - at - kHeadBytes) return false;
        if (type == kExtensionSession && bytes == kSessionBytes) {
            put(cluster.data() + at, session);
            return true;
        }
        last_at = at;
        last_type = type;
        last_bytes = bytes;
        const uint64_t padded = kHeadBytes + ((bytes + 7) & ~uint64_t{7});
        if (padded > end - at) return false;
        at += padded;
    }
    if (end - at >= kWholeBytes) {
        put(cluster.data() + at, session);
        put_end(cluster, at + kWholeBytes, end);
        return true;
    }
    if (last_type != kExtensionFeatureTable || last_bytes < kFeatureRowBytes || last_bytes % kFeatureRowBytes != 0) {
        return false;
    }
    store_be32(cluster.data() + last_at + 4, static_cast<uint32_t>(last_bytes - kFeatureRowBytes));
    at -= kFeatureRowBytes;
    put(cluster.data() + at, session);
    put_end(cluster, at + kWholeBytes, end);
    return true;
}

}  // namespace gantry::block::qcow2
