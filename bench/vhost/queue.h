#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bench/loadgen/connect.h"
#include "bench/loadgen/histogram.h"
#include "bench/loadgen/outcome.h"
#include "bench/loadgen/workload.h"
#include "bench/vhost/front_end.h"
#include "bench/vhost/options.h"
#include "bench/vhost/ring.h"
#include "bench/vhost/wire.h"

namespace gantry::bench::vhost {

/// What one queue has done.
struct Totals {
    uint64_t requests = 0;
    uint64_t bytes = 0;
    uint64_t kicks = 0;    // by us
    uint64_t signals = 0;  // by the server
    int64_t last_reply_ns = 0;
    Histogram latency;
};

/// One virtqueue with its requests. Belongs to one thread at a time.
class Queue {
  public:
    /// Bytes of shared memory that a queue needs, a multiple of the page size.
    static size_t memory_bytes(const Options& options);

    /// `at`: memory_bytes() of `memory`, zeroes.
    static Outcome<std::unique_ptr<Queue>> create(const Options& options, const SharedMemory& memory, std::byte* at,
                                                  const BlockRange& blocks, uint64_t seed);

    QueueWiring wiring() const;
    int call_fd() const { return call_.fd(); }

    /// Sends as many requests as the depth allows.
    Outcome<> start(int64_t now);
    /// Takes what is done and, before the deadline, sends as many new requests. False: nothing was done.
    Outcome<bool> turn(int64_t deadline);
    void want_call(bool want) { ring_->want_call(want); }
    bool has_done() const { return ring_->has_done(); }
    /// Counts and forgets the calls of the server.
    void drain_calls();
    uint32_t in_flight() const { return in_flight_; }
    const Totals& totals() const { return totals_; }

  private:
    Queue(const Options& options, const BlockRange& blocks, uint64_t seed)
        : options_(options), blocks_(blocks), workload_(options.mode, 0, false, seed) {}

    void lay_out(const SharedMemory& memory, std::byte* at);
    void define_slots(const SharedMemory& memory, std::byte* tables);
    Outcome<> submit(int64_t now);
    Outcome<> finish(Ring::Done done, int64_t now);

    struct Slot {
        int64_t sent_ns = 0;
        bool busy = false;
    };

    Options options_;
    BlockRange blocks_;
    Workload workload_;
    Socket kick_{-1};
    Socket call_{-1};
    std::unique_ptr<Ring> ring_;
    RingPlace place_{};
    BlockRequest* headers_ = nullptr;
    volatile uint8_t* statuses_ = nullptr;
    std::byte* data_ = nullptr;
    std::vector<Slot> slots_;
    std::vector<uint32_t> free_;  // slots
    uint32_t in_flight_ = 0;
    Totals totals_;
};

}  // namespace gantry::bench::vhost
