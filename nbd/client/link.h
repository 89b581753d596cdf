// Link: one connection of a client node: its life (link.cc, link_cancel.cc), what it sends (link_send.cc), what it
// believes of the answers (link_receive.cc).

#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "nbd/client/attempt.h"
#include "nbd/client/config.h"
#include "nbd/client/link_group.h"
#include "nbd/client/operation.h"
#include "nbd/client/transport.h"
#include "runtime/buffer.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::nbd::client {

/// spec/nbd.md section 14.4.
enum class LinkState : uint8_t {
    kUp,       // requests are sent
    kWaiting,  // lost; requests wait for its return until reconnect-delay has passed
    kDown,     // lost; requests fail, each of them makes a new attempt begin
    kRefused,  // the server broke the protocol: nothing is sent to it any more
    kClosed,
};

/// Its own loop only, unless noted. Held by shared_ptr: what was posted to its loop may outlive the node.
class Link : public std::enable_shared_from_this<Link> {
  public:
    /// Requests a server is asked at a time; further ones wait here.
    static constexpr uint32_t kSlots = 128;

    Link(Loop& loop, std::shared_ptr<const ClientConfig> config, std::shared_ptr<LinkGroup> group);
    ~Link();
    Link(const Link&) = delete;

    Loop& loop() const { return loop_; }  // any loop

    /// Connects and negotiates, again and again until open-timeout has passed. Ends early by cancel_open().
    Task<Result<Negotiated>> open();
    void cancel_open();
    /// After open(), or instead of it: then it connects meanwhile. `expected` is what every later connection must
    /// offer, too; `writable`: the node may be written.
    void start(Negotiated expected, bool writable);
    /// Sends what ends a session, if there is one; returns when nothing runs any more. Nothing is in flight, or
    /// cancel() has been called.
    Task<void> close();

    /// Any loop: whether later connections must let the node write.
    void set_writable(bool writable) { writable_.store(writable, std::memory_order_relaxed); }

    /// Returns when the server has answered. While the link is down: fails, or waits for its return.
    Task<Result<>> execute(Operation& op);

    /// Has it come back, if it is lost and has been up.
    void ask_again();
    /// Requests that wait for a lost server fail now, those the server has are given a few seconds. Those that come
    /// later are not meant: whoever waits for the end of them repeats it.
    void cancel();
    /// The last requests before close() come: they, too, end some time.
    void limit_last_requests();

    LinkState state() const { return state_.load(std::memory_order_relaxed); }  // any loop
    const std::shared_ptr<LinkGroup>& group() const { return group_; }          // any loop
    uint32_t load() const { return load_.load(std::memory_order_relaxed); }     // sum of Operation::cost(); any loop

  private:
    // ---- Life ----
    Task<void> serve();
    Task<void> talk();
    Task<void> reconnect();
    Task<void> watch_delay();
    Task<void> watch_cancelled(uint64_t before);
    Task<void> watch_last_requests();
    void abandon(std::string why);
    bool give_up_with_siblings();
    Task<void> force_end();
    void adopt(Connected connected);
    void lost();
    void fall_down();
    void set_state(LinkState state);
    Error unavailable() const;
    Error given_up() const;
    /// Ends an operation that is in no list any more.
    void finish(Operation& op, Result<> result);
    void fail_queued();
    void want_connection();

    // ---- Sending ----
    Task<void> write_requests();
    Task<void> say_good_bye();
    void begin_requests();
    void encode(Operation& op);
    size_t gather(std::vector<iovec>& list) const;
    void note_sent(uint64_t bytes);
    void wake_writer();

    // ---- Receiving: false = the connection is of no use any more, and why is known ----
    struct ReplyHeader {
        uint16_t flags = 0, type = 0;
        uint64_t cookie = 0, length = 0;
    };
    Task<void> read_replies();
    Task<bool> read_reply();
    Task<bool> read_simple();
    Task<bool> read_chunk(size_t header_size);
    Task<bool> read_data(Operation& op, uint64_t at, uint64_t length);
    Task<bool> read_data_chunk(Operation& op, ReplyHeader header);
    Task<bool> read_hole_chunk(Operation& op, ReplyHeader header);
    Task<bool> read_status_chunk(Operation& op, ReplyHeader header);
    Task<bool> read_error_chunk(Operation& op, ReplyHeader header);
    /// `bytes` <= kReplyRoom stand at begin_ of the buffer.
    Task<bool> need(size_t bytes);
    Task<bool> skip(uint64_t bytes);
    Task<bool> receive_more();
    size_t buffered() const { return end_ - begin_; }
    const uint8_t* at() const { return in_.data() + begin_; }
    size_t window() const;
    Operation* find(uint64_t cookie) const;
    bool cover(Operation& op, uint64_t at, uint64_t length);
    bool answer_complete(Operation& op);
    template <class... Args>
    bool violation(fmt::format_string<Args...> format, Args&&... args);
    void connection_ended(std::string why);

    Loop& loop_;
    const std::shared_ptr<const ClientConfig> config_;
    const std::shared_ptr<LinkGroup> group_;  // of the node
    std::atomic<LinkState> state_{LinkState::kDown};
    std::atomic<uint32_t> load_{0};
    Negotiated expected_;
    std::atomic<bool> writable_{false};
    bool closing_ = false;

    // The connection.
    std::unique_ptr<Transport> transport_;
    Negotiated now_;
    bool was_up_ = false;
    bool good_ = false;       // it has answered something: the next loss begins with short pauses again
    bool leaving_ = false;    // the server has said ESHUTDOWN: nothing new is sent
    bool abandoned_ = false;  // cut off by cancel(): what was in flight is not sent again
    bool stop_writing_ = false, say_bye_ = false;
    std::string loss_;  // why it ended
    bool broke_protocol_ = false;

    // Requests: queued_ -> unsent_ and a slot -> a slot alone -> answered.
    OperationQueue queued_;  // not begun
    OperationQueue unsent_;  // begun, not all of it is sent; all have slots
    OperationQueue again_;   // answered with ESHUTDOWN: for the next connection
    std::array<Operation*, kSlots> slots_{};
    std::vector<uint8_t> free_slots_;
    uint64_t next_sequence_ = 0, next_cookie_ = 0;
    uint32_t large_reads_ = 0;  // in slots
    size_t turn_bytes_ = 0;     // received since other coroutines had their turn

    Buffer in_;  // received bytes [begin_, end_)
    size_t begin_ = 0, end_ = 0;

    // Coming back.
    Attempt attempt_;
    bool wanted_ = false;     // somebody wants a connection
    unsigned failed_ = 0;     // attempts in a row, for the pause
    std::string last_error_;  // of the last attempt, or of the loss
    Timer pause_;             // between attempts
    Timer delay_;             // reconnect-delay
    Timer grace_;             // of cancel()
    Timer last_limit_;        // of limit_last_requests()
    Timer bye_limit_;
    Clock::time_point wait_until_{};
    Clock::time_point next_attempt_{};
    bool watching_delay_ = false, watching_cancelled_ = false;
    bool open_cancelled_ = false;
    WaitQueue wake_;
    WaitQueue writer_wake_;
    TaskScope scope_;
};

}  // namespace gantry::nbd::client
