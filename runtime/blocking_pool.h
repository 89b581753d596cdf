// BlockingPool: threads for system calls and computations that block.

#pragma once

#include <coroutine>
#include <functional>
#include <memory>
#include <optional>
#include <type_traits>

#include "runtime/loop.h"

namespace gantry {

/// Work for a pool thread; intrusive. `run` is called on the pool; it posts its result where it wants it (Loop::post).
struct PoolItem {
    void (*run)(PoolItem*) = nullptr;
    PoolItem* next = nullptr;
};

/// Threads are started on demand up to `max_threads` and end after idling. Any thread may submit. The destructor runs
/// what is queued, then joins.
class BlockingPool {
  public:
    explicit BlockingPool(unsigned max_threads = 16);
    ~BlockingPool();
    void submit(PoolItem& item);

  private:
    struct Impl;
    std::unique_ptr<Impl> impl_;
};

/// `auto r = co_await run_blocking([&] { return ::stat(path, &st); });`: runs `fn` on the pool of the current loop and
/// returns its value on this loop. Captures by reference are fine: the awaiting frame outlives the call. The function
/// must not touch coroutines.
template <class Fn>
class [[nodiscard]] BlockingCall : PoolItem, PostItem {
  public:
    using T = std::invoke_result_t<Fn>;
    explicit BlockingCall(Fn fn) : fn_(std::move(fn)) {}
    bool await_ready() const noexcept { return false; }
    void await_suspend(std::coroutine_handle<> h) {
        handle_ = h;
        loop_ = &Loop::current();
        PoolItem::run = [](PoolItem* item) {
            auto* self = static_cast<BlockingCall*>(item);
            if constexpr (std::is_void_v<T>) {
                self->fn_();
            } else {
                self->value_.emplace(self->fn_());
            }
            self->PostItem::run = [](PostItem* p) { static_cast<BlockingCall*>(p)->handle_.resume(); };
            self->loop_->post(static_cast<PostItem&>(*self));
        };
        loop_->pool().submit(*this);
    }
    T await_resume() {
        if constexpr (!std::is_void_v<T>) return std::move(*value_);
    }

  private:
    Fn fn_;
    std::coroutine_handle<> handle_;
    Loop* loop_ = nullptr;
    std::optional<std::conditional_t<std::is_void_v<T>, char, T>> value_;
};
template <class Fn>
BlockingCall<Fn> run_blocking(Fn fn) {
    return BlockingCall<Fn>(std::move(fn));
}

}  // namespace gantry
