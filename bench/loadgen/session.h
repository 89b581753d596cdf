#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include <sys/uio.h>

#include "bench/loadgen/connect.h"
#include "bench/loadgen/histogram.h"
#include "bench/loadgen/outcome.h"
#include "bench/loadgen/workload.h"

namespace gantry::bench {

/// What one session did since start().
struct Totals {
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t verified_bytes = 0;
    uint64_t receives = 0;
    int64_t last_reply_ns = 0;
    Histogram latency;
};

/// One connection that keeps `depth` requests outstanding. All replies that one recv delivered are parsed,
/// then as many new requests go out in one sendmsg. Payloads are looked at in the receive buffer and never
/// copied; nothing is allocated after the constructor. One thread at a time.
class Session {
  public:
    Session(Connection connection, const Options& options, BlockRange range, uint64_t seed);

    /// Begins a run of `workload` that issues requests until `deadline_ns`, and sends the first ones.
    Outcome<> start(Workload workload, int64_t deadline_ns);

    /// Receives once, waiting at most kReceiveTimeoutMs if `wait`, and follows up with new requests.
    /// A reply with an error, a wrong byte (--verify), a broken protocol or a silent server is a failure.
    Outcome<> receive(bool wait);

    /// Goes on sending after poll(2) said POLLOUT.
    Outcome<> transmit();

    /// Fails when no reply has been completed for options.stall_ns.
    Outcome<> check_silence(int64_t now) const;

    bool wants_to_send() const { return next_part_ < parts_.size(); }
    bool finished() const { return outstanding_ == 0; }
    int fd() const { return connection_.socket.fd(); }
    const Export& info() const { return connection_.info; }
    const Totals& totals() const { return totals_; }
    void disconnect() { send_disconnect(connection_.socket); }

  private:
    struct Slot {
        uint64_t cookie = 0;
        uint64_t block = 0;
        int64_t issued_ns = 0;
        uint32_t received = 0;
        uint32_t version = 0;
        bool write = false;
        bool in_use = false;
    };

    Outcome<> issue(int64_t now);
    void issue_one(const Work& work, int64_t now);
    void append(const uint8_t* bytes, size_t count);
    Outcome<> send_parts();

    Outcome<> parse(int64_t now);
    Outcome<bool> parse_header(int64_t now);
    Outcome<bool> parse_simple(const uint8_t* header, int64_t now);
    Outcome<bool> parse_chunk(const uint8_t* header, int64_t now);
    Outcome<> begin_body(Slot& slot, uint64_t offset, uint32_t length, bool last);
    Outcome<> take_body(int64_t now);
    Outcome<> check_body(std::span<const uint8_t> data);
    Outcome<> complete(Slot& slot, int64_t now);
    Outcome<Slot*> find_slot(uint64_t cookie);
    std::string describe(const Slot& slot) const;
    std::string refused(const Slot& slot, uint32_t error, std::string_view text) const;

    Connection connection_;
    BlockRange range_;
    Workload workload_;
    int64_t deadline_ns_ = 0;
    int64_t stall_ns_;
    bool verify_;
    Totals totals_;

    std::vector<Slot> slots_;
    std::vector<uint32_t> free_;
    uint32_t outstanding_ = 0;

    // Sending: request headers lie one after the other, so that a batch of reads is one part.
    std::vector<uint8_t> headers_;
    size_t headers_used_ = 0;
    std::vector<uint8_t> payload_;  // --verify: one block for each slot, else one for all
    std::vector<iovec> parts_;
    size_t next_part_ = 0;

    // Receiving: the bytes from parsed_ to received_ are not looked at yet.
    std::vector<uint8_t> buffer_;
    size_t parsed_ = 0;
    size_t received_ = 0;
    Slot* body_slot_ = nullptr;
    uint64_t body_offset_ = 0;
    uint32_t body_left_ = 0;
    bool body_last_ = false;
};

}  // namespace gantry::bench
