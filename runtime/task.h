// Task<T>: the lazy coroutine every asynchronous function returns (style.md part 3).

#pragma once

#include <coroutine>
#include <exception>
#include <optional>
#include <utility>

#include "runtime/check.h"
#include "runtime/error.h"
#include "runtime/frame_pool.h"

namespace gantry {

template <class T>
class Task;

namespace detail {

struct TaskPromiseBase {
    struct FinalAwaiter {
        bool await_ready() const noexcept { return false; }
        template <class P>
        std::coroutine_handle<> await_suspend(std::coroutine_handle<P> h) const noexcept {
            return h.promise().continuation;
        }
        void await_resume() const noexcept {}
    };

    static void* operator new(size_t size) { return frame_alloc(size); }
    static void operator delete(void* frame, size_t size) noexcept { frame_free(frame, size); }

    std::suspend_always initial_suspend() const noexcept { return {}; }
    FinalAwaiter final_suspend() const noexcept { return {}; }
    [[noreturn]] void unhandled_exception() const noexcept { std::terminate(); }

    std::coroutine_handle<> continuation = std::noop_coroutine();
};

template <class T>
struct TaskPromise : TaskPromiseBase {
    Task<T> get_return_object() noexcept;
    template <class U>
    void return_value(U&& u) {
        value.emplace(std::forward<U>(u));
    }
    T take() { return std::move(*value); }
    std::optional<T> value;
};

template <>
struct TaskPromise<void> : TaskPromiseBase {
    Task<void> get_return_object() noexcept;
    void return_void() const noexcept {}
    void take() const noexcept {}
};

}  // namespace detail

/// A coroutine that runs when awaited, exactly once, by its owner. Destroying an unstarted task frees its frame;
/// destroying a suspended one is only legal when nothing will resume it.
template <class T = void>
class [[nodiscard]] Task {
  public:
    using promise_type = detail::TaskPromise<T>;
    using Handle = std::coroutine_handle<promise_type>;

    Task(Task&& other) noexcept : handle_(std::exchange(other.handle_, {})) {}
    Task& operator=(Task&& other) noexcept {
        if (this != &other) {
            if (handle_) handle_.destroy();
            handle_ = std::exchange(other.handle_, {});
        }
        return *this;
    }
    ~Task() {
        if (handle_) handle_.destroy();
    }

    auto operator co_await() && noexcept {
        struct Awaiter {
            Handle handle;
            bool await_ready() const noexcept { return false; }
            std::coroutine_handle<> await_suspend(std::coroutine_handle<> awaiting) const noexcept {
                handle.promise().continuation = awaiting;
                return handle;
            }
            T await_resume() const { return handle.promise().take(); }
        };
        GANTRY_CHECK(handle_, "a task is awaited once");
        return Awaiter{handle_};
    }

  private:
    friend promise_type;
    explicit Task(Handle handle) : handle_(handle) {}
    Handle handle_;
};

namespace detail {
template <class T>
Task<T> TaskPromise<T>::get_return_object() noexcept {
    return Task<T>(Task<T>::Handle::from_promise(*this));
}
inline Task<void> TaskPromise<void>::get_return_object() noexcept {
    return Task<void>(Task<void>::Handle::from_promise(*this));
}
}  // namespace detail

/// A task that is already done, for plain functions that return Task.
template <class T>
Task<T> ready_task(T value) {
    co_return value;
}

}  // namespace gantry
