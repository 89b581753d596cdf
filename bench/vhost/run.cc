#include "bench/vhost/run.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "bench/loadgen/threads.h"
#include "bench/vhost/queue.h"

namespace gantry::bench::vhost {

namespace {

using Queues = std::vector<std::unique_ptr<Queue>>;

constexpr unsigned kIdleTurnsPerClock = 1024;  // of a spinning thread

/// What the threads share.
struct Common : FirstFailure {
    explicit Common(const Options& options) : options(options) {}
    const Options& options;
    int64_t deadline = 0;
    std::atomic<uint64_t> sleeps = 0;
};

/// One thread's queues.
class Worker {
  public:
    Worker(std::span<std::unique_ptr<Queue>> queues, Common& common) : queues_(queues), common_(common) {
        for (const auto& queue : queues_) polls_.push_back({queue->call_fd(), POLLIN, 0});
    }

    Outcome<> drive() {
        last_progress_ = now_ns();
        for (const auto& queue : queues_) BENCH_CHECK(queue->start(last_progress_));
        while (in_flight() && !common_.failed()) {
            const auto progress = turn();
            if (!progress) return failure(progress.error());
            if (*progress) {
                idle_turns_ = 0;
            } else if (common_.options.spin) {
                BENCH_CHECK(spin());
            } else {
                BENCH_CHECK(sleep());
            }
        }
        for (const auto& queue : queues_) queue->drain_calls();
        return {};
    }

  private:
    bool in_flight() const {
        return std::ranges::any_of(queues_, [](const auto& queue) { return queue->in_flight() > 0; });
    }

    Outcome<bool> turn() {
        bool progress = false;
        for (const auto& queue : queues_) {
            const auto got = queue->turn(common_.deadline);
            if (!got) return failure(got.error());
            progress |= *got;
        }
        return progress;
    }

    Outcome<> spin() {
        if (idle_turns_++ == 0) last_progress_ = now_ns();
        if (idle_turns_ % kIdleTurnsPerClock) return {};
        return now_ns() - last_progress_ < common_.options.stall_ns ? Outcome<>{} : silence();
    }

    /// Until the server calls. Calls that came while nobody slept are counted and done with.
    Outcome<> sleep() {
        for (const auto& queue : queues_) queue->want_call(true);
        const bool done = std::ranges::any_of(queues_, [](const auto& queue) { return queue->has_done(); });
        int ready = 1;
        if (!done) {
            common_.sleeps.fetch_add(1, std::memory_order_relaxed);
            ready = ::poll(polls_.data(), polls_.size(), static_cast<int>(common_.options.stall_ns / 1'000'000));
            for (const auto& queue : queues_) queue->drain_calls();
        }
        for (const auto& queue : queues_) queue->want_call(false);
        return ready == 0 ? silence() : Outcome<>{};
    }

    Outcome<> silence() const {
        uint64_t outstanding = 0;
        for (const auto& queue : queues_) outstanding += queue->in_flight();
        return failure("the server has not answered for " + std::to_string(common_.options.stall_ns / 1'000'000) +
                       " ms; " + std::to_string(outstanding) + " requests are outstanding");
    }

    std::span<std::unique_ptr<Queue>> queues_;
    Common& common_;
    std::vector<pollfd> polls_;
    int64_t last_progress_ = 0;
    unsigned idle_turns_ = 0;
};

/// Blocks of --bs that may be used.
Outcome<uint64_t> check_disk(const Disk& disk, const Options& options) {
    if (disk.block_bytes == 0 || options.block_bytes % disk.block_bytes != 0) {
        return failure("--bs must be a multiple of the disk's block size, " + std::to_string(disk.block_bytes));
    }
    const uint64_t available = disk.bytes - std::min(disk.bytes, options.region_offset);
    if (options.region_bytes > available) return failure("--offset and --size reach beyond the disk");
    const uint64_t blocks = (options.region_bytes ? options.region_bytes : available) / options.block_bytes;
    if (blocks < options.queues) return failure("the disk is too small: each queue needs a block of --bs");
    return blocks;
}

Outcome<Queues> make_queues(const Options& options, const SharedMemory& memory, uint64_t blocks) {
    Queues queues;
    const uint64_t first = options.region_offset / options.block_bytes;
    const bool share = options.mode == Mode::kRead || options.mode == Mode::kWrite;  // in order: a part for each queue
    const size_t each = Queue::memory_bytes(options);
    for (uint32_t i = 0; i < options.queues; i++) {
        const uint64_t from = share ? blocks / options.queues * i : 0;
        const uint64_t count = share ? blocks / options.queues : blocks;
        auto queue = Queue::create(options, memory, memory.data() + i * each,
                                   BlockRange(first + from, count, options.block_bytes, false), options.seed + i);
        if (!queue) return failure(std::move(queue.error()));
        queues.push_back(std::move(*queue));
    }
    return queues;
}

Outcome<> load(Queues& queues, Common& common) {
    in_shares(queues.size(), common.options.threads, [&](size_t first, size_t count) {
        Worker worker(std::span(queues).subspan(first, count), common);
        if (auto driven = worker.drive(); !driven) common.set(driven.error());
    });
    return common.outcome();
}

}  // namespace

Outcome<Report> run(const Options& options) {
    auto front_end = FrontEnd::connect(options);
    if (!front_end) return failure(std::move(front_end.error()));
    const auto blocks = check_disk(front_end->disk(), options);
    if (!blocks) return failure(blocks.error());
    const auto memory = SharedMemory::create(options.queues * Queue::memory_bytes(options));
    if (!memory) return failure(memory.error());
    BENCH_CHECK(front_end->share(*memory));
    auto queues = make_queues(options, *memory, *blocks);
    if (!queues) return failure(std::move(queues.error()));
    for (uint32_t i = 0; i < options.queues; i++) BENCH_CHECK(front_end->start_queue(i, (*queues)[i]->wiring()));

    Report report;
    report.disk = front_end->disk();
    Common common(options);
    const double cpu = process_cpu_seconds();
    const int64_t begun = now_ns();
    common.deadline = begun + options.runtime_ns;
    BENCH_CHECK(load(*queues, common));
    report.cpu_seconds = process_cpu_seconds() - cpu;
    report.sleeps = common.sleeps;
    for (uint32_t i = 0; i < options.queues; i++) BENCH_CHECK(front_end->stop_queue(i));

    int64_t last = begun;
    for (const auto& queue : *queues) {
        const Totals& totals = queue->totals();
        report.requests += totals.requests;
        report.bytes += totals.bytes;
        report.kicks += totals.kicks;
        report.signals += totals.signals;
        report.latency.merge(totals.latency);
        last = std::max(last, totals.last_reply_ns);
    }
    report.seconds = static_cast<double>(last - begun) / 1e9;
    return report;
}

}  // namespace gantry::bench::vhost
