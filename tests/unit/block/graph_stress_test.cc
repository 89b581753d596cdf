// The graph is changed as fast as it can be while workers on every loop write and verify through their channels.

#include <catch2/catch.hpp>

#include <cerrno>
#include <cstdlib>
#include <random>

#include "runtime/cross_loop.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"
#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;

namespace {

constexpr size_t kBlock = 1024;
constexpr size_t kBlocks = 16;  // per worker
constexpr uint64_t kDisk = 1 << 20;
constexpr uint64_t kSlack = 64 * 1024;  // the end of the disk comes and goes

std::chrono::milliseconds stress_time() {
    const char* text = std::getenv("GANTRY_TEST_STRESS_MS");
    return std::chrono::milliseconds(text ? std::atoi(text) : 2000);
}

/// One coroutine on one loop with a range of its own.
struct Worker {
    Channel* channel = nullptr;
    uint64_t base = 0;
    uint32_t seed = 0;
    const std::atomic<bool>* stop = nullptr;
    std::atomic<uint64_t> verified{0};
    std::string failure;  // read after the join
};

void fill(uint8_t* memory, uint64_t offset, uint32_t generation) {
    uint64_t state = offset * 0x9e3779b97f4a7c15 + generation;
    for (size_t i = 0; i < kBlock; i += 8) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        const uint64_t word = generation == 0 ? 0 : state;
        std::memcpy(memory + i, &word, 8);
    }
}

Task<void> work(Worker* w) {
    std::mt19937 random(w->seed);
    std::array<uint32_t, kBlocks> generation{};
    Buffer memory = Buffer::alloc(kBlock * 2);
    uint8_t* expected = memory.data() + kBlock;
    const iovec iov{memory.data(), kBlock};
    Channel& channel = *w->channel;
    while (!w->stop->load(std::memory_order_relaxed) && w->failure.empty()) {
        const size_t index = random() % kBlocks;
        const uint64_t offset = w->base + index * kBlock;
        const unsigned what = random() % 16;
        Result<> result;
        if (what < 6) {
            const uint32_t next = generation[index] + 1;
            fill(memory.data(), offset, next);
            int tried = what < 3 ? channel.try_write(offset, IoVec(iov), WriteFlags::kNone) : -EAGAIN;
            if (tried == -EAGAIN) {
                result = co_await channel.write(offset, IoVec(iov), what == 5 ? WriteFlags::kFua : WriteFlags::kNone,
                                                what < 3);
                tried = 0;
            }
            if (tried != 0) w->failure = fmt::format("try_write: {}", tried);
            generation[index] = next;
        } else if (what == 6) {
            result = co_await channel.write_zeroes(offset, kBlock, WriteFlags::kNone);
            generation[index] = 0;
        } else if (what == 7) {
            result = co_await channel.flush();
        } else {
            int tried = what < 12 ? channel.try_read(offset, IoVec(iov)) : -EAGAIN;
            if (tried == -EAGAIN) {
                result = co_await channel.read(offset, IoVec(iov), what < 12);
                tried = 0;
            }
            if (tried != 0) w->failure = fmt::format("try_read: {}", tried);
            fill(expected, offset, generation[index]);
            if (std::memcmp(memory.data(), expected, kBlock) != 0)
                w->failure = fmt::format("block at {} is not generation {}", offset, generation[index]);
            w->verified.fetch_add(1, std::memory_order_relaxed);
        }
        if (!result) w->failure = result.error().message();
        // As clients do: a burst, then a pause; were every loop to spin, this would measure the kernel's scheduler.
        const unsigned pause = random() % 64;
        if (pause == 0) {
            co_await yield_turn();
        } else if (pause < 4) {
            co_await sleep_for(std::chrono::microseconds(random() % 1000));
        }
        if (channel.quiesced() && random() % 2) co_await channel.resumed();
    }
}

Task<void> work_there(Worker* w) { co_await run_on(w->channel->loop(), work(w)); }

/// A disk in memory, a stack of raw nodes on it, and a root on top.
struct Subject {
    std::string disk_node;
    std::vector<std::string> stack;  // of filters, lowest first
    std::unique_ptr<Root> root;
    std::vector<std::unique_ptr<Worker>> workers;
};

