#include "runtime/task_scope.h"

#include "runtime/loop.h"

namespace gantry {

/// The frame around a child: starts at once, frees itself at the end.
struct TaskScope::Root {
    struct promise_type {
        static void* operator new(size_t size) { return frame_alloc(size); }
        static void operator delete(void* frame, size_t size) noexcept { frame_free(frame, size); }
        Root get_return_object() const noexcept { return {}; }
        std::suspend_never initial_suspend() const noexcept { return {}; }
        std::suspend_never final_suspend() const noexcept { return {}; }
        void return_void() const noexcept {}
        [[noreturn]] void unhandled_exception() const noexcept { std::terminate(); }
    };
};

struct TaskScope::Idle {
    TaskScope& scope;
    bool await_ready() const noexcept { return scope.live_ == 0; }
    void await_suspend(std::coroutine_handle<> h) const {
        CHECK(!scope.joiner_, "one joiner at a time");
        scope.joiner_ = h;
    }
    void await_resume() const noexcept {}
};

TaskScope::Root TaskScope::run(TaskScope* scope, Task<void> task) {
    co_await std::move(task);
    scope->child_done();
}

void TaskScope::spawn(Task<void> task) {
    if (live_++ == 0) loop_ = Loop::current_or_null();
    run(this, std::move(task));
}

void TaskScope::child_done() {
    CHECK(loop_ == Loop::current_or_null(), "a child of a TaskScope ends on the loop it was spawned on");
    // The joiner runs from the ready list: by then the child's frame, with its parameters, is gone.
    if (--live_ == 0 && joiner_) loop_->ready(std::exchange(joiner_, {}));
}

Task<void> TaskScope::join() {
    while (live_ != 0) co_await Idle{*this};
}

}  // namespace gantry
