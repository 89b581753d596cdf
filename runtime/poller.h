// Poller: work that shows up in memory, which other processes write, instead of by a completion.

#pragma once

namespace gantry {

/// Registered with Loop::add_poller(). The loop looks at it after each turn and while it polls, and needs to be woken
/// only while it sleeps. Functions are called on the loop; none resumes a coroutine inline, they put it on the ready
/// list.
class Poller {
  public:
    virtual ~Poller() = default;
    /// True: work has come, and who does it is on the ready list.
    virtual bool poll() = 0;
    /// The loop is about to sleep: whoever brings work must wake it. True: some has come already, as for poll().
    virtual bool before_sleep() = 0;
    /// It is awake again.
    virtual void after_sleep() = 0;

  private:
    friend class Loop;
    Poller* next_ = nullptr;
    Poller* previous_ = nullptr;
    bool linked_ = false;
};

}  // namespace gantry
