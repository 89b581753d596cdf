#include <catch2/catch.hpp>

#include "runtime/cross_loop.h"
#include "runtime/task_scope.h"
#include "tests/support/graph_fixture.h"

using namespace gantry;
using namespace gantry::block;
using gantry::test::GraphFixture;
using gantry::test::MemoryDisk;
using gantry::test::wait_until;

namespace {

struct Fixture : GraphFixture {
    Fixture() : disk(MemoryDisk::named("drain")) {
        disk->resize(65536);
        if (!add("{'driver':'memory','node-name':'m','disk':'drain'}").empty())
            throw std::runtime_error("no memory node");
        if (!add("{'driver':'raw','node-name':'r','file':'m'}").empty()) throw std::runtime_error("no raw node");
        disk->events.clear();
    }
    ~Fixture() { MemoryDisk::forget("drain"); }

    std::shared_ptr<MemoryDisk> disk;
};

/// One read through a channel on its own loop; says when it is over.
Task<void> read_once(Channel* channel, uint8_t* memory, std::atomic<int>* done) {
    const iovec iov{memory, 512};
    Result<> result = co_await channel->read(0, IoVec(iov));
    done->fetch_add(result ? 1 : 1000);
}

Task<void> run_there(Loop* loop, Task<void> task) { co_await run_on(*loop, std::move(task)); }

Task<void> flag_after(Task<void> task, bool* done) {
    co_await std::move(task);
    *done = true;
}

Task<bool> quiesced_there(Channel* channel) { co_return channel->quiesced(); }

Task<void> wait_like_an_exporter(Channel* channel, std::atomic<int>* done) {
    while (channel->quiesced()) co_await channel->resumed();
    done->fetch_add(1);
}

}  // namespace

TEST_CASE("drain: it waits for what is in flight on every loop, and holds what comes later", "[block][drain]") {
    Fixture f;
    auto root = f.attach("r", GraphFixture::reader());
    f.disk->events.clear();
    std::vector<Channel*> channels;
    for (size_t i = 0; i < f.runtime.io_loop_count(); ++i)
        channels.push_back(f.run(root->channel(f.runtime.io_loop(i))));
    const int count = static_cast<int>(channels.size());
    std::vector<std::array<uint8_t, 512>> memory(channels.size() * 2);
    std::atomic<int> early{0}, late{0}, exporters{0};
    bool drained = false;
    std::vector<Node*> nodes{&f.node("m")};

    TaskScope scope;
    auto go = [&]() -> Task<void> {
        f.disk->close_gate();
        for (size_t i = 0; i < channels.size(); ++i)
            scope.spawn(run_there(&channels[i]->loop(), read_once(channels[i], memory[i].data(), &early)));
        CHECK(co_await wait_until([&] { return f.disk->at_gate() == channels.size(); }));
        auto guard = co_await f.graph->mutex().lock();
        scope.spawn(flag_after(f.graph->drain(nodes), &drained));
        for (Channel* channel : channels) {
            bool quiesced = false;
            while (!quiesced) quiesced = co_await run_on(channel->loop(), quiesced_there(channel));
        }
        CHECK_FALSE(drained);
        for (size_t i = 0; i < channels.size(); ++i) {
            scope.spawn(
                run_there(&channels[i]->loop(), read_once(channels[i], memory[channels.size() + i].data(), &late)));
            scope.spawn(run_there(&channels[i]->loop(), wait_like_an_exporter(channels[i], &exporters)));
        }
        f.disk->open_gate();
        CHECK(co_await wait_until([&] { return drained; }));
        CHECK(early == count);
        CHECK(late == 0);
        CHECK(exporters == 0);
        CHECK(f.disk->events == std::vector<std::string>{"quiesce"});
        co_await f.graph->undrain(nodes);
        CHECK(co_await wait_until([&] { return late == count && exporters == count; }));
        CHECK(f.disk->events == std::vector<std::string>{"quiesce", "unquiesce"});
        guard.unlock();
        co_await scope.join();
    };
    f.run(go());
    f.detach(std::move(root));
}

TEST_CASE("drain: pairs nest, and a node is quiesced once", "[block][drain]") {
    Fixture f;
    auto root = f.attach("r", GraphFixture::reader());
    f.disk->events.clear();
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    std::vector<Node*> lower{&f.node("m")}, upper{&f.node("r")};
    f.run(f.graph->drain(lower));
    f.run(f.graph->drain(upper));
    CHECK(channel.quiesced());
    f.run(f.graph->undrain(lower));
    CHECK(channel.quiesced());
    // Only the pair around "m" had to stop it; "r" alone does not.
    CHECK(f.disk->events == std::vector<std::string>{"quiesce", "unquiesce"});
    f.run(f.graph->undrain(upper));
    CHECK_FALSE(channel.quiesced());
    f.detach(std::move(root));
}

TEST_CASE("drain: a channel made meanwhile is born quiesced", "[block][drain]") {
    Fixture f;
    auto root = f.attach("r", GraphFixture::reader());
    std::vector<Node*> nodes{&f.node("m")};
    f.run(f.graph->drain(nodes));
    Channel& channel = *f.run(root->channel(f.runtime.io_loop()));
    CHECK(f.runtime.run_on_io(quiesced_there(&channel)));
    f.run(f.graph->undrain(nodes));
    CHECK_FALSE(f.runtime.run_on_io(quiesced_there(&channel)));
    f.detach(std::move(root));
}

TEST_CASE("drain: users of other nodes are left alone", "[block][drain]") {
    Fixture f;
    REQUIRE(f.add("{'driver':'null-co','node-name':'n'}") == "");
    REQUIRE(f.add("{'driver':'raw','node-name':'r2','file':'m'}") == "");
    auto other = f.attach("n", GraphFixture::reader());
    auto beside = f.attach("r2", GraphFixture::reader());
    Channel& far = *f.run(other->channel(f.runtime.main_loop()));
    Channel& near = *f.run(beside->channel(f.runtime.main_loop()));
    std::vector<Node*> nodes{&f.node("r")};
    f.run(f.graph->drain(nodes));
    CHECK_FALSE(far.quiesced());
    CHECK_FALSE(near.quiesced());
    f.run(f.graph->undrain(nodes));
    f.detach(std::move(other));
    f.detach(std::move(beside));
}

TEST_CASE("drain: while quiesced a plain attempt says try later", "[block][drain]") {
    Fixture f;
    auto root = f.attach("r", GraphFixture::writer());
    Channel& channel = *f.run(root->channel(f.runtime.main_loop()));
    std::array<uint8_t, 512> memory{};
    const iovec iov{memory.data(), memory.size()};
    std::vector<Node*> nodes{&f.node("r")};
    f.run(f.graph->drain(nodes));
    CHECK(channel.try_read(0, IoVec(iov)) == -EAGAIN);
    CHECK(channel.try_write(0, IoVec(iov), WriteFlags::kNone) == -EAGAIN);
    f.run(f.graph->undrain(nodes));
    CHECK(channel.try_read(0, IoVec(iov)) == 0);
    f.detach(std::move(root));
}
