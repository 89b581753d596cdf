#include "fuse/init.h"

#include <algorithm>
#include <cerrno>

namespace gantry::fuse {

namespace {

constexpr uint32_t kPage = 4096;
constexpr uint32_t kPagesWithoutMaxPages = 32;
/// Reads and writes that the kernel has under way by itself (direct asynchronous ones, read-ahead).
constexpr uint16_t kMaxBackground = 1024;

uint64_t wanted_flags(const InitWishes& wishes) {
    uint64_t flags = kAsyncRead | kAtomicOTrunc | kBigWrites | kAsyncDio | kAbortError | kMaxPages | kInitExt |
                     kDirectIoAllowMmap | kNoExportSupport | kHasResend;
    if (wishes.cached) flags |= kAutoInvalData;
    if (wishes.passthrough) flags |= kPassthrough;
    if (wishes.io_uring) flags |= kOverIoUring;
    return flags;
}

std::optional<uint64_t> number(const json::object& from, std::string_view key, uint64_t limit) {
    const json::value* value = from.if_contains(key);
    if (!value) return std::nullopt;
    boost::system::error_code failed;
    const auto n = value->to_number<uint64_t>(failed);
    if (failed || n > limit) return std::nullopt;
    return n;
}

}  // namespace

json::object Negotiated::save() const {
    return {{"minor", minor},
            {"flags", flags},
            {"max-write", max_write},
            {"max-readahead", max_readahead},
            {"max-background", max_background}};
}

Result<Negotiated> Negotiated::load(const json::object& saved) {
    const auto minor = number(saved, "minor", kMinor);
    const auto flags = number(saved, "flags", UINT64_MAX);
    const auto max_write = number(saved, "max-write", kMaxWrite);
    const auto max_readahead = number(saved, "max-readahead", UINT32_MAX);
    const auto max_background = number(saved, "max-background", UINT16_MAX);
    if (!minor || !flags || !max_write || !max_readahead || !max_background || *minor < kOldestMinor ||
        *max_write < kPage) {
        return fail(ErrorKind::kInvalid, "what was saved about a FUSE mount does not tell what was agreed on");
    }
    return Negotiated{.minor = static_cast<uint32_t>(*minor),
                      .flags = *flags,
                      .max_write = static_cast<uint32_t>(*max_write),
                      .max_readahead = static_cast<uint32_t>(*max_readahead),
                      .max_background = static_cast<uint16_t>(*max_background)};
}

InitIn parse_init(std::span<const uint8_t> args) {
    InitIn in;
    std::memcpy(&in, args.data(), std::min(args.size(), sizeof in));
    return in;
}

InitAnswer negotiate(const InitIn& in, const InitWishes& wishes) {
    InitAnswer answer;
    InitOut& out = answer.out;
    out.major = kMajor;
    out.minor = kMinor;
    if (in.major > kMajor) {
        // Says our version; the kernel repeats INIT in its words.
        answer.out_size = kCompatInitOut;
        return answer;
    }
    if (in.major < kMajor || in.minor < kOldestMinor) {
        answer.error = EPROTO;
        return answer;
    }

    uint64_t offered = in.flags;
    if (offered & kInitExt) offered |= uint64_t{in.flags2} << 32;
    Negotiated agreed;
    agreed.minor = std::min(in.minor, kMinor);
    agreed.flags = wanted_flags(wishes) & offered;
    uint32_t pages = (std::clamp(wishes.max_write, kPage, kMaxWrite)) / kPage;
    if (!agreed.has(kMaxPages)) pages = std::min(pages, kPagesWithoutMaxPages);
    agreed.max_write = pages * kPage;
    agreed.max_readahead = in.max_readahead;
    agreed.max_background = kMaxBackground;

    out.minor = agreed.minor;
    out.flags = static_cast<uint32_t>(agreed.flags);
    out.flags2 = static_cast<uint32_t>(agreed.flags >> 32);
    out.max_readahead = agreed.max_readahead;
    out.max_background = agreed.max_background;
    out.congestion_threshold = static_cast<uint16_t>(agreed.max_background / 4 * 3);
    out.max_write = agreed.max_write;
    out.time_gran = 1;
    out.max_pages = static_cast<uint16_t>(pages);
    out.max_stack_depth = agreed.has(kPassthrough) ? 1 : 0;
    answer.out_size = sizeof out;
    answer.agreed = agreed;
    return answer;
}

}  // namespace gantry::fuse
