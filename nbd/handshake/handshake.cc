#include "nbd/handshake/handshake.h"

#include <fmt/format.h>

#include <algorithm>

#include "nbd/handshake/options.h"
#include "nbd/handshake/payload.h"

namespace gantry::nbd {

void OptionOutput::reply(uint32_t type, std::span<const uint8_t> payload) {
    uint8_t header[kOptionReplySize];
    encode_option_reply(header, option_, type, static_cast<uint32_t>(payload.size()));
    raw(header);
    raw(payload);
}

void OptionOutput::error(uint32_t type, std::string_view text) {
    text = text.substr(0, kMaxString);
    reply(type, {reinterpret_cast<const uint8_t*>(text.data()), text.size()});
}

bool Handshake::client_flags(uint32_t flags) {
    if (flags & ~uint32_t{kFlagFixedNewstyle | kFlagNoZeroes}) return false;
    fixed_ = flags & kFlagFixedNewstyle;
    no_zeroes_ = flags & kFlagNoZeroes;
    return true;
}

/// TLS required and not there: nothing but STARTTLS and ABORT is listened to, and nothing is told.
bool Handshake::refuse_in_the_clear(uint32_t number, OptionOutput& output, HandshakeStep& step) const {
    if (tls_ != TlsMode::kRequired || secure_ || number == kOptStartTls || number == kOptAbort) return false;
    step = HandshakeStep::kClose;
    if (number == kOptExportName) return true;
    output.error(kRepErrTlsRequired, fmt::format("Option {:#x} not permitted before TLS", number));
    step = HandshakeStep::kContinue;
    return true;
}

HandshakeStep Handshake::option(uint32_t number, std::span<const uint8_t> payload, std::vector<uint8_t>& out) {
    // Without C_FIXED_NEWSTYLE the client cannot read option replies.
    if (!fixed_ && number != kOptExportName) return HandshakeStep::kClose;
    OptionOutput output(number, out);
    if (HandshakeStep step{}; refuse_in_the_clear(number, output, step)) return step;
    for (const OptionRow& row : kOptionTable) {
        if (row.number == number) return row.handle(*this, payload, output);
    }
    output.error(kRepErrUnsup, "option not known here");
    return HandshakeStep::kContinue;
}

HandshakeStep Handshake::oversized_option(uint32_t number, std::vector<uint8_t>& out) {
    if (!fixed_ || number == kOptExportName) return HandshakeStep::kClose;
    OptionOutput output(number, out);
    if (number == kOptAbort) {
        output.ack();
        return HandshakeStep::kClose;
    }
    if (HandshakeStep step{}; refuse_in_the_clear(number, output, step)) return step;
    const bool known = std::ranges::any_of(kOptionTable, [&](const OptionRow& row) { return row.number == number; });
    // A failed SET_META_CONTEXT drops the earlier selection too.
    if (number == kOptSetMetaContext) selection_.clear();
    output.error(known ? kRepErrTooBig : kRepErrUnsup, known ? "option payload too long" : "option not known here");
    return HandshakeStep::kContinue;
}

uint16_t Handshake::transmission_flags(std::string_view name, const ExportFacts& facts) const {
    uint16_t flags = facts.flags;
    if (structured()) flags |= kSendDf;
    const bool contexts = selected(name, facts) && !selection_.contexts.empty();
    if (extended_ && contexts) flags |= kBlockStatusPayload;
    return flags;
}

HandshakeStep Handshake::enter(std::string export_name) {
    result_.structured = structured();
    result_.extended = extended_;
    const auto facts = exports_.find(export_name);
    if (facts && selected(export_name, *facts)) result_.contexts = selection_.contexts;
    result_.export_name = std::move(export_name);
    return HandshakeStep::kEnter;
}

}  // namespace gantry::nbd
