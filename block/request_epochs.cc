#include "block/request_epochs.h"

#include "runtime/check.h"

namespace gantry::block {
namespace {

/// Threads take shards in turn.
uint8_t shard_of_thread(unsigned count) {
    static std::atomic<unsigned> next{0};
    thread_local const unsigned mine = next.fetch_add(1, std::memory_order_relaxed);
    return static_cast<uint8_t>(mine % count);
}

}  // namespace

RequestEpochs::~RequestEpochs() {
    CHECK(empty(0) && empty(1), "request epochs are destroyed while a request runs");
    CHECK(next_.empty() && current_.empty(), "request epochs are destroyed with work left");
}

bool RequestEpochs::empty(unsigned phase) const {
    for (const Shard& shard : shards_) {
        if (shard.open[phase].load() != 0) return false;
    }
    return true;
}

RequestEpochs::Token RequestEpochs::enter() {
    const uint8_t shard = shard_of_thread(kShards);
    while (true) {
        const unsigned phase = phase_.load();
        shards_[shard].open[phase].fetch_add(1);
        // Whoever turned the phase in between may have found this counter empty: then the section belongs to the new
        // phase.
        if (phase_.load() == phase) return {shard, static_cast<uint8_t>(phase)};
        leave({shard, static_cast<uint8_t>(phase)});
    }
}

void RequestEpochs::leave(Token token) {
    const uint32_t before = shards_[token.shard].open[token.phase].fetch_sub(1);
    if (before == 1 && waiting_.load()) advance();
}

void RequestEpochs::retire(std::function<void()> fn) {
    {
        std::lock_guard lock(mutex_);
        next_.push_back(std::move(fn));
    }
    advance();
}

void RequestEpochs::advance() {
    while (true) {
        std::vector<std::function<void()>> ready;
        {
            std::lock_guard lock(mutex_);
            if (current_.empty()) {
                if (next_.empty()) return;
                std::swap(current_, next_);
                phase_.store(phase_.load() ^ 1);
                waiting_.store(true);
            }
            if (!empty(phase_.load() ^ 1)) return;  // the one who leaves last comes here
            waiting_.store(false);
            std::swap(ready, current_);
        }
        for (auto& fn : ready) fn();
    }
}

}  // namespace gantry::block