class Stress {
  public:
    explicit Stress(GraphFixture& f) : f_(f), graph_(*f.graph) {}

    Task<void> run() {
        const size_t loops = f_.runtime.io_loop_count();
        for (int i = 0; i < 3; ++i) co_await set_up(i, loops);
        const auto end = Clock::now() + stress_time();
        while (Clock::now() < end) co_await step();
        stop_ = true;
        co_await scope_.join();
        for (Subject& s : subjects_) {
            for (const auto& w : s.workers) {
                CHECK(w->failure == "");
                CHECK(w->verified > 0);
            }
            co_await graph_.detach(std::move(s.root));
        }
        INFO(fmt::format("{} changes", changes_));
        CHECK(changes_ >= static_cast<uint64_t>(stress_time().count()) / 20);
    }

    uint64_t changes() const { return changes_; }
    uint64_t verified() const {
        uint64_t sum = 0;
        for (const Subject& s : subjects_) {
            for (const auto& w : s.workers) sum += w->verified;
        }
        return sum;
    }

  private:
    unsigned pick(size_t n) { return static_cast<unsigned>(random_() % n); }
    std::string fresh() { return fmt::format("f{}", next_++); }
    const std::string& top(const Subject& s) { return s.stack.empty() ? s.disk_node : s.stack.back(); }

    Task<void> expect(Task<Result<>> task) {
        Result<> done = co_await std::move(task);
        if (!done) FAIL_CHECK(done.error().message());
        ++changes_;
    }
    Task<void> add(std::string text) {
        Result<Node*> node = co_await graph_.add(test::options_of(std::move(text)));
        if (!node) FAIL_CHECK(node.error().message());
        ++changes_;
    }
    Task<void> refuse(std::string text) {
        Result<Node*> node = co_await graph_.add(test::options_of(std::move(text)));
        CHECK_FALSE(node);
        ++changes_;
    }

    Task<void> set_up(int i, size_t loops) {
        Subject& s = subjects_.emplace_back();
        s.disk_node = fmt::format("m{}", i);
        co_await add(fmt::format("{{'driver':'memory','node-name':'{}','size':{}}}", s.disk_node, kDisk + kSlack));
        RootOptions options = GraphFixture::writer(fmt::format("subject {}", i));
        options.perms.share = Perm::kAll;
        Result<std::unique_ptr<Root>> root = co_await graph_.attach(f_.node(s.disk_node), options);
        REQUIRE(root);
        s.root = std::move(*root);
        for (size_t n = 0; n <= loops; ++n) {
            Loop& loop = n == loops ? f_.runtime.main_loop() : f_.runtime.io_loop(n);
            auto& w = s.workers.emplace_back(std::make_unique<Worker>());
            w->channel = co_await s.root->channel(loop);
            w->base = n * kBlocks * kBlock;
            w->seed = static_cast<uint32_t>(i * 100 + n);
            w->stop = &stop_;
            scope_.spawn(work_there(w.get()));
        }
    }

    Task<void> step() {
        Subject& s = subjects_[pick(subjects_.size())];
        switch (pick(9)) {
            case 0:
            case 1:
                co_await push(s);
                break;
            case 2:
                co_await pop(s);
                break;
            case 3:
                co_await drain(s);
                break;
            case 4:
                co_await reopen(s);
                break;
            case 5:
                co_await visit(s);
                break;
            case 6:
                co_await resize(s);
                break;
            case 7:
                co_await aside(s);
                break;
            default:
                co_await fail_on_purpose(s);
                break;
        }
    }

