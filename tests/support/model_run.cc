#include "tests/support/model_run.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "runtime/task_scope.h"

namespace gantry::test {

using block::BlockStatus;
using block::Channel;
using block::has;
using block::WriteFlags;

namespace {

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
constexpr uint64_t kDefaultOperations = 40'000;
#define MODEL_RUN_SANITIZED
#endif
#endif
#ifndef MODEL_RUN_SANITIZED
#ifdef NDEBUG
constexpr uint64_t kDefaultOperations = 500'000;
#else
constexpr uint64_t kDefaultOperations = 80'000;
#endif
#endif

constexpr uint64_t kMostBytes = 200'000;  // of one request

}  // namespace

uint64_t model_operations(unsigned share) {
    // One loop has fewer orders of things to offer.
    const uint64_t once = env_or("GANTRY_TEST_LOOPS", "4") == "1" ? kDefaultOperations / 2 : kDefaultOperations;
    const uint64_t usual = std::getenv("GANTRY_SOAK") ? 20 * once : once;
    const uint64_t all = std::stoull(env_or("GANTRY_TEST_MODEL_OPS", std::to_string(usual).c_str()));
    return std::max<uint64_t>(all * share / 100, 50);
}

/// Random requests inside [begin, end) through one channel. On the channel's loop.
struct ModelRun::Worker {
    ModelRun& run;
    Channel& channel;
    std::mt19937_64 random;
    uint64_t begin;
    uint64_t end;
    std::vector<uint8_t> data = {};
    std::vector<uint8_t> before = {};

