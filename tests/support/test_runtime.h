// TestRuntime: the runtime of a unit test, made from the environment. Header only, so that the runtime's own tests can
// use it.

#pragma once

#include <chrono>
#include <cstdlib>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>

#include "runtime/cross_loop.h"
#include "runtime/log.h"
#include "runtime/runtime.h"
#include "runtime/timer.h"

namespace gantry::test {

inline std::string env_or(const char* name, const char* fallback) {
    const char* value = std::getenv(name);
    return value && *value ? value : fallback;
}

/// GANTRY_TEST_IO_BACKEND (io_uring | epoll | auto) and GANTRY_TEST_LOOPS (1 | 4) choose; throws when this machine
/// lacks what was asked.
inline RuntimeOptions runtime_options_from_env() {
    RuntimeOptions options;
    auto kind = parse_io_backend(env_or("GANTRY_TEST_IO_BACKEND", "auto"));
    if (!kind) throw std::runtime_error(kind.error().message());
    options.backend = *kind;
    options.io_loops = static_cast<unsigned>(std::stoul(env_or("GANTRY_TEST_LOOPS", "1")));
    options.pool_threads = 8;
    return options;
}

/// `TestRuntime rt; auto r = rt.run(open_image("x.qcow2"));`
struct TestRuntime {
    TestRuntime() : TestRuntime(runtime_options_from_env()) {}
    explicit TestRuntime(RuntimeOptions options) {
        if (!std::getenv("GANTRY_TEST_LOG")) log::set_level(log::Level::kError);
        auto made = Runtime::create(options);
        if (!made) throw std::runtime_error(made.error().message());
        runtime = std::move(*made);
    }

    /// Runs `task` on the main loop until it is done.
    template <class T>
    T run(Task<T> task) {
        return main_loop().run_until_complete(std::move(task));
    }
    /// Runs `task` on the I/O loop `index` while the main loop serves; returns its value here.
    template <class T>
    T run_on_io(Task<T> task, size_t index = 0) {
        return main_loop().run_until_complete(run_on(io_loop(index), std::move(task)));
    }

    Loop& main_loop() { return runtime->main_loop(); }
    Loop& io_loop(size_t index = 0) { return *runtime->io_loops()[index % runtime->io_loops().size()]; }
    size_t io_loop_count() const { return runtime->io_loops().size(); }
    BlockingPool& pool() { return runtime->pool(); }

    std::unique_ptr<Runtime> runtime;
};

/// Waits (on the current loop, turn by turn) until `condition` holds; false when `limit` passed first. For state that
/// another party changes without an event to wait for.
inline Task<bool> wait_until(std::function<bool()> condition,
                             std::chrono::milliseconds limit = std::chrono::seconds(30)) {
    const auto deadline = Clock::now() + limit;
    while (!condition()) {
        if (Clock::now() >= deadline) co_return false;
        co_await sleep_for(std::chrono::microseconds(200));
    }
    co_return true;
}

}  // namespace gantry::test
