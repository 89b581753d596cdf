// The option phase on arbitrary bytes: client flags, whose highest two bits choose the TLS mode of the server, then
// options as they would arrive.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "nbd/handshake/handshake.h"

namespace {

using namespace gantry::nbd;

struct Exports final : ExportDirectory {
    std::optional<ExportFacts> find(std::string_view name) const override {
        if (name == "disk") return ExportFacts{"disk", "a disk", 1u << 20, kHasFlags, 1, 4096, kMaxPayload, contexts};
        if (name.empty()) return ExportFacts{"", "", 1000, kHasFlags | kReadOnly, 512, 4096, kMaxPayload};
        return std::nullopt;
    }
    std::shared_ptr<const ContextList> contexts =
        std::make_shared<const ContextList>(ContextList{{ContextKind::kBaseAllocation, "base:allocation", 1},
                                                        {ContextKind::kAllocationDepth, "qemu:allocation-depth", 2},
                                                        {ContextKind::kDirtyBitmap, "qemu:dirty-bitmap:b", 3},
                                                        {ContextKind::kDirtyBitmap, "qemu:dirty-bitmap:b:c", 4}});
    std::vector<Listed> list() const override { return {{"disk", "a disk"}, {"", ""}}; }
};

void expect(bool condition) {
    if (!condition) std::abort();
}

/// Whole option replies with the option's number, the last one final.
void check_replies(const std::vector<uint8_t>& out, uint32_t option) {
    uint32_t last = 0;
    for (size_t at = 0; at < out.size();) {
        expect(out.size() - at >= kOptionReplySize);
        expect(load_big<uint64_t>(&out[at]) == kOptionReplyMagic);
        expect(load_big<uint32_t>(&out[at + 8]) == option);
        const uint32_t type = load_big<uint32_t>(&out[at + 12]);
        const uint32_t size = load_big<uint32_t>(&out[at + 16]);
        expect(size <= out.size() - at - kOptionReplySize);
        expect(last != kRepAck && !(last & 0x80000000));
        last = type;
        at += kOptionReplySize + size;
    }
    expect(last == kRepAck || (last & 0x80000000));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    const Exports exports;
    if (size < kClientFlagsSize) return 0;
    constexpr TlsMode kModes[] = {TlsMode::kNone, TlsMode::kOptional, TlsMode::kRequired, TlsMode::kNone};
    const TlsMode mode = kModes[data[0] >> 6];
    Handshake handshake(exports, mode);
    const uint32_t flags = load_big<uint32_t>(data) & 0x3fffffff;
    if (!handshake.client_flags(flags)) return 0;
    size_t at = kClientFlagsSize;
    std::vector<uint8_t> out;
    while (size - at >= kOptionHeaderSize) {
        const OptionHeader header = decode_option(data + at);
        at += kOptionHeaderSize;
        if (header.magic != kOptionMagic || header.length > kMaxSkippedOption) break;
        out.clear();
        HandshakeStep step;
        if (header.length > kMaxOptionPayload) {
            step = handshake.oversized_option(header.option, out);
        } else {
            if (header.length > size - at) break;
            // A copy of its own: one byte read beyond the payload is seen.
            const std::vector<uint8_t> payload(data + at, data + at + header.length);
            at += header.length;
            step = handshake.option(header.option, payload, out);
        }
        const bool answers = header.option != kOptExportName && (flags & kFlagFixedNewstyle);
        if (answers) check_replies(out, header.option);
        if (step == HandshakeStep::kEnter) {
            const Negotiated& result = handshake.result();
            expect(exports.find(result.export_name).has_value());
            expect(result.contexts.empty() || result.structured);
            expect(result.structured || !result.extended);
            expect(!result.extended || header.option == kOptGo);
            expect(mode != TlsMode::kRequired || handshake.secure());
            expect(std::ranges::is_sorted(result.contexts, {}, &MetaContext::id));
            break;
        }
        if (step == HandshakeStep::kClose) break;
        if (step == HandshakeStep::kStartTls) {
            handshake.enter_tls();
            expect(!handshake.structured() && handshake.selection().contexts.empty());
        }
    }
    return 0;
}
