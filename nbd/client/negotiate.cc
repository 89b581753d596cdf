#include "nbd/client/negotiate.h"

#include <algorithm>
#include <array>
#include <bit>
#include <vector>

#include "block/align.h"

namespace gantry::nbd::client {

namespace {

/// Replies to one option, intermediate ones included; a server that says more is not believed.
constexpr unsigned kMaxReplies = 1024;
/// Longer replies are none of the protocol's.
constexpr uint32_t kMaxReply = 64u << 10;

std::string_view option_name(uint32_t option) {
    switch (option) {
        case kOptExportName:
            return "EXPORT_NAME";
        case kOptStartTls:
            return "STARTTLS";
        case kOptGo:
            return "GO";
        case kOptStructuredReply:
            return "STRUCTURED_REPLY";
        case kOptSetMetaContext:
            return "SET_META_CONTEXT";
        case kOptExtendedHeaders:
            return "EXTENDED_HEADERS";
        default:
            return "an option";
    }
}

std::string_view refusal_name(uint32_t type) {
    switch (type) {
        case kRepErrUnsup:
            return "it does not know it";
        case kRepErrPolicy:
            return "its policy forbids it";
        case kRepErrInvalid:
            return "it finds it invalid";
        case kRepErrPlatform:
            return "its platform cannot do it";
        case kRepErrTlsRequired:
            return "it requires TLS";
        case kRepErrUnknown:
            return "it has no such export";
        case kRepErrShutdown:
            return "it is shutting down";
        case kRepErrBlockSizeRequired:
            return "it insists on its block sizes";
        case kRepErrTooBig:
            return "the request is too big";
        case kRepErrExtHeaderRequired:
            return "it requires extended headers";
        default:
            return "for a reason that is unknown here";
    }
}

struct OptionAnswer {
    uint32_t type = 0;
    std::vector<uint8_t> payload;
    bool is_error() const { return type & 0x80000000; }
    std::string text() const { return printable({reinterpret_cast<const char*>(payload.data()), payload.size()}); }
};

/// "the server refuses GO: it has no such export (it says: no 'x' here)".
template <class... Args>
std::unexpected<Error> refused(uint32_t option, const OptionAnswer& answer, std::string_view hint = {}) {
    std::string text = fmt::format("the server refuses {}: {}", option_name(option), refusal_name(answer.type));
    if (!answer.payload.empty()) text += fmt::format(" (it says: {})", answer.text());
    if (!hint.empty()) text += fmt::format("; {}", hint);
    return std::unexpected(Error(ErrorKind::kIo, std::move(text)));
}

template <class... Args>
std::unexpected<Error> broken(fmt::format_string<Args...> format, Args&&... args) {
    return fail(ErrorKind::kCorrupt, "the server breaks the NBD protocol: {}",
                fmt::format(format, std::forward<Args>(args)...));
}

Error lost(std::string_view where, const Error& error) {
    return Error(ErrorKind::kIo, fmt::format("{} while {}", error.message(), where));
}

/// One negotiation; lives in the frame of negotiate().
class Negotiator {
  public:
    Negotiator(Transport& transport, const ClientConfig& config) : transport_(transport), config_(config) {}
    Task<Result<Negotiated>> run();

  private:
    Task<Result<>> greet();
    Task<Result<>> start_tls();
    Task<Result<>> choose_replies();
    Task<Result<>> choose_context();
    /// False: the server has no GO.
    Task<Result<bool>> go();
    Task<Result<>> export_name();
    Result<> take_info(std::span<const uint8_t> payload);
    Result<> check_result() const;

    Task<Result<>> send_option(uint32_t option, std::vector<uint8_t> payload);
    Task<Result<OptionAnswer>> receive_answer(uint32_t option);
    /// For options whose only answer is ACK or an error.
    Task<Result<OptionAnswer>> ask(uint32_t option);