    Task<void> push(Subject& s) {
        if (s.stack.size() >= 4) co_return;
        const std::string name = fresh();
        const std::string below = top(s);
        co_await add(fmt::format("{{'driver':'raw','node-name':'{}','file':'{}'}}", name, below));
        co_await expect(graph_.insert_above(f_.node(below), f_.node(name)));
        s.stack.push_back(name);
    }
    Task<void> pop(Subject& s) {
        if (s.stack.empty()) co_return;
        const size_t index = pick(s.stack.size());
        const std::string name = s.stack[index];
        Node& filter = f_.node(name);
        co_await expect(graph_.replace(filter, *filter.child("file")->node));
        co_await expect(graph_.remove(name));
        s.stack.erase(s.stack.begin() + index);
    }
    Task<void> drain(Subject& s) {
        std::vector<Node*> nodes{&f_.node(s.disk_node)};
        auto guard = co_await graph_.mutex().lock();
        co_await graph_.drain(nodes);
        for (const auto& w : s.workers) CHECK((!w->channel->loop().in_loop() || w->channel->in_flight() == 0));
        co_await graph_.undrain(nodes);
        ++changes_;
    }
    Task<void> reopen(Subject& s) {
        std::vector<json::object> list;
        list.push_back(test::options_of(fmt::format("{{'driver':'memory','node-name':'{}','size':{},'latency-ns':{}}}",
                                                    s.disk_node, kDisk + kSlack, pick(4) == 0 ? 20000 : 0)));
        if (!s.stack.empty()) {
            const std::string below = s.stack.size() > 1 ? s.stack[s.stack.size() - 2] : s.disk_node;
            list.push_back(test::options_of(fmt::format(
                "{{'driver':'raw','node-name':'{}','file':'{}','discard':'unmap'}}", s.stack.back(), below)));
        }
        co_await expect(graph_.reopen(std::move(list)));
    }
    /// A short-lived user that reads what a worker may be writing.
    Task<void> visit(Subject& s) {
        RootOptions options = GraphFixture::reader("a visitor");
        options.perms.share = Perm::kAll;
        Result<std::unique_ptr<Root>> root = co_await graph_.attach(f_.node(top(s)), options);
        REQUIRE(root);
        Channel* channel = co_await (*root)->channel(f_.runtime.io_loop(pick(f_.runtime.io_loop_count())));
        Buffer memory = Buffer::alloc(kBlock);
        const iovec iov = memory.iov();
        Result<> read = co_await run_on(channel->loop(), channel->read(pick(kBlocks) * kBlock, IoVec(iov)));
        CHECK(read);
        co_await graph_.detach(std::move(*root));
        ++changes_;
    }
    Task<void> resize(Subject& s) {
        co_await expect(graph_.resize(f_.node(top(s)), static_cast<int64_t>(kDisk + pick(kSlack / 512) * 512)));
    }
    Task<void> aside(Subject& s) {
        const std::string name = fresh();
        co_await add(
            fmt::format("{{'driver':'raw','node-name':'{}','file':{{'driver':'null-co','size':4096}}}}", name));
        const std::string over = fresh();
        co_await add(
            fmt::format("{{'driver':'raw','node-name':'{}','read-only':true,'file':'{}'}}", over, s.disk_node));
        co_await expect(graph_.remove(over));
        co_await expect(graph_.remove(name));
    }
    Task<void> fail_on_purpose(Subject& s) {
        co_await refuse(
            fmt::format("{{'driver':'raw','node-name':'x','offset':99999999999,'file':'{}'}}", s.disk_node));
        co_await refuse(fmt::format("{{'driver':'raw','node-name':'{}','file':{{'driver':'null-co'}}}}", s.disk_node));
        if (!s.stack.empty()) {
            Result<> circle = co_await graph_.replace(f_.node(s.disk_node), f_.node(s.stack.back()));
            if (s.stack.size() > 1) CHECK_FALSE(circle);
            ++changes_;
        }
        RootOptions jealous = GraphFixture::reader("a jealous one");
        jealous.perms.share = Perm::kConsistentRead;
        Result<std::unique_ptr<Root>> root = co_await graph_.attach(f_.node(s.disk_node), jealous);
        CHECK_FALSE(root);
        ++changes_;
    }

    GraphFixture& f_;
    Graph& graph_;
    std::mt19937 random_{4711};
    std::vector<Subject> subjects_;
    std::atomic<bool> stop_{false};
    TaskScope scope_;
    uint64_t changes_ = 0;
    unsigned next_ = 0;
};

}  // namespace

TEST_CASE("graph: a thousand changes a second under verified load", "[block][graph][stress][memory]") {
    GraphFixture f;
    Stress stress(f);
    f.run(stress.run());
    SUCCEED(fmt::format("{} changes, {} blocks verified in {} ms", stress.changes(), stress.verified(),
                        stress_time().count()));
}
