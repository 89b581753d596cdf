// Calls between loops.

#pragma once

#include <coroutine>

#include "runtime/loop.h"

namespace gantry {

/// `co_await switch_to(loop);` continues the coroutine on `loop`. Style rule: only for short excursions that come back
/// before anything else of the frame is used; prefer run_on().
class [[nodiscard]] SwitchTo : PostItem {
  public:
    explicit SwitchTo(Loop& loop) : loop_(loop) {}
    bool await_ready() const { return loop_.in_loop(); }
    void await_suspend(std::coroutine_handle<> h) {
        handle_ = h;
        PostItem::run = [](PostItem* item) { static_cast<SwitchTo*>(item)->handle_.resume(); };
        loop_.post(static_cast<PostItem&>(*this));
    }
    void await_resume() const noexcept {}

  private:
    Loop& loop_;
    std::coroutine_handle<> handle_;
};
inline SwitchTo switch_to(Loop& loop) { return SwitchTo(loop); }

/// Runs `task` on `loop` and returns its value on the loop of the caller.
template <class T>
Task<T> run_on(Loop& loop, Task<T> task) {
    Loop& home = Loop::current();
    if (&home == &loop) {
        if constexpr (std::is_void_v<T>) {
            co_await std::move(task);
            co_return;
        } else {
            co_return co_await std::move(task);
        }
    }
    co_await switch_to(loop);
    if constexpr (std::is_void_v<T>) {
        co_await std::move(task);
        co_await switch_to(home);
    } else {
        T value = co_await std::move(task);
        co_await switch_to(home);
        co_return value;
    }
}

}  // namespace gantry
