// The option phase on arbitrary bytes: client flags, then options as they would arrive.

#include <cstdint>
#include <cstdlib>
#include <vector>

#include "nbd/handshake/handshake.h"

namespace {

using namespace gantry::nbd;

struct Exports final : ExportDirectory {
    std::optional<ExportFacts> find(std::string_view name) const override {
        if (name == "disk") return ExportFacts{"disk", "a disk", 1u << 20, kHasFlags, 1, 4096, kMaxPayload};
        if (name.empty()) return ExportFacts{"", "", 1000, kHasFlags | kReadOnly, 512, 4096, kMaxPayload};
        return std::nullopt;
    }
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
    Handshake handshake(exports);
    if (size < kClientFlagsSize) return 0;
    const uint32_t flags = load_big<uint32_t>(data);
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
            break;
        }
        if (step == HandshakeStep::kClose) break;
    }
    return 0;
}
