#include "runtime/runtime.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <charconv>
#include <system_error>

#include "runtime/affinity.h"
#include "runtime/backend.h"
#include "runtime/log.h"

namespace gantry {

Result<IoBackendKind> parse_io_backend(std::string_view text) {
    if (text == "auto") return IoBackendKind::kAuto;
    if (text == "io_uring") return IoBackendKind::kIoUring;
    if (text == "epoll") return IoBackendKind::kEpoll;
    return fail(ErrorKind::kInvalid, "I/O back end '{}' is unknown; use auto, io_uring or epoll", text);
}

Result<std::optional<std::chrono::nanoseconds>> parse_io_poll(std::string_view text) {
    constexpr int64_t kMax = 1'000'000'000;
    if (text == "auto") return std::nullopt;
    if (text == "off") return std::chrono::nanoseconds(0);
    int64_t ns = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), ns);
    if (error == std::errc() && end == text.data() + text.size() && ns >= 0 && ns <= kMax) {
        return std::chrono::nanoseconds(ns);
    }
    return fail(ErrorKind::kInvalid, "'{}' is neither auto, nor off, nor a number of nanoseconds up to {}", text, kMax);
}

Result<std::unique_ptr<Runtime>> Runtime::create(RuntimeOptions options) {
    note_process_cpus();
    std::unique_ptr<Runtime> rt(new Runtime);
    if (options.backend == IoBackendKind::kEpoll) {
        rt->backend_reason_ = "epoll with blocking threads, as asked";
    } else if (const auto& uring = probe_io_uring(); uring) {
        rt->backend_reason_ = fmt::format("io_uring ({})", *uring);
        options.backend = IoBackendKind::kIoUring;
    } else if (options.backend == IoBackendKind::kIoUring) {
        return std::unexpected(uring.error());
    } else {
        rt->backend_reason_ = fmt::format("epoll with blocking threads ({})", uring.error().message());
        options.backend = IoBackendKind::kEpoll;
    }
    rt->options_ = options;
    rt->pool_ = std::make_unique<BlockingPool>(options.pool_threads);
    TRY(rt->main_, Loop::create({.name = "main", .backend = options.backend, .pool = rt->pool_.get()}));
    for (unsigned i = 0; i < options.io_loops; ++i) {
        TRY(Loop * loop, rt->add_loop(fmt::format("io{}", i), options.poll_max));
        rt->shared_.push_back(loop);
    }
    if (rt->shared_.empty()) rt->shared_.push_back(rt->main_.get());
    log::info("I/O back end: {}; {} I/O loop(s)", rt->backend_reason_, options.io_loops);
    return rt;
}

Runtime::~Runtime() {
    for (auto& t : threads_) t.loop->stop();
    for (auto& t : threads_) t.thread.join();
    pool_.reset();  // its threads post to loops until they are joined
}

Result<Loop*> Runtime::add_loop(std::string name, std::optional<std::chrono::nanoseconds> poll_max) {
    TRY(auto loop,
        Loop::create(
            {.name = std::move(name), .backend = options_.backend, .pool = pool_.get(), .poll_max = poll_max}));
    // The thread takes no signals: those are for the main loop. Faults of its own it does take.
    sigset_t all, before;
    sigfillset(&all);
    sigdelset(&all, SIGBUS);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    Loop* raw = loop.get();
    std::thread thread;
    int error = 0;
    try {
        thread = std::thread([raw] {
            pthread_setname_np(pthread_self(), raw->name().substr(0, 15).c_str());
            raw->run();
        });
    } catch (const std::system_error& e) {
        error = e.code().value();
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    if (error != 0) return fail_errno(error, "cannot start a thread for loop '{}'", raw->name());
    threads_.push_back({std::move(loop), std::move(thread)});
    return raw;
}

void Runtime::remove_loop(Loop* loop) {
    const auto it = std::ranges::find_if(threads_, [loop](const Threaded& t) { return t.loop.get() == loop; });
    CHECK(it != threads_.end(), "only an added loop is removed");
    CHECK(std::ranges::find(shared_, loop) == shared_.end(), "a shared loop stays");
    loop->stop();
    it->thread.join();
    threads_.erase(it);
}

std::vector<Loop*> Runtime::all_loops() {
    std::vector<Loop*> all{main_.get()};
    for (auto& t : threads_) all.push_back(t.loop.get());
    return all;
}

}  // namespace gantry
