// RequestEpochs: "run this when every request begun before now has ended".

#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <mutex>
#include <vector>

namespace gantry::block {

/// Two phases of counted sections: retire() turns the phase and runs what was retired once the old phase has emptied.
/// Entering and leaving is one increment each on a counter that mostly one thread touches. Any loop. Lock order:
/// `mutex_` is a leaf lock; retired functions run without it.
class RequestEpochs {
  public:
    RequestEpochs() = default;
    RequestEpochs(const RequestEpochs&) = delete;
    ~RequestEpochs();

    struct Token {
        uint8_t shard = 0;
        uint8_t phase = 0;
    };
    Token enter();
    void leave(Token token);

    /// `fn` runs once every section entered before now was left: on the thread that leaves last, or here and now when
    /// none is open.
    void retire(std::function<void()> fn);

  private:
    static constexpr unsigned kShards = 16;
    struct alignas(64) Shard {
        std::array<std::atomic<uint32_t>, 2> open{};
    };
    void advance();
    bool empty(unsigned phase) const;

    std::array<Shard, kShards> shards_;
    std::atomic<unsigned> phase_{0};
    std::atomic<bool> waiting_{false};  // somebody waits for the other phase to empty
    std::mutex mutex_;
    std::vector<std::function<void()>> next_;     // retired in the present phase
    std::vector<std::function<void()>> current_;  // run when the other phase is empty
};

}  // namespace gantry::block
