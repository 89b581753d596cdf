// Session: the transmission phase of one connection.

#pragma once

#include <atomic>
#include <cstdint>
#include <string_view>
#include <vector>

#include "block/root.h"
#include "nbd/meta_context.h"
#include "nbd/protocol.h"
#include "nbd/reply_queue.h"
#include "nbd/request_check.h"
#include "nbd/write_placement.h"
#include "runtime/buffer.h"
#include "runtime/sync.h"
#include "runtime/task.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::nbd {

class TlsStream;

/// Counters of one connection: written by its loop, read by any thread. A cache line of their own.
struct alignas(64) SessionCounters {
    std::atomic<uint64_t> requests{0};
    std::atomic<uint64_t> bytes_read{0};     // sent to the client by READ
    std::atomic<uint64_t> bytes_written{0};  // received from the client by WRITE
    std::atomic<uint32_t> in_flight{0};
    std::atomic<bool> good_bye{false};  // the other way: requests are answered by ESHUTDOWN from now on
};

struct SessionConfig {
    bool structured = false;
    bool extended = false;  // headers; includes structured
    bool read_only = false;
    ContextList contexts;
    /// Request data and unsent replies together; never below one request of the maximum payload.
    uint64_t memory_limit = 64u << 20;
    uint32_t max_in_flight = 128;
    /// Bytes go through it when it is there; the handshake is done, it outlives the session.
    TlsStream* tls = nullptr;
};

enum class SessionEnd : uint8_t {
    kDisconnect,  // DISC
    kEof,         // the client closed without DISC
    kReset,       // the connection broke
    kViolation,   // the client broke the protocol
};
struct SessionResult {
    SessionEnd end = SessionEnd::kEof;
    std::string_view detail;  // static text of a violation
};

/// Serves requests of `fd` (a connected, non-blocking stream socket) until the connection ends, from another thread by
/// shutdown(2). Returns when no request, no coroutine and no memory of it is left; the descriptor stays open. Runs on
/// the channel's loop; `channel` and `counters` outlive it.
Task<SessionResult> serve_session(int fd, block::Channel& channel, SessionConfig config, SessionCounters& counters);

/// Reader (session.cc): parses all requests of one recv and answers at once what the node can answer without waiting;
/// the rest becomes coroutines (session_requests.cc, session_read.cc, session_status.cc). The replies of a turn leave
/// in one sendmsg (session_writer.cc); the writer coroutine takes over when the socket is full or a coroutine finishes
/// later.
class Session {
  public:
    Session(int fd, block::Channel& channel, SessionConfig config, SessionCounters& counters);
    Task<SessionResult> run();

  private:
    // ---- Reader ----
    enum class Need : uint8_t { kInput, kPayload, kSkip, kPause, kRoom, kResume, kEnd };
    /// Handles what is buffered; says what is needed to go on. Never waits.
    Need process();
    void expect_next(size_t at) const;
    void dispatch(const RequestHeader& rq);
    /// Whether a payload follows the header: WRITE, and with extended headers whatever says so.
    bool has_payload(const RequestHeader& rq) const {
        return rq.command == kCmdWrite || (config_.extended && (rq.flags & kCmdPayloadLen));
    }
    /// A request with a payload begins at the front of the buffer.
    bool start_payload(const RequestHeader& rq, size_t available, Need& need);
    Task<bool> fill();
    /// Before a wait: a client that sends one request after the other is about to send the next one.
    void foresee();
    Task<bool> receive_payload();
    Task<bool> skip_payload();
    /// Waits for at least one byte; io_recv().
    Task<int> receive(void* data, size_t size);
    /// What is there already, -EAGAIN: nothing. May take bytes that follow into `more`.
    ssize_t receive_now(iovec into, iovec more);
    Task<void> read_requests();
    bool end_of_input(int result);
    void violation(std::string_view why);
    bool has_room(const RequestHeader& rq) const;

    // ---- Requests ----
    void read_now(const RequestHeader& rq);
    bool try_read_small(const RequestHeader& rq);
    bool try_read_large(const RequestHeader& rq);
    /// `data` is only read during the call.
    void write_now(const RequestHeader& rq, const uint8_t* data);
    /// The payload is complete in `data`.
    void write_received(const RequestHeader& rq, Buffer data);
    void start(const RequestHeader& rq, Task<void> task);
    static uint64_t cost(const RequestHeader& rq);
    void finish(const RequestHeader& rq);

