// Calls that need the main loop while the main loop makes the graph quiet.

#include <catch2/catch.hpp>

#include <fmt/format.h>

#include <atomic>

#include "runtime/task_scope.h"
#include "tests/support/fuse_service.h"
#include "tests/support/node_io.h"

using namespace gantry;
using namespace gantry::fuse;
using namespace gantry::test;

namespace {

constexpr uint64_t kRecord = 1000;

struct State {
    FuseServiceFixture& f;
    std::atomic<uint64_t> next{0};  // records handed out
    std::atomic<unsigned> running{0};
    std::atomic<uint64_t> failed{0};
    uint64_t records = 0;
};

/// Appends records, each full of the low byte of its number (never 0), in no order between loops.
Task<void> append(State* state, size_t loop) {
    for (;;) {
        const uint64_t i = state->next.fetch_add(1);
        if (i >= state->records) break;
        FuseRequest request(Opcode::kWrite, WriteIn{.offset = i * kRecord, .size = kRecord},
                            Bytes(kRecord, static_cast<uint8_t>(i % 255 + 1)));
        co_await FuseRequest::answer(&request, state->f.service.get(), state->f.channels[loop]);
        if (request.error() != 0 || request.out<WriteOut>().size != kRecord) ++state->failed;
        FuseRequest getattr(Opcode::kGetattr, GetattrIn{});
        co_await FuseRequest::answer(&getattr, state->f.service.get(), state->f.channels[loop]);
        if (getattr.out<AttrOut>().attr.size < (i + 1) * kRecord) ++state->failed;
    }
    state->running.fetch_sub(1);
}

/// On the main loop, until the writers are done: what drains the node, one after the other.
Task<void> disturb(State* state, std::string reopen) {
    for (unsigned round = 0; state->running.load() != 0; ++round) {
        Result<> done;
        const auto size = static_cast<int64_t>(state->f.node("n").size());
        switch (round % 3) {
            case 0:
                // Larger than anybody has asked for; who asks for less must not cut it.
                done = co_await state->f.graph->resize(state->f.node("n"), size + 4096, true);
                break;
            case 1: {
                std::vector<json::object> options{options_of(reopen)};
                done = co_await state->f.graph->reopen(std::move(options));
                break;
            }
            default: {
                auto guard = co_await state->f.graph->mutex().lock();
                block::Node* nodes[] = {&state->f.node("n")};
                co_await state->f.graph->drain(nodes);
                for (const block::Channel* channel : state->f.channels) {
                    if (channel->in_flight()) ++state->failed;
                }
                co_await yield_turn();
                co_await state->f.graph->undrain(nodes);
            }
        }
        if (!done) {
            UNSCOPED_INFO(done.error().message());
            ++state->failed;
        }
        co_await sleep_for(std::chrono::microseconds(200));
    }
}

Task<void> appending(State* state, unsigned workers, std::string reopen) {
    TaskScope scope;
    state->running = workers;
    for (unsigned i = 0; i < workers; ++i) {
        const size_t loop = i % state->f.channels.size();
        scope.spawn(run_on(state->f.runtime.io_loop(loop), append(state, loop)));
    }
    scope.spawn(disturb(state, std::move(reopen)));
    co_await scope.join();
}

}  // namespace

TEST_CASE("fuse drain: growing writes of all loops while the graph changes", "[fuse][drain]") {
    const std::string definition = GENERATE(
        as<std::string>(), "{{'driver':'memory','node-name':'n','disk':'fuse','size':1,'latency-ns':{}}}",
        "{{'driver':'memory','node-name':'n','disk':'fuse','size':512,'request-alignment':512,'latency-ns':{}}}");
    MemoryDisk::forget("fuse");
    auto disk = MemoryDisk::named("fuse");
    FuseServiceFixture f;
    f.open({fmt::format(fmt::runtime(definition), 0)}, {.writable = true, .growable = true});
    State state{.f = f};
    state.records = 2000;
    f.run(appending(&state, 16, fmt::format(fmt::runtime(definition), 20000)));
    CHECK(state.failed == 0);
    REQUIRE(disk->size() >= state.records * kRecord);
    uint64_t wrong = 0;
    for (uint64_t i = 0; i < state.records; ++i) {
        if (disk->bytes(i * kRecord, kRecord) != Bytes(kRecord, static_cast<uint8_t>(i % 255 + 1))) ++wrong;
    }
    CHECK(wrong == 0);
}

namespace {

/// Drains the node, sees that `request` does not go on, and lets it.
Task<void> held_by_drain(FuseServiceFixture* f, FuseRequest* request) {
    TaskScope scope;
    auto guard = co_await f->graph->mutex().lock();
    block::Node* nodes[] = {&f->node("n")};
    co_await f->graph->drain(nodes);
    std::atomic<bool> done{false};
    scope.spawn([](FuseServiceFixture* f, FuseRequest* request, std::atomic<bool>* done) -> Task<void> {
        co_await run_on(f->runtime.io_loop(0), FuseRequest::answer(request, f->service.get(), f->channels[0]));
        *done = true;
    }(f, request, &done));
    // Attributes are told meanwhile.
    FuseRequest getattr(Opcode::kGetattr, GetattrIn{});
    co_await run_on(f->runtime.io_loop(0), FuseRequest::answer(&getattr, f->service.get(), f->channels[0]));
    CHECK(getattr.error() == 0);
    co_await sleep_for(std::chrono::milliseconds(2));
    CHECK_FALSE(done);
    CHECK(f->channels[0]->in_flight() == 0);
    co_await f->graph->undrain(nodes);
    guard.unlock();
    co_await scope.join();
    CHECK(done);
}

}  // namespace

TEST_CASE("fuse drain: calls wait outside of a drained node", "[fuse][drain]") {
    MemoryDisk::forget("fuse");
    FuseServiceFixture f;
    f.open({"{'driver':'memory','node-name':'n','disk':'fuse','size':10000}"}, {.writable = true, .growable = true});
    FuseRequest request = [&] {
        switch (GENERATE(range(0, 7))) {
            case 0:
                return FuseRequest(Opcode::kRead, ReadIn{.size = 100}, {}, 4096);
            case 1:
                return FuseRequest(Opcode::kWrite, WriteIn{.size = 100}, Bytes(100, 1));
            case 2:
                return FuseRequest(Opcode::kWrite, WriteIn{.offset = 20000, .size = 100}, Bytes(100, 1));
            case 3:
                return FuseRequest(Opcode::kSetattr, SetattrIn{.valid = kSetSize, .size = 5});
            case 4:
                return FuseRequest(Opcode::kFallocate, FallocateIn{.length = 100, .mode = FALLOC_FL_ZERO_RANGE});
            case 5:
                return FuseRequest(Opcode::kLseek, LseekIn{.whence = SEEK_HOLE});
            default:
                return FuseRequest(Opcode::kFsync, FsyncIn{});
        }
    }();
    f.run(held_by_drain(&f, &request));
    CHECK(request.error() == 0);
}
