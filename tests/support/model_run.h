// ModelRun: random requests on a node, compared with a plain array.

#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "tests/support/block_format.h"
#include "tests/support/graph_fixture.h"

namespace gantry::test {

/// How many operations a case with `share` percent of the whole runs: GANTRY_TEST_MODEL_OPS in all, by default half a
/// million (less under sanitizers and without optimisation).
uint64_t model_operations(unsigned share);

/// A node, its Root with a channel on every I/O loop, and what it must contain.
struct ModelRun : GraphFixture {
    explicit ModelRun(std::vector<block::Driver> drivers = {kBlockFormatDriver})
        : GraphFixture(nullptr, std::move(drivers)) {}
    ~ModelRun();

    /// Opens definitions in order; the last one is the node under test, named "n". `contents`: what it holds at first.
    void open(std::vector<std::string> definitions, std::vector<uint8_t> contents);
    void close();

    /// `workers` coroutines, dealt over the loops, each with a part of the disk of its own whose ends are aligned to
    /// nothing. The node is drained now and then meanwhile.
    void run_concurrent(uint64_t operations, unsigned workers, uint64_t seed);
    /// One coroutine over the whole disk, with resizes when `max_size` is not 0.
    void run_sequential(uint64_t operations, uint64_t seed, uint64_t max_size = 0);
    /// Reads everything and compares.
    void verify();

    /// The node keeps nothing (null-co): reads give zeroes.
    bool forgets = false;
    /// Requests may fail; a failed one leaves old or new bytes in its own range and nothing else.
    bool faulty = false;
    bool can_compress = false;

    std::vector<uint8_t> model;
    std::vector<uint8_t> touched;  // since the last successful flush; kept when sized like the model (sequential runs)
    std::atomic<uint64_t> done{0}, failed{0}, drains{0};

  private:
    struct Worker;
    Task<void> drain_while(const std::atomic<unsigned>* running);
    Task<void> concurrent(uint64_t operations, unsigned workers, uint64_t seed);
    Task<void> sequential(uint64_t operations, uint64_t seed, uint64_t max_size);
    Task<void> check_all();
    void note_failure(std::string text);
    void require_good();

    std::unique_ptr<block::Root> root_;
    std::vector<block::Channel*> channels_;
    std::mutex mutex_;
    std::string failure_;
    std::atomic<bool> stop_{false};
};

}  // namespace gantry::test