    Task<void> do_read(RequestHeader rq, bool inline_tried);
    Task<void> do_structured_read(RequestHeader rq);
    Task<void> do_write(RequestHeader rq, Buffer data);
    Task<void> do_flush(RequestHeader rq);
    Task<void> do_trim(RequestHeader rq);
    Task<void> do_cache(RequestHeader rq);
    Task<void> do_write_zeroes(RequestHeader rq);
    /// `chosen`: indices of config_.contexts; empty: all. The range is that of `rq`.
    Task<void> do_block_status(RequestHeader rq, std::vector<uint16_t> chosen);
    /// A BLOCK_STATUS whose range and contexts are in `payload`.
    void status_with_payload(const RequestHeader& rq, const uint8_t* payload);

    // ---- Replies ----
    /// Writes the header of a chunk in the form that was negotiated: chunk_header_size_ bytes; where they end.
    uint8_t* encode_chunk_of(uint8_t* p, const RequestHeader& rq, uint16_t flags, uint16_t type,
                             uint64_t payload) const {
        return config_.extended ? encode_extended_chunk(p, flags, type, rq.cookie, rq.offset, payload)
                                : encode_chunk(p, flags, type, rq.cookie, static_cast<uint32_t>(payload));
    }
    void reply_none(const RequestHeader& rq);
    void encode_read_header(uint8_t* p, const RequestHeader& rq) const;
    void reply_ok(const RequestHeader& rq);
    void reply_empty_read(const RequestHeader& rq);
    void reply_error(const RequestHeader& rq, WireError error, std::string_view text);
    /// As much of the reply as lies before `offset` was fine.
    void reply_failure_at(const RequestHeader& rq, const Error& error, uint64_t offset);
    void reply_failure(const RequestHeader& rq, const Error& error);
    void reply_result(const RequestHeader& rq, const Result<>& result);
    void reply_data(const RequestHeader& rq, Buffer data);

    // ---- Writer ----
    /// Sends without waiting: all, or until the socket is full (then the writer goes on).
    void flush();
    enum class Sent : uint8_t { kAll, kFull, kShare };
    Sent send_now();
    Sent send_encrypted();
    bool all_sent() const;
    void wake_writer();
    Task<void> writer();
    void drop_connection();
    void publish_counters();

    // A READ of this size or more asks for holes first when replies are structured.
    static constexpr uint32_t kHoleThreshold = 64u << 10;

    const int fd_;
    block::Channel& channel_;
    const SessionConfig config_;
    // What was negotiated says how long headers are.
    const size_t request_size_;
    const size_t chunk_header_size_;
    const size_t read_header_size_;
    SessionCounters& counters_;
    RequestRules rules_;
    SessionResult result_;

    Buffer in_;  // received bytes [pos_, end_)
    size_t pos_ = 0, end_ = 0;
    size_t window_;  // how much one recv may bring: small while large payloads arrive, which go to their own memory
    bool more_expected_ = false;  // the last recv filled its window
    RequestHeader pending_{};     // of receive_payload() and skip_payload()
    Verdict pending_verdict_;
    uint64_t skip_left_ = 0;

    uint64_t requests_at_wait_ = 0;  // requests_ when the reader last waited
    uint32_t lone_requests_ = 0;     // waits in a row that brought one request each
    bool came_as_answer_ = false;    // the last wait was long enough for a client that answers a reply

    uint32_t turn_requests_ = 0;  // budget of this turn
    uint64_t turn_bytes_ = 0;

    WritePlacement write_placement_;

    uint32_t in_flight_ = 0;
    uint64_t in_flight_bytes_ = 0;
    uint64_t requests_ = 0, bytes_read_ = 0, bytes_written_ = 0;
    // The last range that block status called data: reads inside it need not ask again.
    uint64_t known_data_begin_ = 0, known_data_end_ = 0;

    ReplyQueue replies_;
    bool reading_ = false;      // inside the reader's turn: it flushes at its end
    bool writer_busy_ = false;  // the writer waits for the socket or is about to run
    bool finishing_ = false;
    bool broken_ = false;
    Timer pause_;
    WaitQueue writer_wake_;
    WaitQueue room_;
    TaskScope requests_scope_;
    TaskScope writer_scope_;
};

}  // namespace gantry::nbd
