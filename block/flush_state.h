// FlushState: concurrent flushes of a node share one.

#pragma once

#include <coroutine>
#include <cstdint>
#include <memory>
#include <mutex>

#include "runtime/error.h"
#include "runtime/sync.h"

namespace gantry::block {

/// A caller needs a flush that began after its call. At most one runs; callers that come meanwhile share the next one.
/// Any loop. Lock order: `mutex_` is a leaf lock.
class FlushState {
  public:
    FlushState() = default;
    FlushState(const FlushState&) = delete;

    /// The number of the flush that satisfies a call made now.
    uint64_t ticket();
    enum class Step : uint8_t { kDone, kRun, kWait };
    /// kDone: flush `ticket` or a later one has ended, `result` is its outcome. kRun: the caller runs a flush now and
    /// calls finish(). kWait: await turn() and ask again.
    Step next(uint64_t ticket, Result<>& result);
    /// `sticky`: an error makes every later flush fail too, because what it should have written may be gone.
    void finish(const Result<>& result, bool sticky);

    struct Awaiter {
        FlushState& state;
        detail::Waiter waiter;
        bool await_ready() const noexcept { return false; }
        bool await_suspend(std::coroutine_handle<> h);
        void await_resume() const noexcept {}
    };
    /// Returns when the running flush has ended.
    Awaiter turn() { return Awaiter{*this, {}}; }

  private:
    std::mutex mutex_;
    bool running_ = false;
    uint64_t started_ = 0;
    uint64_t ended_ = 0;
    std::unique_ptr<Error> last_error_;  // of flush `ended_`
    std::unique_ptr<Error> sticky_error_;
    detail::WaiterQueue waiters_;
};

}  // namespace gantry::block