    struct Range {
        uint64_t offset, length;
    };
    Range range() {
        const uint64_t kind = random() % 100;
        uint64_t length = 1 + random() % (kind < 60 ? 1000 : kind < 97 ? 20'000 : kMostBytes);
        uint64_t offset = begin + random() % (end - begin);
        if (random() % 4 == 0) offset = std::max(begin, offset & ~uint64_t{4095});
        if (random() % 4 == 0) length = (length + 4095) & ~uint64_t{4095};
        return {offset, std::min(length, end - offset)};
    }
    void make_data(uint64_t length) {
        data.resize(length);
        const uint64_t kind = random() % 10;
        if (kind == 0) {
            std::fill(data.begin(), data.end(), 0);
        } else if (kind < 4) {
            std::fill(data.begin(), data.end(), static_cast<uint8_t>(random()));
        } else {
            uint64_t word = random();
            for (size_t i = 0; i < data.size(); i += 8) {
                word = word * 6364136223846793005 + 1442695040888963407;
                std::memcpy(data.data() + i, &word, std::min<size_t>(8, data.size() - i));
            }
        }
    }
    std::string where(const char* what, const Range& r, const char* problem) const {
        return fmt::format("{} of {} bytes at {}: {}", what, r.length, r.offset, problem);
    }
    std::string differs(const char* what, const Range& r) const {
        for (uint64_t i = 0; i < r.length; i++) {
            const uint8_t expected = run.forgets ? 0 : run.model[r.offset + i];
            if (data[i] != expected) {
                return fmt::format("{} of {} bytes at {}: byte {} is {:#x}, not {:#x}", what, r.length, r.offset,
                                   r.offset + i, data[i], expected);
            }
        }
        return {};
    }
    void accept(uint64_t offset, const std::vector<uint8_t>& bytes) {
        std::ranges::copy(bytes, run.model.begin() + static_cast<ptrdiff_t>(offset));
        touch({offset, bytes.size()});
    }
    void touch(const Range& r) {
        if (run.touched.size() != run.model.size()) return;
        std::fill_n(run.touched.begin() + static_cast<ptrdiff_t>(r.offset), r.length, 1);
    }

    Task<std::string> one();
    Task<std::string> read();
    Task<std::string> write();
    Task<std::string> zero();
    Task<std::string> discard();
    Task<std::string> flush();
    Task<std::string> status();
    /// After a failure or a hint: every byte is either the model's or `wanted`'s (null: zero); the model takes what is
    /// there.
    Task<std::string> adopt(const char* what, Range r, const std::vector<uint8_t>* wanted);
    Task<Result<>> read_for_sure(Range r);
    /// Ends an operation that may fail only when faults are injected.
    Task<std::string> failed(const char* what, Range r, const Error& error, const std::vector<uint8_t>* wanted);
};

Task<Result<>> ModelRun::Worker::read_for_sure(Range r) {
    Result<> result;
    for (int attempt = 0; attempt < 100; attempt++) {
        data.assign(r.length, 0xee);
        const iovec iov{data.data(), data.size()};
        result = co_await channel.read(r.offset, IoVec(iov));
        if (result) break;
    }
    co_return result;
}

Task<std::string> ModelRun::Worker::adopt(const char* what, Range r, const std::vector<uint8_t>* wanted) {
    const std::vector<uint8_t> copy = wanted ? *wanted : std::vector<uint8_t>(r.length);
    const Result<> result = co_await read_for_sure(r);
    if (!result) co_return where(what, r, result.error().message().c_str());
    for (uint64_t i = 0; i < r.length; i++) {
        if (data[i] != run.model[r.offset + i] && data[i] != copy[i])
            co_return where(what, r, "left bytes that nobody wrote");
    }
    if (!run.forgets) accept(r.offset, data);
    co_return std::string();
}

Task<std::string> ModelRun::Worker::failed(const char* what, Range r, const Error& error,
                                           const std::vector<uint8_t>* wanted) {
    if (!run.faulty) co_return where(what, r, error.message().c_str());
    run.failed++;
    co_return co_await adopt(what, r, wanted);
}

Task<std::string> ModelRun::Worker::read() {
    const Range r = range();
    data.assign(r.length, 0xee);
    // In one to three pieces of memory.
    const size_t cut = random() % (r.length + 1);
    const iovec list[3] = {{data.data(), cut},
                           {data.data() + cut, (r.length - cut) / 2},
                           {data.data() + cut + (r.length - cut) / 2, r.length - cut - (r.length - cut) / 2}};
    const IoVec iov(list, 3, r.length);
    if (random() % 2) {
        const int tried = channel.try_read(r.offset, iov);
        if (tried == 0) co_return differs("inline read", r);
        if (tried != -EAGAIN && !run.faulty) co_return where("inline read", r, std::strerror(-tried));
    }
    const Result<> result = co_await channel.read(r.offset, iov);
    if (!result && run.faulty) co_return std::string();
    if (!result) co_return where("read", r, result.error().message().c_str());
    co_return differs("read", r);
}

Task<std::string> ModelRun::Worker::write() {
    const Range r = range();
    make_data(r.length);
    const std::vector<uint8_t> wanted = data;
    const iovec iov{data.data(), data.size()};
    WriteFlags flags = random() % 50 ? WriteFlags::kNone : WriteFlags::kFua;
    if (run.can_compress && random() % 8 == 0) flags = flags | WriteFlags::kCompressed;
    if (flags == WriteFlags::kNone && random() % 2) {
        const int tried = channel.try_write(r.offset, IoVec(iov), flags);
        if (tried == 0) {
            accept(r.offset, wanted);
            co_return std::string();
        }
        if (tried != -EAGAIN && !run.faulty) co_return where("inline write", r, std::strerror(-tried));
    }
    const Result<> result = co_await channel.write(r.offset, IoVec(iov), flags);
    if (!result) co_return co_await failed("write", r, result.error(), &wanted);
    accept(r.offset, wanted);
    co_return std::string();
}

Task<std::string> ModelRun::Worker::zero() {
    const Range r = range();
    WriteFlags flags = WriteFlags::kNone;
    if (random() % 2) flags = flags | WriteFlags::kMayUnmap;
    if (random() % 4 == 0) flags = flags | WriteFlags::kNoFallback;
    const Result<> result = co_await channel.write_zeroes(r.offset, r.length, flags);
    if (!result && result.error().kind() == ErrorKind::kUnsupported && has(flags, WriteFlags::kNoFallback)) {
        // Refused: nothing has changed.
        const Result<> checked = co_await read_for_sure(r);
        if (!checked) co_return where("refused zeroes", r, checked.error().message().c_str());
        co_return differs("refused zeroes", r);
    }
    if (!result) co_return co_await failed("write zeroes", r, result.error(), nullptr);
    accept(r.offset, std::vector<uint8_t>(r.length));
    co_return std::string();
}

Task<std::string> ModelRun::Worker::discard() {
    const Range r = range();
    const Result<> result = co_await channel.discard(r.offset, r.length);
    if (!result && !run.faulty) co_return where("discard", r, result.error().message().c_str());
    co_return co_await adopt("discard", r, nullptr);
}

Task<std::string> ModelRun::Worker::flush() {
    const Result<> result = co_await channel.flush();
    if (!result && !run.faulty) co_return result.error().message();
    if (result) std::fill(run.touched.begin(), run.touched.end(), 0);
    co_return std::string();
}

Task<std::string> ModelRun::Worker::status() {
    const Range r = range();
    const Result<BlockStatus> result = co_await channel.block_status(r.offset, r.length);
    if (!result && run.faulty) co_return std::string();
    if (!result) co_return where("block status", r, result.error().message().c_str());
    if (result->length == 0 || result->length > r.length) co_return where("block status", r, "a wrong length");
    if (!result->zero) co_return std::string();
    const auto first = run.model.begin() + static_cast<ptrdiff_t>(r.offset);
    const bool zero =
        std::all_of(first, first + static_cast<ptrdiff_t>(result->length), [](uint8_t b) { return b == 0; });
    co_return zero || run.forgets ? std::string() : where("block status", r, "called data zero");
}

Task<std::string> ModelRun::Worker::one() {
    const uint64_t kind = random() % 100;
    if (kind < 36) return read();
    if (kind < 72) return write();
    if (kind < 82) return zero();
    if (kind < 90) return discard();
    if (kind < 93) return flush();
    return status();
}

ModelRun::~ModelRun() {
    if (root_) detach(std::move(root_));
}

void ModelRun::open(std::vector<std::string> definitions, std::vector<uint8_t> contents) {
    for (const std::string& definition : definitions) {
        const std::string error = add(definition);
        if (!error.empty()) throw std::runtime_error(definition + ": " + error);
    }
    block::RootOptions options = writer("the model");
    options.perms.share = block::Perm::kAll;
    root_ = attach("n", std::move(options));
    channels_.clear();
    for (size_t i = 0; i < runtime.io_loop_count(); i++) channels_.push_back(run(root_->channel(runtime.io_loop(i))));
    model = std::move(contents);
    if (model.size() != node("n").size()) throw std::runtime_error("the model has another size");
}

void ModelRun::close() {
    detach(std::move(root_));
    if (const std::string error = remove("n"); !error.empty()) throw std::runtime_error(error);
}

void ModelRun::note_failure(std::string text) {
    std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = std::move(text);
    stop_ = true;
}

void ModelRun::require_good() {
    std::lock_guard lock(mutex_);
    if (!failure_.empty()) throw std::runtime_error(failure_);
}

namespace {

/// On the worker's loop.
template <class W>
Task<void> work(std::unique_ptr<W> worker, uint64_t operations, std::atomic<bool>* stop, std::atomic<uint64_t>* done,
                std::string* failure) {
    for (uint64_t i = 0; i < operations && !*stop; i++) {
        *failure = co_await worker->one();
        if (!failure->empty()) break;
        done->fetch_add(1, std::memory_order_relaxed);
        if (i % 16 == 15) co_await yield_turn();
    }
}

Task<void> until_done(Task<void> task, std::atomic<unsigned>* running) {
    co_await std::move(task);
    running->fetch_sub(1);
}

}  // namespace

Task<void> ModelRun::drain_while(const std::atomic<unsigned>* running) {
    while (*running) {
        {
            auto guard = co_await graph->mutex().lock();
            block::Node* nodes[] = {&node("n")};
            co_await graph->drain(nodes);
            for (const Channel* channel : channels_) {
                if (channel->in_flight()) note_failure("a drained channel has requests in flight");
            }
            co_await graph->undrain(nodes);
        }
        drains++;
        co_await sleep_for(std::chrono::milliseconds(2));
    }
}

Task<void> ModelRun::concurrent(uint64_t operations, unsigned workers, uint64_t seed) {
    TaskScope scope;
    std::atomic<unsigned> running{workers};
    std::vector<std::string> failures(workers);
    std::mt19937_64 random(seed);
    uint64_t begin = 0;
    for (unsigned i = 0; i < workers; i++) {
        // Parts end at odd places, so that neighbours share sectors, sub-blocks and blocks.
        const uint64_t nominal = model.size() * (i + 1) / workers;
        const uint64_t end =
            i + 1 == workers ? model.size() : nominal - random() % std::min<uint64_t>(5000, nominal / 2);
        const size_t loop = i % channels_.size();
        auto worker = std::make_unique<Worker>(*this, *channels_[loop], std::mt19937_64(seed * 1000 + i), begin, end);
        Task<void> body = work(std::move(worker), operations / workers, &stop_, &done, &failures[i]);
        scope.spawn(until_done(run_on(runtime.io_loop(loop), std::move(body)), &running));
        begin = end;
    }
    scope.spawn(drain_while(&running));
    co_await scope.join();
    for (std::string& failure : failures) {
        if (!failure.empty()) note_failure(std::move(failure));
    }
}

Task<void> ModelRun::sequential(uint64_t operations, uint64_t seed, uint64_t max_size) {
    std::mt19937_64 random(seed);
    while (operations && !stop_) {
        const uint64_t batch = std::min<uint64_t>(operations, max_size ? 200 : operations);
        operations -= batch;
        if (!model.empty()) {
            auto worker = std::make_unique<Worker>(*this, *channels_[0], std::mt19937_64(random()), 0, model.size());
            std::string failure;
            Task<void> body = work(std::move(worker), batch, &stop_, &done, &failure);
            co_await run_on(runtime.io_loop(0), std::move(body));
            if (!failure.empty()) note_failure(std::move(failure));
        }
        if (!max_size) continue;
        const uint64_t size = (1 + random() % max_size + 511) & ~uint64_t{511};
        const Result<> resized = co_await graph->resize(node("n"), static_cast<int64_t>(size));
        if (resized) {
            model.resize(size, 0);
        } else if (!faulty) {
            note_failure("resize: " + resized.error().message());
        }
    }
}

Task<void> ModelRun::check_all() {
    Worker worker{*this, *channels_[0], std::mt19937_64(1), 0, model.size()};
    for (uint64_t pos = 0; pos < model.size(); pos += kMostBytes) {
        const Worker::Range r{pos, std::min<uint64_t>(kMostBytes, model.size() - pos)};
        const Result<> result = co_await worker.read_for_sure(r);
        std::string problem = result ? worker.differs("final read", r) : result.error().message();
        if (!problem.empty()) note_failure(std::move(problem));
    }
}

void ModelRun::run_concurrent(uint64_t operations, unsigned workers, uint64_t seed) {
    run(concurrent(operations, workers, seed));
    require_good();
}

void ModelRun::run_sequential(uint64_t operations, uint64_t seed, uint64_t max_size) {
    run(sequential(operations, seed, max_size));
    require_good();
}

void ModelRun::verify() {
    run(run_on(runtime.io_loop(0), check_all()));
    require_good();
}

}  // namespace gantry::test
