#include "exports/vhost_user/session.h"

#include "exports/virtio/wait_report.h"
#include "runtime/log.h"
#include "runtime/timer.h"

namespace gantry::vhost_user {

namespace {

/// Requests in a row before others have their turn.
constexpr unsigned kTurnMessages = 16;
/// Refused requests of one front end that are logged.
constexpr unsigned kLoggedRefusals = 8;

/// The answer of a request without an answer of its own (REPLY_ACK).
constexpr uint64_t kDone = 0, kRefused = 1;

UniqueFd first_descriptor(Message& message) {
    return message.fds.empty() ? UniqueFd() : std::move(message.fds.front());
}

}  // namespace

Session::Session(Device& device, UniqueFd socket)
    : device_(device), connection_(std::move(socket)), rings_(device.queue_limit()) {}

Session::~Session() { CHECK(!any_running(), "a session ends with its queues stopped"); }

Task<void> Session::run() {
    unsigned served = 0;
    while (violation_.empty()) {
        Result<Message> message = co_await connection_.next();
        if (!message) {
            if (message.error().kind() != ErrorKind::kShutdown) violation_ = message.error().message();
            break;
        }
        const Result<> handled = co_await serve(std::move(*message));
        if (!handled) {
            if (handled.error().kind() != ErrorKind::kShutdown) violation_ = handled.error().message();
            break;
        }
        if (++served % kTurnMessages == 0) co_await sleep_for(std::chrono::nanoseconds(0));
    }
    ended_ = true;
    // What a front end waits for is the end of the connection; its requests may take their time.
    connection_.cut();
    virtio::WaitReport report([this](std::chrono::seconds passed) { report_wait(passed); });
    co_await stop_all();
    co_await report.over();
    backend_channel_.reset();
    log_.reset();
    inflight_.reset();
    memory_.reset();
}

void Session::cut() { connection_.cut(); }

Task<Result<>> Session::serve(Message message) {
    const uint32_t number = message.header.request;
    const bool needs_reply = message.needs_reply();
    const RequestRule* rule = rule_of(number);
    if (!rule && !needs_reply) co_return fail(ErrorKind::kInvalid, "it sent request {}, which is not served", number);
    if (rule) CO_CHECK(check_message(*rule, message));
    Answer answer = rule ? co_await handle_reported(*rule, std::move(message))
                         : Answer(fail(ErrorKind::kUnsupported, "request {} is not served", number));
    if (!answer) {
        const std::string text = std::move(answer).error().message();
        if (!needs_reply || (rule && rule->answered)) {
            co_return fail(ErrorKind::kInvalid, "{}: {}", rule ? rule->name : "it", text);
        }
        if (refusals_++ < kLoggedRefusals) {
            log::warn("export '{}': refused to front end {}: {}: {}", device_.id(), peer(),
                      rule ? rule->name : "a request", text);
        }
        co_return co_await connection_.send(encode_reply(number, bytes_of(kRefused)));
    }
    if (answer->sent) co_return co_await connection_.send(encode_reply(number, answer->payload), answer->fd);
    if (needs_reply) co_return co_await connection_.send(encode_reply(number, bytes_of(kDone)));
    co_return Result<>();
}

Task<Session::Answer> Session::handle_reported(const RequestRule& rule, Message message) {
    handling_ = rule.name;
    virtio::WaitReport report([this](std::chrono::seconds passed) { report_wait(passed); });
    Answer answer = co_await handle(std::move(message));
    co_await report.over();
    handling_ = {};
    co_return answer;
}

Task<Session::Answer> Session::handle(Message message) {
    const auto number = message.as<uint64_t>();
    const auto state = message.as<VringState>();
    Result<> done;
    switch (message.request()) {
        case Request::kGetFeatures:
            co_return reply(device_.blk().features() | kLogAll | kHasProtocolFeatures);
        case Request::kGetProtocolFeatures:
            co_return reply(kProtocolFeatures);
        case Request::kGetQueueNum:
            co_return reply(uint64_t{device_.queue_limit()});
        case Request::kGetMaxMemSlots:
            co_return reply(uint64_t{kMaxMemorySlots});
        case Request::kGetStatus:
            co_return reply(status());
        case Request::kGetConfig:
            co_return get_config(message);
        case Request::kGetInflightFd:
            co_return get_inflight(message);
        case Request::kGetVringBase:
            co_return co_await get_base(state);
        case Request::kSetFeatures:
            done = co_await set_features(number);
            break;
        case Request::kSetProtocolFeatures:
            done = set_protocol_features(number);
            break;
        case Request::kSetOwner:
        case Request::kSetLogFd:  // nobody waits for the log: whoever migrates looks at it by itself
            break;
        case Request::kResetOwner:
            co_await disable_all();
            break;
        case Request::kSetMemTable:
            done = co_await set_memory(std::move(message));
            break;
        case Request::kAddMemReg:
            done = co_await add_region(std::move(message));
            break;
        case Request::kRemMemReg:
            done = co_await remove_region(std::move(message));
            break;
        case Request::kSetLogBase: {
            const bool needs_reply = message.needs_reply();
            done = co_await set_log(std::move(message));
            // It is answered in any case; a refusal is told to whom asks for it.
            if (!done && !needs_reply) co_return std::unexpected(std::move(done).error());
            if (!done) log::warn("export '{}': SET_LOG_BASE: {}", device_.id(), done.error().message());
            co_return reply(done ? kDone : kRefused);
        }
        case Request::kSetVringNum:
            done = set_size(state);
            if (done) done = co_await start_if_ready(state.index);
            break;
        case Request::kSetVringBase:
            done = set_base(state);
            break;
        case Request::kSetVringAddr:
            done = co_await set_address(message.as<VringAddress>());
            break;
        case Request::kSetVringKick:
            done = co_await set_kick(number, first_descriptor(message));
            break;
        case Request::kSetVringCall:
            done = co_await set_call(number, first_descriptor(message));
            break;
        case Request::kSetVringErr:
            done = set_error(number, first_descriptor(message));
            break;
        case Request::kSetVringEnable:
            done = co_await set_enabled(state);
            break;
        case Request::kSetBackendReqFd:
            done = set_backend_channel(std::move(message));
            break;
        case Request::kSetConfig:
            done = co_await set_config(std::move(message));
            break;
        case Request::kSetInflightFd:
            done = set_inflight(std::move(message));
            break;
        case Request::kResetDevice:
            co_await reset();
            for (size_t i = 0; inflight_ && i < rings_.size(); ++i) inflight_->forget(i);
            // Not with a status of 0, which qemu before 8.1 sends whenever the machine is paused: the driver that has
            // switched the write cache off goes on without a flush.
            forget_config();
            break;
        case Request::kSetStatus:
            done = co_await set_status(number);
            break;
    }
    if (!done) co_return std::unexpected(std::move(done).error());
    co_return Reply();
}

Result<Session::RingState*> Session::ring(uint64_t index) {
    if (index >= rings_.size()) {
        return fail(ErrorKind::kInvalid, "there is no queue {}; at most {} are served", index, rings_.size());
    }
    return &rings_[index];
}

}  // namespace gantry::vhost_user
