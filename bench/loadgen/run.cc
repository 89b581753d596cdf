#include "bench/loadgen/run.h"

#include <poll.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "bench/loadgen/connect.h"
#include "bench/loadgen/session.h"
#include "bench/loadgen/threads.h"
#include "bench/loadgen/wire.h"

namespace gantry::bench {

namespace {

using Sessions = std::vector<std::unique_ptr<Session>>;

/// One poll over `sessions`; then each gets its turn.
Outcome<> poll_turn(std::span<std::unique_ptr<Session>> sessions, std::vector<pollfd>& polls) {
    polls.clear();
    for (const auto& session : sessions) {
        if (session->finished()) continue;
        const short events = session->wants_to_send() ? POLLIN | POLLOUT : POLLIN;
        polls.push_back({session->fd(), events, 0});
    }
    ::poll(polls.data(), polls.size(), kReceiveTimeoutMs);
    const int64_t now = now_ns();
    size_t at = 0;
    for (const auto& session : sessions) {
        if (session->finished()) continue;
        const short ready = polls[at++].revents;
        if (ready & POLLOUT) BENCH_CHECK(session->transmit());
        if (ready & ~POLLOUT) BENCH_CHECK(session->receive(false));
        if (ready == 0) BENCH_CHECK(session->check_silence(now));
    }
    return {};
}

bool all_finished(std::span<std::unique_ptr<Session>> sessions) {
    return std::ranges::all_of(sessions, [](const auto& session) { return session->finished(); });
}

/// Serves `sessions` until their deadlines have passed and every request is answered.
Outcome<> drive(std::span<std::unique_ptr<Session>> sessions, const FirstFailure& others) {
    std::vector<pollfd> polls;
    polls.reserve(sessions.size());
    while (!others.failed() && !all_finished(sessions)) {
        if (sessions.size() == 1 && !sessions[0]->wants_to_send()) {
            BENCH_CHECK(sessions[0]->receive(true));
        } else {
            BENCH_CHECK(poll_turn(sessions, polls));
        }
    }
    return {};
}

struct Phase {
    Mode mode;
    bool once;
    int64_t length_ns;
};

Outcome<> run_phase(Sessions& sessions, const Options& options, const Phase& phase) {
    FirstFailure failure_of_any;
    const int64_t deadline = now_ns() + phase.length_ns;
    const auto serve = [&](size_t first, size_t count) {
        const std::span mine(sessions.data() + first, count);
        for (size_t i = 0; i < count; i++) {
            const Workload workload(phase.mode, options.read_percent, phase.once, options.seed + first + i);
            if (auto started = mine[i]->start(workload, deadline); !started) return failure_of_any.set(started.error());
        }
        if (auto driven = drive(mine, failure_of_any); !driven) failure_of_any.set(driven.error());
    };
    in_shares(sessions.size(), options.threads, serve);
    return failure_of_any.outcome();
}

Outcome<uint64_t> check_export(const Export& info, const Options& options) {
    if (options.writes() && (info.flags & kTransmissionReadOnly)) return failure("the export is read-only");
    if (info.minimum_bytes == 0 || options.block_bytes % info.minimum_bytes != 0) {
        return failure("--bs must be a multiple of the export's block size, " + std::to_string(info.minimum_bytes));
    }
    if (options.block_bytes > info.maximum_bytes) {
        return failure("--bs is larger than the server's maximum, " + std::to_string(info.maximum_bytes));
    }
    const uint64_t available = info.size_bytes - std::min(info.size_bytes, options.region_offset);
    if (options.region_bytes > available) return failure("--offset and --size reach beyond the export");
    const uint64_t blocks = (options.region_bytes ? options.region_bytes : available) / options.block_bytes;
    if (blocks < options.connections) return failure("the export is too small: each connection needs a block of --bs");
    return blocks;
}

Outcome<Sessions> open_sessions(const Options& options) {
    Sessions sessions;
    const uint64_t first = options.region_offset / options.block_bytes;
    const bool sequential = options.mode == Mode::kRead || options.mode == Mode::kWrite;
    // Connections own a share each where the order or the content of the blocks matters.
    const bool share = sequential || options.verify || options.fill;
    for (uint32_t i = 0; i < options.connections; i++) {
        auto connection = open_connection(options);
        if (!connection) return failure(std::move(connection.error()));
        const auto blocks = check_export(connection->info, options);
        if (!blocks) return failure(blocks.error());
        const uint64_t from = share ? *blocks / options.connections * i : 0;
        const bool rest = !share || i + 1 == options.connections;
        const uint64_t count = rest ? *blocks - from : *blocks / options.connections;
        sessions.push_back(std::make_unique<Session>(
            std::move(*connection), options, BlockRange(first + from, count, options.block_bytes, options.verify),
            options.seed + i));
    }
    return sessions;
}

void add_totals(const Sessions& sessions, int64_t begun_ns, Report& report) {
    int64_t last = begun_ns;
    for (const auto& session : sessions) {
        const Totals& totals = session->totals();
        report.requests += totals.requests;
        report.bytes += totals.bytes;
        report.receives += totals.receives;
        report.latency.merge(totals.latency);
        last = std::max(last, totals.last_reply_ns);
    }
    report.seconds = static_cast<double>(last - begun_ns) / 1e9;
}

void add_verified(const Sessions& sessions, Report& report) {
    for (const auto& session : sessions) report.verified_bytes += session->totals().verified_bytes;
}

Outcome<Report> run_transfer(const Options& options) {
    auto sessions = open_sessions(options);
    if (!sessions) return failure(std::move(sessions.error()));
    Report report;
    report.export_bytes = sessions->front()->info().size_bytes;
    if (options.fill) BENCH_CHECK(run_phase(*sessions, options, {Mode::kWrite, true, options.limit_ns}));

    const double cpu = process_cpu_seconds();
    const int64_t begun = now_ns();
    BENCH_CHECK(run_phase(*sessions, options, {options.mode, false, options.runtime_ns}));
    report.cpu_seconds = process_cpu_seconds() - cpu;
    add_totals(*sessions, begun, report);
    add_verified(*sessions, report);

    const bool wrote =
        options.mode == Mode::kRandWrite || options.mode == Mode::kWrite || options.mode == Mode::kRandRw;
    // Without --fill the blocks that this run did not write hold anything.
    if (options.verify && options.fill && wrote) {
        BENCH_CHECK(run_phase(*sessions, options, {Mode::kRead, true, options.limit_ns}));
        add_verified(*sessions, report);
    }
    for (auto& session : *sessions) session->disconnect();
    return report;
}

/// --rw=connect: `threads` threads that connect and disconnect.
Outcome<Report> run_connect(const Options& options) {
    struct Worker {
        uint64_t connections = 0;
        uint64_t export_bytes = 0;
        Histogram latency;
    };
    std::vector<Worker> workers(options.threads);
    FirstFailure failure_of_any;
    const double cpu = process_cpu_seconds();
    const int64_t begun = now_ns();
    const auto work = [&](Worker& mine) {
        for (int64_t now = begun; now - begun < options.runtime_ns && !failure_of_any.failed();) {
            const int64_t start = now;
            auto connection = open_connection(options);
            if (!connection) return failure_of_any.set(std::move(connection.error()));
            send_disconnect(connection->socket);
            mine.export_bytes = connection->info.size_bytes;
            now = now_ns();
            mine.latency.record(static_cast<uint64_t>(now - start));
            mine.connections++;
        }
    };
    std::vector<std::thread> threads;
    for (auto& worker : workers) threads.emplace_back(work, std::ref(worker));
    for (auto& thread : threads) thread.join();
    BENCH_CHECK(failure_of_any.outcome());
    Report report;
    report.seconds = static_cast<double>(now_ns() - begun) / 1e9;
    report.cpu_seconds = process_cpu_seconds() - cpu;
    for (const auto& worker : workers) {
        report.requests += worker.connections;
        report.export_bytes = worker.export_bytes;
        report.latency.merge(worker.latency);
    }
    return report;
}

}  // namespace

Outcome<Report> run(const Options& options) {
    return options.mode == Mode::kConnect ? run_connect(options) : run_transfer(options);
}

}  // namespace gantry::bench
