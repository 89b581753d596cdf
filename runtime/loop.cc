#include "runtime/loop.h"

#include <unistd.h>

#include <thread>

#include "runtime/affinity.h"
#include "runtime/backend.h"
#include "runtime/buffer.h"
#include "runtime/loop_impl.h"

namespace gantry {

namespace {

/// Coroutines and posted items that run before completions are reaped again.
constexpr unsigned kTurnBudget = 1024;
/// A loop without work for this long gives its thread's cached buffers back.
constexpr std::chrono::seconds kTrimAfter{2};
/// The shortest busy polling that can pay off.
constexpr std::chrono::nanoseconds kPollStart{4000};
/// After so many expected events in a row that did not come in time, so many waits do not poll for one.
constexpr uint32_t kVainPolls = 3;
constexpr uint32_t kSkippedPolls = 256;

constinit thread_local Loop* current_loop = nullptr;

/// What post(handle) and post(function) need around the thing.
struct PostedHandle : PostItem {
    explicit PostedHandle(std::coroutine_handle<> h) : handle(h) { run = &resume; }
    static void resume(PostItem* item) {
        const std::unique_ptr<PostedHandle> self(static_cast<PostedHandle*>(item));
        self->handle.resume();
    }
    std::coroutine_handle<> handle;
};
struct PostedFunction : PostItem {
    explicit PostedFunction(std::function<void()> f) : function(std::move(f)) { run = &call; }
    static void call(PostItem* item) {
        const std::unique_ptr<PostedFunction> self(static_cast<PostedFunction*>(item));
        self->function();
    }
    std::function<void()> function;
};

struct Root {
    struct promise_type {
        static void* operator new(size_t size) { return frame_alloc(size); }
        static void operator delete(void* frame, size_t size) noexcept { frame_free(frame, size); }
        Root get_return_object() noexcept { return {std::coroutine_handle<promise_type>::from_promise(*this)}; }
        std::suspend_always initial_suspend() const noexcept { return {}; }
        std::suspend_never final_suspend() const noexcept { return {}; }
        void return_void() const noexcept {}
        [[noreturn]] void unhandled_exception() const noexcept { std::terminate(); }
    };
    std::coroutine_handle<> handle;
};

Root run_root(Task<void> task) { co_await std::move(task); }

}  // namespace

void Loop::Impl::take_posted() {
    if (!posted.load(std::memory_order_relaxed)) return;
    PostItem* stack = posted.exchange(nullptr, std::memory_order_acquire);
    while (stack) {  // newest first: reverse
        PostItem* next = stack->next;
        stack->next = batch;
        batch = stack;
        stack = next;
    }
}

Loop::Loop() : impl_(std::make_unique<Impl>()) {}

Result<std::unique_ptr<Loop>> Loop::create(LoopOptions options) {
    CHECK(options.pool, "a loop needs a blocking pool");
    std::unique_ptr<Loop> loop(new Loop);
    loop->poll_max_ns_ = options.poll_max.value_or(std::chrono::nanoseconds(0)).count();
    loop->options_ = std::move(options);
    const IoBackendKind wanted = loop->options_.backend;
    if (wanted != IoBackendKind::kEpoll) {
        auto made = make_uring_backend(*loop);
        if (made) {
            loop->backend_ = std::move(*made);
            loop->is_io_uring_ = true;
            return loop;
        }
        if (wanted == IoBackendKind::kIoUring) return std::unexpected(std::move(made).error());
    }
    TRY(loop->backend_, make_epoll_backend(*loop));
    return loop;
}

Loop::~Loop() {
    CHECK(current_loop != this, "a loop is destroyed from inside itself");
    if (!backend_) return;
    while (impl_->posting.load(std::memory_order_acquire) != 0) std::this_thread::yield();
    CHECK(backend_->in_flight() == 0, "a loop is destroyed with operations in flight");
    CHECK(impl_->timers.empty(), "a loop is destroyed with sleepers");
    if (!impl_->batch) impl_->take_posted();
    while (PostItem* item = impl_->batch) {  // never run; free what post() allocated
        impl_->batch = item->next;
        if (item->run == &PostedHandle::resume) delete static_cast<PostedHandle*>(item);
        if (item->run == &PostedFunction::call) delete static_cast<PostedFunction*>(item);
    }
}

Loop& Loop::current() {
    CHECK(current_loop, "this thread runs no loop");
    return *current_loop;
}

Loop* Loop::current_or_null() { return current_loop; }

void Loop::ready(std::coroutine_handle<> h) { impl_->ready.push(h); }

bool Loop::has_ready() const { return !impl_->ready.empty(); }

void Loop::post(PostItem& item) {
    Impl& in = *impl_;
    in.posting.fetch_add(1, std::memory_order_relaxed);
    PostItem* head = in.posted.load(std::memory_order_relaxed);
    do {
        item.next = head;
    } while (!in.posted.compare_exchange_weak(head, &item, std::memory_order_seq_cst, std::memory_order_relaxed));
    // `item` may have run and be gone. Whoever found the stack empty wakes; later ones need not.
    if (!head && in.sleeping.load(std::memory_order_seq_cst) && in.sleeping.exchange(false)) backend_->wake();
    in.posting.fetch_sub(1, std::memory_order_release);
}

void Loop::post(std::coroutine_handle<> h) {
    if (in_loop()) {
        ready(h);
        return;
    }
    post(*new PostedHandle(h));
}

void Loop::post(std::function<void()> fn) { post(*new PostedFunction(std::move(fn))); }

void Loop::stop() {
    Impl& in = *impl_;
    in.posting.fetch_add(1, std::memory_order_relaxed);
    in.stop.store(true, std::memory_order_seq_cst);
    if (in.sleeping.exchange(false)) backend_->wake();
    in.posting.fetch_sub(1, std::memory_order_release);
}

namespace {

/// Makes `loop` the calling thread's loop for a while.
class Inside {
  public:
    Inside(Loop& loop, IoBackend& backend, std::atomic<int>& tid) : outer_(current_loop), backend_(backend) {
        CHECK(!outer_, "a thread runs one loop at a time");
        const int self = ::gettid();
        const int owner = tid.exchange(self, std::memory_order_relaxed);
        CHECK(owner == 0 || owner == self, "a loop stays on the thread that ran it first");
        current_loop = &loop;
        backend_.attach();
    }
    ~Inside() {
        backend_.detach();
        current_loop = outer_;
    }