    Transport& transport_;
    const ClientConfig& config_;
    uint16_t handshake_flags_ = 0;
    bool has_export_info_ = false, has_block_size_ = false;
    Negotiated out_;
};

template <class T>
void put(std::vector<uint8_t>& out, T value) {
    const size_t at = out.size();
    out.resize(at + sizeof value);
    store_big(out.data() + at, value);
}
void put_string(std::vector<uint8_t>& out, std::string_view text) {
    put(out, static_cast<uint32_t>(text.size()));
    out.insert(out.end(), text.begin(), text.end());
}

Task<Result<>> Negotiator::send_option(uint32_t option, std::vector<uint8_t> payload) {
    std::vector<uint8_t> message;
    put(message, kOptionMagic);
    put(message, option);
    put(message, static_cast<uint32_t>(payload.size()));
    message.insert(message.end(), payload.begin(), payload.end());
    Result<> sent = co_await transport_.send_all(message);
    if (!sent) co_return std::unexpected(lost(fmt::format("it was sent {}", option_name(option)), sent.error()));
    co_return Result<>();
}

Task<Result<OptionAnswer>> Negotiator::receive_answer(uint32_t option) {
    std::array<uint8_t, kOptionReplySize> header;
    Result<> got = co_await transport_.receive_all(header);
    if (!got) co_return std::unexpected(lost(fmt::format("it was to answer {}", option_name(option)), got.error()));
    if (load_big<uint64_t>(header.data()) != kOptionReplyMagic) {
        co_return broken("its answer to {} begins with a wrong magic number", option_name(option));
    }
    if (load_big<uint32_t>(header.data() + 8) != option) {
        co_return broken("it answers option {} when it was asked {}", load_big<uint32_t>(header.data() + 8),
                         option_name(option));
    }
    OptionAnswer answer;
    answer.type = load_big<uint32_t>(header.data() + 12);
    const auto length = load_big<uint32_t>(header.data() + 16);
    if (length > kMaxReply) {
        co_return broken("its answer to {} has {} bytes, more than {}", option_name(option), length, kMaxReply);
    }
    answer.payload.resize(length);
    got = co_await transport_.receive_all(answer.payload);
    if (!got) co_return std::unexpected(lost(fmt::format("it was to answer {}", option_name(option)), got.error()));
    co_return std::move(answer);
}

Task<Result<OptionAnswer>> Negotiator::ask(uint32_t option) {
    CO_CHECK(co_await send_option(option, {}));
    CO_TRY(OptionAnswer answer, co_await receive_answer(option));
    if (!answer.is_error() && answer.type != kRepAck) {
        co_return broken("its answer to {} is of type {}", option_name(option), answer.type);
    }
    if (answer.type == kRepAck && !answer.payload.empty()) {
        co_return broken("its ACK of {} has a payload", option_name(option));
    }
    co_return std::move(answer);
}

Task<Result<>> Negotiator::greet() {
    std::array<uint8_t, kGreetingSize> greeting;
    Result<> got = co_await transport_.receive_all(std::span(greeting).first(16));
    if (!got) co_return std::unexpected(lost("it was to greet", got.error()));
    if (load_big<uint64_t>(greeting.data()) != kNbdMagic) {
        co_return fail(ErrorKind::kCorrupt,
                       "what answers there is not an NBD server: its greeting has another magic "
                       "number");
    }
    constexpr uint64_t kOldstyleMagic = 0x0000420281861253;
    const auto magic = load_big<uint64_t>(greeting.data() + 8);
    if (magic == kOldstyleMagic) {
        co_return fail(ErrorKind::kUnsupported,
                       "the server speaks the oldstyle protocol, which has no export names and no TLS and is not "
                       "supported; start it with newstyle negotiation");
    }
    if (magic != kOptionMagic) co_return broken("its greeting has the magic number {:#x}", magic);
    got = co_await transport_.receive_all(std::span(greeting).subspan(16));
    if (!got) co_return std::unexpected(lost("it was to greet", got.error()));
    handshake_flags_ = load_big<uint16_t>(greeting.data() + 16);
    std::array<uint8_t, kClientFlagsSize> flags;
    store_big(flags.data(), uint32_t{handshake_flags_} & (kFlagFixedNewstyle | kFlagNoZeroes));
    Result<> sent = co_await transport_.send_all(flags);
    if (!sent) co_return std::unexpected(lost("it was greeted", sent.error()));
    co_return Result<>();
}

Task<Result<>> Negotiator::start_tls() {
    if (!(handshake_flags_ & kFlagFixedNewstyle)) {
        co_return fail(ErrorKind::kUnsupported,
                       "the server has no options and so no TLS; remove tls-creds to talk to it in the clear");
    }
    CO_TRY(const OptionAnswer answer, co_await ask(kOptStartTls));
    if (answer.is_error()) {
        co_return refused(kOptStartTls, answer, "give the server credentials, or remove tls-creds here");
    }
    Result<> secured = co_await transport_.start_tls(config_.tls->credentials(), config_.hostname());
    if (!secured) co_return std::unexpected(std::move(secured).error().context("TLS"));
    co_return Result<>();
}

Task<Result<>> Negotiator::choose_replies() {
    uint32_t option = kOptExtendedHeaders;
    CO_TRY(OptionAnswer answer, co_await ask(option));
    if (!answer.is_error()) {
        out_.extended = out_.structured = true;
        co_return Result<>();
    }
    if (answer.type != kRepErrTlsRequired) {
        option = kOptStructuredReply;
        CO_TRY(answer, co_await ask(option));
    }
    if (answer.type == kRepErrTlsRequired) co_return refused(option, answer, "give this node tls-creds");
    out_.structured = !answer.is_error();
    co_return Result<>();
}

Task<Result<>> Negotiator::choose_context() {
    std::vector<uint8_t> payload;
    put_string(payload, config_.export_name);
    put(payload, uint32_t{1});
    put_string(payload, config_.context);
    CO_CHECK(co_await send_option(kOptSetMetaContext, std::move(payload)));
    for (unsigned i = 0; i < kMaxReplies; ++i) {
        CO_TRY(const OptionAnswer answer, co_await receive_answer(kOptSetMetaContext));
        // Unknown, unsupported, or no such export: GO will tell.
        if (answer.is_error() || answer.type == kRepAck) co_return Result<>();
        if (answer.type != kRepMetaContext) {
            co_return broken("its answer to SET_META_CONTEXT is of type {}", answer.type);
        }
        if (answer.payload.size() < 4) co_return broken("a meta context has no number");
        const std::string_view name(reinterpret_cast<const char*>(answer.payload.data()) + 4,
                                    answer.payload.size() - 4);
        if (name != config_.context || out_.context_id) {
            co_return broken("it offers the meta context '{}' when it was asked for '{}' alone", printable(name),
                             config_.context);
        }
        out_.context_id = load_big<uint32_t>(answer.payload.data());
    }
    co_return broken("it does not stop answering SET_META_CONTEXT");
}

Result<> Negotiator::take_info(std::span<const uint8_t> payload) {
    if (payload.size() < 2) return broken("an information about the export has no type");
    const uint8_t* p = payload.data();
    switch (load_big<uint16_t>(p)) {
        case kInfoExport:
            if (payload.size() != 12) return broken("the size of the export comes in {} bytes", payload.size());
            out_.size = load_big<uint64_t>(p + 2);
            out_.flags = load_big<uint16_t>(p + 10);
            has_export_info_ = true;
            break;
        case kInfoBlockSize:
            if (payload.size() != 14) return broken("the block sizes come in {} bytes", payload.size());
            out_.min_block = load_big<uint32_t>(p + 2);
            out_.preferred_block = load_big<uint32_t>(p + 6);
            out_.max_payload = load_big<uint32_t>(p + 10);
            has_block_size_ = true;
            break;
        default:
            break;  // names, descriptions, and what may come
    }
    return {};
}

Task<Result<bool>> Negotiator::go() {
    std::vector<uint8_t> payload;
    put_string(payload, config_.export_name);
    put(payload, uint16_t{1});
    put(payload, static_cast<uint16_t>(kInfoBlockSize));
    CO_CHECK(co_await send_option(kOptGo, std::move(payload)));
    for (unsigned i = 0; i < kMaxReplies; ++i) {
        CO_TRY(const OptionAnswer answer, co_await receive_answer(kOptGo));
        if (answer.type == kRepInfo) {
            CO_CHECK(take_info(answer.payload));
        } else if (answer.type == kRepAck) {
            if (!has_export_info_) co_return broken("it goes on to transmission without the size of the export");
            co_return true;
        } else if (answer.type == kRepErrUnsup && !out_.extended) {
            out_ = {.structured = out_.structured, .context_id = out_.context_id};
            has_export_info_ = has_block_size_ = false;
            co_return false;
        } else if (answer.type == kRepErrUnknown) {
            std::string says = answer.payload.empty() ? "" : fmt::format(" (it says: {})", answer.text());
            co_return fail(ErrorKind::kNotFound, "Requested export not available; the server has no export '{}'{}",
                           config_.export_name, says);
        } else if (answer.is_error()) {
            co_return refused(kOptGo, answer, answer.type == kRepErrTlsRequired ? "give this node tls-creds" : "");
        } else {
            co_return broken("its answer to GO is of type {}", answer.type);
        }
    }
    co_return broken("it does not stop answering GO");
}

Task<Result<>> Negotiator::export_name() {
    std::vector<uint8_t> name(config_.export_name.begin(), config_.export_name.end());
    CO_CHECK(co_await send_option(kOptExportName, std::move(name)));
    constexpr size_t kZeroes = 124;
    std::array<uint8_t, 10 + kZeroes> answer;
    const size_t length = handshake_flags_ & kFlagNoZeroes ? 10 : answer.size();
    Result<> got = co_await transport_.receive_all(std::span(answer).first(length));
    if (!got) {
        co_return fail(ErrorKind::kNotFound, "Requested export not available; {} when it was asked for export '{}'",
                       got.error().message(), config_.export_name);
    }
    out_.size = load_big<uint64_t>(answer.data());
    out_.flags = load_big<uint16_t>(answer.data() + 8);
    co_return Result<>();
}

Result<> Negotiator::check_result() const {
    if (out_.size > block::kMaxOffset) {
        return fail(ErrorKind::kTooLarge, "the export has {} bytes, more than the {} that can be served", out_.size,
                    block::kMaxOffset);
    }
    if (config_.context_required && !out_.context_id) {
        return fail(ErrorKind::kNotFound,
                    "requested x-dirty-bitmap {} not found; the server offers no such meta "
                    "context for export '{}'",
                    config_.context, config_.export_name);
    }
    if (!has_block_size_) return {};
    if (!std::has_single_bit(out_.min_block) || out_.min_block > 65536) {
        return broken("{} is not a minimum block size", out_.min_block);
    }
    if (out_.size % out_.min_block != 0) {
        return fail(ErrorKind::kUnsupported,
                    "export length {} is not multiple of minimum block size {}; its last bytes could not be read",
                    out_.size, out_.min_block);
    }
    if (!std::has_single_bit(out_.preferred_block) || out_.preferred_block < out_.min_block) {
        return broken("{} is not a preferred block size where the minimum is {}", out_.preferred_block, out_.min_block);
    }
    if (out_.max_payload < out_.min_block) {
        return broken("its largest request, {}, is smaller than its smallest, {}", out_.max_payload, out_.min_block);
    }
    return {};
}

Task<Result<Negotiated>> Negotiator::run() {
    CO_CHECK(co_await greet());
    if (config_.tls) CO_CHECK(co_await start_tls());
    bool gone = false;
    if (handshake_flags_ & kFlagFixedNewstyle) {
        CO_CHECK(co_await choose_replies());
        if (out_.structured) CO_CHECK(co_await choose_context());
        CO_TRY(gone, co_await go());
    }
    if (!gone) CO_CHECK(co_await export_name());
    CO_CHECK(check_result());
    co_return out_;
}

}  // namespace

Task<Result<Negotiated>> negotiate(Transport& transport, const ClientConfig& config) {
    Negotiator negotiator(transport, config);
    auto result = co_await negotiator.run();
    co_return result;
}

Result<> check_same_export(const Negotiated& first, const Negotiated& now, bool writable) {
    const auto differs = [](std::string_view what) {
        return fail(ErrorKind::kInvalid, "the export is not the one that was opened: {}", what);
    };
    if (now.size != first.size) return differs(fmt::format("its size is {} instead of {}", now.size, first.size));
    if (writable && now.can(kReadOnly)) return differs("it is read-only now");
    if (first.context_id && !now.context_id) return differs("it has lost its meta context");
    if (first.extended && !now.extended) return differs("the server has no extended headers any more");
    // Without CAN_MULTI_CONN a flush of one connection says nothing about what others have written.
    for (const auto& [flag, name] :
         {std::pair{kSendFlush, "FLUSH"}, std::pair{kSendFua, "FUA"}, std::pair{kCanMultiConn, "CAN_MULTI_CONN"}}) {
        if (first.can(flag) && !now.can(flag)) return differs(fmt::format("the server has no {} any more", name));
    }
    if (now.min_block > std::max(first.min_block, 1u)) return differs("its smallest block has grown");
    if (now.max_payload != 0 &&
        now.max_payload < std::min(first.max_payload ? first.max_payload : kMaxPayload, kMaxPayload)) {
        return differs("its largest request has shrunk");
    }
    return {};
}

std::string printable(std::string_view text) {
    constexpr size_t kLongest = 200;
    std::string out(text.substr(0, kLongest));
    std::ranges::replace_if(out, [](char c) { return c < 0x20 || c > 0x7e; }, '?');
    if (text.size() > kLongest) out += "...";
    return out;
}

}  // namespace gantry::nbd::client
