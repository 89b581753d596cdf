#include "nbd/session.h"

#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "nbd/tls/stream.h"
#include "runtime/io.h"

namespace gantry::nbd {

namespace {

/// The receive buffer: a queue of 32 small writes fits.
constexpr size_t kReceiveSize = 256u << 10;
/// A WRITE up to this size is collected in the receive buffer, a longer one gets memory of its own.
constexpr size_t kSmallWrite = 32u << 10;
/// recv window while large payloads come: at most so much of the next payload is copied.
constexpr size_t kHeaderWindow = 4096;
/// A turn of a connection; then others on this loop run.
constexpr uint32_t kTurnRequests = 64;
constexpr uint64_t kTurnBytes = 512u << 10;
/// Replies leave when so many requests were answered or so many bytes wait, though more requests are buffered: the
/// client works on them while we go on (docs/performance.md, "Where the time goes").
constexpr uint32_t kSendEveryRequests = 8;
constexpr size_t kSendEveryBytes = 32u << 10;
/// After so many requests that came alone the client is taken to have a queue depth of one; its next request is polled
/// for.
constexpr uint32_t kLoneRequests = 16;
constexpr std::chrono::microseconds kNextRequest{50};
/// No client gets a reply and sends its next request faster than this: what came sooner was on its way already, from a
/// deep queue.
constexpr std::chrono::microseconds kAnswerTime{8};
/// A client that leaves this much unread is not read from.
constexpr size_t kUnsentLimit = 1u << 20;

}  // namespace

Task<SessionResult> serve_session(int fd, block::Channel& channel, SessionConfig config, SessionCounters& counters) {
    Session session(fd, channel, std::move(config), counters);
    SessionResult result = co_await session.run();
    co_return result;
}

Session::Session(int fd, block::Channel& channel, SessionConfig config, SessionCounters& counters)
    : fd_(fd),
      channel_(channel),
      config_(std::move(config)),
      request_size_(config_.extended ? kExtendedRequestSize : kRequestSize),
      chunk_header_size_(config_.extended ? kExtendedChunkHeaderSize : kChunkHeaderSize),
      read_header_size_(config_.structured ? chunk_header_size_ + 8 : kSimpleReplySize),
      counters_(counters),
      window_(kReceiveSize) {
    CHECK(config_.structured || !config_.extended, "extended headers include structured replies");
    rules_.read_only = config_.read_only;
    rules_.structured = config_.structured;
    rules_.extended = config_.extended;
    rules_.has_contexts = !config_.contexts.empty();
}

Task<SessionResult> Session::run() {
    in_ = Buffer::alloc(kReceiveSize);
    writer_scope_.spawn(writer());
    co_await read_requests();
    // What was received is finished and answered, unless nobody is there to read it.
    if (result_.end == SessionEnd::kReset || result_.end == SessionEnd::kViolation) drop_connection();
    co_await requests_scope_.join();
    finishing_ = true;
    wake_writer();
    co_await writer_scope_.join();
    publish_counters();
    co_return result_;
}

Task<void> Session::read_requests() {
    while (!broken_) {
        reading_ = true;
        const Need need = process();
        reading_ = false;
        flush();
        switch (need) {
            case Need::kInput: {
                const bool go_on = co_await fill();
                if (!go_on) co_return;
                break;
            }
            case Need::kPayload: {
                const bool go_on = co_await receive_payload();
                if (!go_on) co_return;
                break;
            }
            case Need::kSkip: {
                const bool go_on = co_await skip_payload();
                if (!go_on) co_return;
                break;
            }
            case Need::kPause:
                // A timer, not the ready list: completions of others are reaped first.
                co_await pause_.until(Clock::time_point::min());
                turn_requests_ = 0;
                turn_bytes_ = 0;
                break;
            case Need::kRoom: {
                const RequestHeader next = decode_request(in_.data() + pos_, config_.extended);
                while (!broken_ && !has_room(next)) co_await room_.wait();
                break;
            }
            case Need::kResume:
                while (channel_.quiesced() && !broken_) co_await channel_.resumed();
                break;
            case Need::kEnd:
                co_return;
        }
    }
    result_.end = SessionEnd::kReset;
}

Session::Need Session::process() {
    rules_.size = channel_.size();
    rules_.good_bye = counters_.good_bye.load(std::memory_order_relaxed);
    const uint32_t magic = config_.extended ? kExtendedRequestMagic : kRequestMagic;
    uint32_t sent_at = turn_requests_;
    for (;;) {
        if (turn_requests_ - sent_at >= kSendEveryRequests || replies_.bytes() >= kSendEveryBytes) {
            sent_at = turn_requests_;
            flush();
        }
        const size_t available = end_ - pos_;
        if (available < request_size_) return Need::kInput;
        if (turn_requests_ >= kTurnRequests || turn_bytes_ >= kTurnBytes) return Need::kPause;
        const RequestHeader rq = decode_request(in_.data() + pos_, config_.extended);
        if (rq.magic != magic) {
            violation("a request has a wrong magic number");
            return Need::kEnd;
        }
        if (rq.command == kCmdDisc) {
            result_.end = SessionEnd::kDisconnect;
            return Need::kEnd;
        }
        if (channel_.quiesced()) return Need::kResume;
        if (!has_room(rq)) return Need::kRoom;
        if (has_payload(rq)) {
            Need need{};
            if (!start_payload(rq, available, need)) return need;
            continue;
        }
        pos_ += request_size_;
        ++requests_;
        ++turn_requests_;
        expect_next(pos_);
        dispatch(rq);
    }
}

/// Looks ahead at the header that may be at `at`: whatever it holds, it is only a hint.
void Session::expect_next(size_t at) const {
    if (at + request_size_ <= end_) channel_.expect(load_big<uint64_t>(in_.data() + at + 16));
}

void Session::dispatch(const RequestHeader& rq) {
    const Verdict verdict = check_request(rq, rules_);
    if (verdict.error != kWireOk) {
        reply_error(rq, verdict.error, verdict.reason);
        return;
    }
    switch (rq.command) {
        case kCmdRead:
            return read_now(rq);
        case kCmdFlush:
            return start(rq, do_flush(rq));
        case kCmdTrim:
            return start(rq, do_trim(rq));
        case kCmdCache:
            return start(rq, do_cache(rq));
        case kCmdWriteZeroes:
            return start(rq, do_write_zeroes(rq));
        default:
            return start(rq, do_block_status(rq, {}));
    }
}

bool Session::start_payload(const RequestHeader& rq, size_t available, Need& need) {
    if (rq.length > kMaxPayload) {
        // Its payload cannot be told from requests without reading it all: say why and leave.
        reply_error(rq, kWireInval, "longer than the maximum payload");
        result_ = {SessionEnd::kViolation, "a payload is longer than the maximum"};
        flush();
        need = Need::kEnd;
        return false;
    }
    Verdict verdict = check_request(rq, rules_);
    // Beyond what names every context once it cannot be right, and need not be kept.
    if (verdict.error == kWireOk && rq.command == kCmdBlockStatus &&
        rq.length > kStatusPayloadFixed + config_.contexts.size() * sizeof(uint32_t)) {
        verdict = {kWireInval, "more contexts than were negotiated"};
    }
    const size_t total = request_size_ + rq.length;
    if (available < total) {
        if (verdict.error == kWireOk && (rq.length <= kSmallWrite || rq.command == kCmdBlockStatus)) {
            need = Need::kInput;
            return false;
        }
        pos_ += request_size_;
        ++requests_;
        ++turn_requests_;
        pending_ = rq;
        pending_verdict_ = verdict;
        skip_left_ = rq.length;
        need = verdict.error == kWireOk ? Need::kPayload : Need::kSkip;
        return false;
    }
    const uint8_t* data = in_.data() + pos_ + request_size_;
    pos_ += total;
    ++requests_;
    ++turn_requests_;
    if (verdict.error != kWireOk) {
        reply_error(rq, verdict.error, verdict.reason);
    } else if (rq.command == kCmdWrite) {
        expect_next(pos_);
        write_now(rq, data);
    } else {
        status_with_payload(rq, data);
    }
    return true;
}

bool Session::has_room(const RequestHeader& rq) const {
    if (writer_busy_ && replies_.bytes() >= kUnsentLimit) return false;
    if (in_flight_ >= config_.max_in_flight) return false;
    const uint64_t used = in_flight_bytes_ + replies_.bytes();
    return used == 0 || used + cost(rq) <= config_.memory_limit;
}

bool Session::end_of_input(int result) {
    if (result > 0) return false;
    result_.end = result == 0 ? SessionEnd::kEof : SessionEnd::kReset;
    return true;
}

void Session::violation(std::string_view why) { result_ = {SessionEnd::kViolation, why}; }

Task<bool> Session::fill() {
    // At most a part of a small request is left: move it to the front.
    if (pos_ != 0) {
        std::memmove(in_.data(), in_.data() + pos_, end_ - pos_);
        end_ -= pos_;
        pos_ = 0;
    }
    const size_t wanted = end_ == 0 ? window_ : std::max(window_, kSmallWrite + request_size_);
    const size_t ask = std::min(kReceiveSize - end_, wanted);
    if (replies_.empty()) replies_.release_arena();
    ssize_t n = -EAGAIN;
    // With TLS, more may be decrypted than was asked for.
    if (more_expected_ || config_.tls) n = receive_now({in_.data() + end_, ask}, {});
    if (n == -EAGAIN || n == -EINTR) {
        foresee();
        if (config_.tls && all_sent()) config_.tls->release_buffers();
        const auto turn = channel_.loop().turn_time();
        const auto wait_began = Clock::now();
        if (config_.tls) {
            n = co_await config_.tls->recv(fd_, in_.data() + end_, ask);
        } else {
            n = co_await io_recv(fd_, in_.data() + end_, ask);
        }
        came_as_answer_ = Clock::now() - wait_began >= kAnswerTime;
        // Data that was there already did not let others run.
        if (channel_.loop().turn_time() != turn) {
            turn_requests_ = 0;
            turn_bytes_ = 0;
        }
    }
    more_expected_ = false;
    if (n == -EINTR || n == -EAGAIN) co_return true;
    if (end_of_input(static_cast<int>(n))) co_return false;
    end_ += static_cast<size_t>(n);
    more_expected_ = static_cast<size_t>(n) == ask;
    if (more_expected_ && window_ < kReceiveSize) window_ = kReceiveSize;
    co_return true;
}

void Session::foresee() {
    lone_requests_ = came_as_answer_ && requests_ == requests_at_wait_ + 1 ? lone_requests_ + 1 : 0;
    requests_at_wait_ = requests_;
    // Two wake-ups between processors take longer than everything else such a request costs. What waits for the disk,
    // or a deep queue, gains nothing.
    if (lone_requests_ >= kLoneRequests && in_flight_ == 0) channel_.loop().expect_soon(kNextRequest);
}

Task<bool> Session::receive_payload() {
    const RequestHeader rq = pending_;
    auto memory = Buffer::try_alloc(rq.length);
    if (!memory) {
        pending_verdict_ = {kWireNoMem, "no memory for the payload"};
        const bool go_on = co_await skip_payload();
        co_return go_on;
    }
    // Counted while it arrives: a client that sends slowly holds this memory.
    in_flight_bytes_ += rq.length;
    Buffer data = std::move(*memory);
    size_t have = std::min<size_t>(end_ - pos_, rq.length);
    std::memcpy(data.data(), in_.data() + pos_, have);
    pos_ += have;
    window_ = kHeaderWindow;
    size_t since_pause = 0;
    while (have < rq.length) {
        // The receive buffer is empty now; what follows the payload goes there.
        pos_ = end_ = 0;
        ssize_t n = receive_now({data.data() + have, rq.length - have}, {in_.data(), window_});
        if (n == -EAGAIN || n == -EINTR) {
            const auto turn = channel_.loop().turn_time();
            if (config_.tls) {
                n = co_await config_.tls->recv(fd_, data.data() + have, rq.length - have);
            } else {
                iovec iov[2] = {{data.data() + have, rq.length - have}, {in_.data(), window_}};
                msghdr message{};
                message.msg_iov = iov;
                message.msg_iovlen = 2;
                n = co_await io_recvmsg(fd_, &message);
            }
            if (channel_.loop().turn_time() != turn) since_pause = 0;
        }
        if (n == -EINTR || n == -EAGAIN) continue;
        if (end_of_input(static_cast<int>(n))) {
            in_flight_bytes_ -= rq.length;
            co_return false;
        }
        const size_t taken = std::min<size_t>(static_cast<size_t>(n), rq.length - have);
        have += taken;
        end_ = static_cast<size_t>(n) - taken;
        since_pause += static_cast<size_t>(n);
        if (since_pause >= kTurnBytes && have < rq.length) {
            since_pause = 0;
            co_await pause_.until(Clock::time_point::min());
        }
    }
    more_expected_ = true;
    in_flight_bytes_ -= rq.length;
    reading_ = true;
    write_received(rq, std::move(data));
    reading_ = false;
    co_return true;
}

Task<bool> Session::skip_payload() {
    size_t since_pause = 0;
    for (;;) {
        const size_t here = static_cast<size_t>(std::min<uint64_t>(end_ - pos_, skip_left_));
        pos_ += here;
        skip_left_ -= here;
        if (skip_left_ == 0) break;
        pos_ = end_ = 0;
        const int n = co_await receive(in_.data(), kReceiveSize);
        if (n == -EINTR || n == -EAGAIN) continue;
        if (end_of_input(n)) co_return false;
        end_ = static_cast<size_t>(n);
        since_pause += end_;
        if (since_pause >= kTurnBytes) {
            since_pause = 0;
            co_await pause_.until(Clock::time_point::min());
        }
    }
    reading_ = true;
    reply_error(pending_, pending_verdict_.error, pending_verdict_.reason);
    reading_ = false;
    co_return true;
}

Task<int> Session::receive(void* data, size_t size) {
    int n = 0;
    if (config_.tls) {
        n = co_await config_.tls->recv(fd_, data, size);
    } else {
        n = co_await io_recv(fd_, data, size);
    }
    co_return n;
}

ssize_t Session::receive_now(iovec into, iovec more) {
    if (config_.tls) return config_.tls->try_recv(fd_, into.iov_base, into.iov_len);
    ssize_t n = 0;
    if (more.iov_len == 0) {
        n = ::recv(fd_, into.iov_base, into.iov_len, MSG_DONTWAIT);
    } else {
        iovec iov[2] = {into, more};
        msghdr message{};
        message.msg_iov = iov;
        message.msg_iovlen = 2;
        n = ::recvmsg(fd_, &message, MSG_DONTWAIT);
    }
    return n < 0 ? -errno : n;
}

}  // namespace gantry::nbd