  private:
    Loop* outer_;
    IoBackend& backend_;
};

}  // namespace

void Loop::run() {
    Inside inside(*this, *backend_, tid_);
    impl_->heeds_stop = true;
    while (!impl_->stop.exchange(false)) turn(nullptr);
    impl_->heeds_stop = false;
}

void Loop::run_while(const bool& done) {
    Inside inside(*this, *backend_, tid_);
    while (!done) turn(&done);
}

void Loop::turn(const bool* done) {
    Impl& in = *impl_;
    turn_time_ = Clock::now();
    if (++turns_ > follow_until_ && following_ >= 0) [[unlikely]]
        unfollow();
    in.timers.expire(*this, turn_time_);
    unsigned budget = kTurnBudget;
    while (budget > 0) {
        if (!in.batch) in.take_posted();
        if (in.ready.empty() && !in.batch) break;
        while (in.batch && budget > 0) {
            PostItem* item = in.batch;
            in.batch = item->next;
            --budget;
            item->run(item);
        }
        for (size_t n = in.ready.size(); n > 0 && budget > 0; --n, --budget) in.ready.pop().resume();
    }
    if (budget != kTurnBudget) in.trimmed = false;
    if ((done && *done) || in.stopping()) return;
    const bool found = in.pollers && look_at_pollers();
    if (budget == 0 || found) {
        backend_->wait(Clock::time_point::min());
    } else {
        idle();
    }
}

void Loop::add_poller(Poller& poller) {
    CHECK(!poller.linked_, "a poller is added once");
    Poller*& first = impl_->pollers;
    poller.linked_ = true;
    poller.previous_ = nullptr;
    poller.next_ = first;
    if (first) first->previous_ = &poller;
    first = &poller;
}

void Loop::remove_poller(Poller& poller) {
    if (!poller.linked_) return;
    poller.linked_ = false;
    (poller.previous_ ? poller.previous_->next_ : impl_->pollers) = poller.next_;
    if (poller.next_) poller.next_->previous_ = poller.previous_;
}

/// True when something came.
bool Loop::look_at_pollers() {
    bool found = false;
    for (Poller* poller = impl_->pollers; poller; poller = poller->next_) found |= poller->poll();
    return found;
}

/// True when something came.
bool Loop::poll_until(Clock::time_point deadline) {
    const Impl& in = *impl_;
    do {
        backend_->wait(Clock::time_point::min());
        if (!in.ready.empty() || in.has_posted()) return true;
        if (in.pollers && look_at_pollers()) return true;
    } while (Clock::now() < deadline);
    return false;
}

/// The same, for what expect_soon() announced.
bool Loop::poll_for_expected(Clock::time_point next_timer) {
    const auto limit = std::exchange(expected_within_, std::chrono::nanoseconds(0));
    if (limit.count() == 0) return false;
    if (polls_to_skip_ > 0) {
        --polls_to_skip_;
        return false;
    }
    if (poll_until(std::min(Clock::now() + limit, next_timer))) {
        vain_polls_ = 0;
        return true;
    }
    if (++vain_polls_ >= kVainPolls) {
        vain_polls_ = 0;
        polls_to_skip_ = kSkippedPolls;
    }
    return false;
}

void Loop::idle() {
    Impl& in = *impl_;
    const auto next_timer = in.timers.next_deadline();
    const std::chrono::nanoseconds poll_limit = poll_max();
    if (poll_limit.count() == 0) {
        if (!poll_for_expected(next_timer)) sleep(next_timer);
        return;
    }
    const auto started = Clock::now();
    if (in.poll_time.count() > 0) {
        in.poll_time = std::min(in.poll_time, poll_limit);
        poll_until(std::min(started + in.poll_time, next_timer));
    }
    if (in.ready.empty() && !in.has_posted()) sleep(next_timer);
    // Poll longer when that would have caught the event, and less when it came long after.
    const auto waited = Clock::now() - started;
    if (waited > poll_limit) {
        in.poll_time /= 2;
        if (in.poll_time < kPollStart) in.poll_time = {};
    } else if (waited > in.poll_time) {
        in.poll_time = std::min(poll_limit, std::max(kPollStart, in.poll_time * 2));
    }
}

bool Loop::follow(int tid) {
    if (poll_max().count() != 0) return false;
    const int cpu = cpu_of_thread(tid);
    if (cpu < 0) return false;
    if (cpu != following_) {
        if (!keep_thread_on(cpu)) return false;
        following_ = cpu;
    }
    follow_until_ = turns_ + kFollowTurns;
    return true;
}

void Loop::unfollow() {
    if (following_ < 0) return;
    spread_thread();
    following_ = -1;
}

void Loop::sleep(Clock::time_point deadline) {
    Impl& in = *impl_;
    const auto trim_at = in.trimmed ? Clock::time_point::max() : turn_time_ + kTrimAfter;
    bool awake = false;
    for (Poller* poller = in.pollers; poller; poller = poller->next_) awake |= poller->before_sleep();
    in.sleeping.store(true, std::memory_order_seq_cst);
    awake |= in.has_posted() || in.stopping();
    backend_->wait(awake ? Clock::time_point::min() : std::min(deadline, trim_at));
    in.sleeping.store(false, std::memory_order_relaxed);
    for (Poller* poller = in.pollers; poller; poller = poller->next_) poller->after_sleep();
    if (!in.trimmed && in.ready.empty() && !in.has_posted() && Clock::now() >= trim_at) {
        buffer_cache_trim();
        in.trimmed = true;
    }
}

void detail::start_root(Loop& loop, Task<void> task) { loop.ready(run_root(std::move(task)).handle); }

}  // namespace gantry
