// TaskScope: background coroutines with an owner.

#pragma once

#include <coroutine>
#include <cstddef>

#include "runtime/task.h"

namespace gantry {

class Loop;

/// Children of one owner, all on one loop (the loop that spawns). spawn() runs the task at once up to its first
/// suspension; join() returns when all children are done. Destroying a scope with live children aborts.
/// Its own loop only.
class TaskScope {
  public:
    TaskScope() = default;
    TaskScope(const TaskScope&) = delete;
    TaskScope& operator=(const TaskScope&) = delete;
    ~TaskScope() { GANTRY_CHECK(live_ == 0, "a TaskScope is destroyed with live children; join() it first"); }

    /// Parameters of the task are by value, or outlive the scope's join().
    void spawn(Task<void> task);

    /// Waits until no child is left. One waiter at a time. Children may still be spawned meanwhile (they are waited
    /// for).
    Task<void> join();

    size_t live() const { return live_; }

  private:
    struct Root;
    struct Idle;
    static Root run(TaskScope* scope, Task<void> task);
    void child_done();

    size_t live_ = 0;
    Loop* loop_ = nullptr;  // of the first spawn
    std::coroutine_handle<> joiner_;
};

}  // namespace gantry
