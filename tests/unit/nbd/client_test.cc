// The client node and servers that mean well, but come and go.

#include <catch2/catch.hpp>
#include <map>
#include <mutex>

#include "block/repeated_cancel.h"
#include "runtime/task_scope.h"
#include "tests/unit/nbd/client_fixture.h"

using namespace gantry;
using namespace gantry::test;
using block::WriteFlags;
using Catch::Matchers::Contains;

namespace {

/// What a server was asked, for the test's thread.
struct Log {
    void add(const ScriptPeer::Request& rq) {
        const std::lock_guard lock(m);
        requests.push_back(rq);
    }
    std::vector<ScriptPeer::Request> take() {
        const std::lock_guard lock(m);
        return std::exchange(requests, {});
    }
    std::mutex m;
    std::vector<ScriptPeer::Request> requests;
};

NbdScriptServer::Script logged(ScriptExport offer, Log* log) {
    return [offer, log](ScriptPeer& peer, int) {
        peer.negotiate(offer);
        for (;;) {
            const auto rq = peer.request();
            log->add(rq);
            if (rq.command == nbd::kCmdDisc) return;
            peer.answer(rq);
        }
    };
}

Task<void> store_text(Task<std::string> task, std::string* text) { *text = co_await std::move(task); }

Task<void> many_reads(block::Node* node, size_t count, std::vector<std::string>* errors, std::vector<Bytes>* data) {
    TaskScope scope;
    errors->resize(count, "not finished");
    data->resize(count);
    for (size_t i = 0; i < count; ++i) {
        scope.spawn(store_text(ClientFixture::read_task(node, i * 512, 512, &(*data)[i]), &(*errors)[i]));
    }
    co_await scope.join();
}

std::chrono::milliseconds since(Clock::time_point begin) {
    return std::chrono::duration_cast<std::chrono::milliseconds>(Clock::now() - begin);
}

}  // namespace

TEST_CASE("nbd client: flags and lengths are passed on", "[nbd][client]") {
    const bool extended = GENERATE(false, true);
    Log log;
    ClientFixture f(logged({.size = uint64_t{1} << 40, .extended = extended}, &log));
    REQUIRE(f.open(", 'discard': 'unmap'") == "");
    const auto request = [&](Task<Result<>> task) {
        REQUIRE(GraphFixture::text_of(f.runtime.run_on_io(std::move(task))) == "");
        return log.take();
    };
    block::Request rq;
    rq.loop = &f.runtime.io_loop();
    block::Node& n = f.node("n");

    CHECK(f.write(512, 1024, WriteFlags::kFua) == "");
    auto seen = log.take();
    REQUIRE(seen.size() == 1);
    CHECK((seen[0].flags & ~nbd::kCmdPayloadLen) == nbd::kCmdFua);
    CHECK((seen[0].flags & nbd::kCmdPayloadLen) == (extended ? nbd::kCmdPayloadLen : 0));
    CHECK(seen[0].data == Wire(1024, 0x77));

    const uint64_t far = uint64_t{6} << 30;
    seen = request(n.write_zeroes(rq, 0, far, WriteFlags::kNone));
    uint64_t total = 0;
    for (const auto& one : seen) {
        CHECK(one.flags == nbd::kCmdNoHole);
        total += one.length;
    }
    CHECK(total == far);
    CHECK(seen.size() == (extended ? 1 : 2));
    seen = request(n.write_zeroes(rq, 0, 4096, WriteFlags::kMayUnmap | WriteFlags::kNoFallback | WriteFlags::kFua));
    REQUIRE(seen.size() == 1);
    CHECK(seen[0].flags == (nbd::kCmdFastZero | nbd::kCmdFua));
    seen = request(n.discard(rq, 0, 8192));
    REQUIRE(seen.size() == 1);
    CHECK(seen[0].command == nbd::kCmdTrim);
    CHECK(seen[0].length == 8192);
    seen = request(n.preload(rq, 0, 8192));
    REQUIRE(seen.size() == 1);
    CHECK(seen[0].command == nbd::kCmdCache);
    CHECK(f.flush() == "");
    CHECK(log.take().at(0).command == nbd::kCmdFlush);
    CHECK(f.remove("n") == "");
    f.server.reset();
    seen = log.take();
    // Closing flushes, and says good-bye.
    REQUIRE_FALSE(seen.empty());
    CHECK(seen.back().command == nbd::kCmdDisc);
}

TEST_CASE("nbd client: what the server lacks is not asked of it", "[nbd][client]") {
    Log log;
    ClientFixture f(logged({.flags = nbd::kHasFlags, .structured = false}, &log));
    REQUIRE(f.open(", 'discard': 'unmap'") == "");
    block::Request rq;
    rq.loop = &f.runtime.io_loop();
    block::Node& n = f.node("n");
    CHECK(GraphFixture::text_of(f.runtime.run_on_io(n.write_zeroes(rq, 0, 4096, WriteFlags::kMayUnmap))) == "");
    CHECK(GraphFixture::text_of(f.runtime.run_on_io(n.discard(rq, 0, 4096))) == "");
    CHECK(GraphFixture::text_of(f.runtime.run_on_io(n.preload(rq, 0, 4096))) == "");
    CHECK(f.write(0, 512, WriteFlags::kFua) == "");
    CHECK(f.flush() == "");
    auto status = f.status(0, 1 << 20);
    REQUIRE(status);
    CHECK(status->data);
    CHECK(status->length == 1 << 20);
    for (const auto& one : log.take()) {
        CHECK(one.command == nbd::kCmdWrite);
        CHECK(one.flags == 0);
    }
}

TEST_CASE("nbd client: a server without GO is entered by EXPORT_NAME", "[nbd][client]") {
    ClientFixture f([](ScriptPeer& peer, int) {
        peer.negotiate({.size = 12345, .structured = false, .go = false});
        peer.serve(0x11);
    });
    REQUIRE(f.open(", 'export': 'old'") == "");
    CHECK(f.node("n").size() == 12345);
    Bytes data;
    CHECK(f.read(12000, 345, &data) == "");
    CHECK(data == Bytes(345, 0x11));
}

TEST_CASE("nbd client: block sizes are kept to", "[nbd][client]") {
    Log log;
    ClientFixture f(logged({.size = 1 << 20, .block_sizes = {4096, 4096, 65536}}, &log));
    REQUIRE(f.open() == "");
    CHECK(f.node("n").size() == 1 << 20);
    Bytes data;
    CHECK(f.read(100, 200000, &data) == "");
    CHECK(data == Bytes(200000, 0x5a));
    CHECK(f.write(10, 20) == "");
    for (const auto& one : log.take()) {
        CHECK(one.offset % 4096 == 0);
        CHECK(one.length % 4096 == 0);
        CHECK(one.length <= 65536);
    }
}

TEST_CASE("nbd client: many requests are under way, and answers come in any order", "[nbd][client]") {
    const bool extended = GENERATE(false, true);
    constexpr size_t kMany = 300;
    ClientFixture f([extended](ScriptPeer& peer, int) {
        peer.negotiate({.extended = extended});
        // None is answered before a hundred have come.
        std::vector<ScriptPeer::Request> held;
        for (size_t answered = 0; answered < kMany;) {
            held.push_back(peer.request());
            if (held.size() < 100) continue;
            for (; !held.empty(); held.pop_back()) {
                peer.answer(held.back(), static_cast<uint8_t>(held.back().offset / 512));
                ++answered;
            }
        }
        peer.serve();
    });
    REQUIRE(f.open() == "");
    std::vector<std::string> errors;
    std::vector<Bytes> data;
    f.runtime.run_on_io(many_reads(&f.node("n"), kMany, &errors, &data));
    for (size_t i = 0; i < kMany; ++i) {
        CAPTURE(i);
        REQUIRE(errors[i] == "");
        REQUIRE(data[i] == Bytes(512, static_cast<uint8_t>(i)));
    }
}

TEST_CASE("nbd client: an error that comes before its request has left does no harm", "[nbd][client]") {
    ClientFixture f([](ScriptPeer& peer, int) {
        peer.negotiate();
        // The header of the WRITE alone; its 32 MiB wait in the client.
        const Wire header = peer.receive(nbd::kRequestSize);
        const nbd::RequestHeader h = nbd::decode_request(header.data());
        peer.fail({h.flags, h.command, h.cookie, h.offset, h.length, {}}, nbd::kWirePerm, "no");
        peer.receive(h.length);
        peer.serve();
    });
    REQUIRE(f.open() == "");
    CHECK_THAT(f.write(0, 1 << 20), Contains("Operation not permitted (it says: no)"));
    CHECK(f.read(0, 4096) == "");
}

TEST_CASE("nbd client: what was in flight is sent again to a server that comes back", "[nbd][client][reconnect]") {
    Log log;
    ClientFixture f([&log](ScriptPeer& peer, int number) {
        peer.negotiate();
        if (number == 0) {
            peer.answer(peer.request());
            // Half of an answer, and gone.
            const auto rq = peer.request();
            Wire part = peer.chunk(rq, 1, nbd::kChunkOffsetData, ScriptPeer::data_payload(rq.offset, rq.length, 1));
            part.resize(part.size() / 2);
            peer.send(part);
            return;
        }
        for (;;) {
            const auto rq = peer.request();
            log.add(rq);
            if (rq.command == nbd::kCmdDisc) return;
            peer.answer(rq, 0x22);
        }
    });
    REQUIRE(f.open(", 'reconnect-delay': 20") == "");
    CHECK(f.read(0, 512) == "");
    std::vector<std::string> errors;
    std::vector<Bytes> data;
    f.runtime.run_on_io(many_reads(&f.node("n"), 150, &errors, &data));
    for (size_t i = 0; i < errors.size(); ++i) {
        CAPTURE(i);
        REQUIRE(errors[i] == "");
        REQUIRE(data[i] == Bytes(512, 0x22));
    }
    CHECK(f.server->connections() == 2);
    // In their old order.
    uint64_t last = 0;
    for (const auto& rq : log.take()) {
        CHECK(rq.offset >= last);
        last = rq.offset;
    }
}

TEST_CASE("nbd client: without reconnect-delay a lost server costs an error, and the next requests find it again",
          "[nbd][client][reconnect]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        peer.negotiate();
        if (number == 0) {
            peer.answer(peer.request());
            peer.request();
            return;
        }
        peer.serve();
    });
    REQUIRE(f.open() == "");
    CHECK(f.read(0, 512) == "");
    CHECK_THAT(f.read(0, 512), Contains("no connection to NBD server") && Contains("the server closed the connection"));
    const auto works = [](block::Node* node) -> Task<bool> {
        for (const auto end = Clock::now() + std::chrono::seconds(10); Clock::now() < end;) {
            const std::string error = co_await ClientFixture::read_task(node, 0, 512, nullptr);
            if (error.empty()) co_return true;
            co_await sleep_for(std::chrono::milliseconds(1));
        }
        co_return false;
    };
    CHECK(f.runtime.run_on_io(works(&f.node("n"))));
}

TEST_CASE(
    "nbd client: a flush that fails with the connection does not spoil later ones, one that the server fails does",
    "[nbd][client][reconnect]") {
    const bool answered = GENERATE(false, true);
    ClientFixture f([answered](ScriptPeer& peer, int number) {
        peer.negotiate();
        if (number == 0) {
            peer.answer(peer.request());
            const auto flush = peer.request();
            if (!answered) return;
            peer.fail(flush, nbd::kWireIo, "the disk is broken");
        }
        peer.serve();
    });
    REQUIRE(f.open() == "");
    CHECK(f.write(0, 512) == "");
    CHECK_THAT(f.flush(), Contains(answered ? "the disk is broken" : "no connection to NBD server"));
    const auto flushes = [](block::Node* node) -> Task<bool> {
        for (const auto end = Clock::now() + std::chrono::seconds(3); Clock::now() < end;) {
            const std::string error = co_await ClientFixture::flush_task(node);
            if (error.empty()) co_return true;
            if (error.contains("broken")) co_return false;
            co_await sleep_for(std::chrono::milliseconds(1));
        }
        co_return false;
    };
    CHECK(f.runtime.run_on_io(flushes(&f.node("n"))) == !answered);
}

TEST_CASE("nbd client: requests wait for reconnect-delay and no longer", "[nbd][client][reconnect][once]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        if (number > 0) return;
        peer.negotiate();
        peer.answer(peer.request());
        peer.request();
    });
    REQUIRE(f.open(", 'reconnect-delay': 1") == "");
    CHECK(f.read(0, 512) == "");
    const auto begin = Clock::now();
    CHECK_THAT(f.read(0, 512), Contains("no connection to NBD server"));
    CHECK(since(begin).count() >= 990);
    // Attempts are not made at full speed.
    CHECK(f.server->connections() <= 4);
    const auto later = Clock::now();
    CHECK_THAT(f.read(0, 512), Contains("no connection to NBD server"));
    CHECK(since(later).count() < 500);
}

TEST_CASE("nbd client: a server that lets everybody in and hangs up is not asked at full speed",
          "[nbd][client][reconnect][once]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        peer.negotiate();
        if (number == 0) peer.answer(peer.request());
    });
    REQUIRE(f.open(", 'reconnect-delay': 2") == "");
    CHECK(f.read(0, 512) == "");
    CHECK_THAT(f.read(0, 512), Contains("no connection to NBD server"));
    CHECK(f.server->connections() <= 4);
}

TEST_CASE("nbd client: another export is not taken for the one that was opened", "[nbd][client][reconnect][once]") {
    const auto [second, text] = GENERATE(table<ScriptExport, const char*>({
        {{.size = 2 << 20}, "its size is 2097152 instead of 1048576"},
        {{.flags = nbd::kHasFlags | nbd::kReadOnly | nbd::kSendFlush | nbd::kSendFua}, "it is read-only now"},
        {{.context = false}, "it has lost its meta context"},
        {{.flags = nbd::kHasFlags | nbd::kSendFua}, "the server has no FLUSH any more"},
        {{.block_sizes = {512, 4096, 65536}}, "its smallest block has grown"},
        {{.block_sizes = {1, 4096, 65536}}, "its largest request has shrunk"},
    }));
    ClientFixture f([second = second](ScriptPeer& peer, int number) {
        peer.negotiate(number == 0 ? ScriptExport() : second);
        if (number == 0) {
            peer.request();
            return;
        }
        peer.serve();
    });
    REQUIRE(f.open(", 'reconnect-delay': 1") == "");
    CHECK_THAT(f.read(0, 512), Contains(text));
}

TEST_CASE("nbd client: a server that shuts down is left, and found again", "[nbd][client][reconnect]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        peer.negotiate();
        if (number == 0) {
            peer.answer(peer.request());
            peer.fail(peer.request(), nbd::kWireShutdown, "closing time");
            peer.wait_for_end();  // the client hangs up
            return;
        }
        peer.serve(0x33);
    });
    REQUIRE(f.open(", 'reconnect-delay': 20") == "");
    CHECK(f.read(0, 512) == "");
    Bytes data;
    CHECK(f.read(0, 512, &data) == "");
    CHECK(data == Bytes(512, 0x33));
}

TEST_CASE("nbd client: waiting requests can be given up", "[nbd][client][reconnect]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        if (number > 0) return;
        peer.negotiate();
        peer.request();
    });
    REQUIRE(f.open(", 'reconnect-delay': 600") == "");
    const auto begin = Clock::now();
    const auto give_up = [](ClientFixture* fixture) -> Task<std::string> {
        std::string error = "not finished";
        TaskScope scope;
        Loop& io = fixture->runtime.io_loop();
        scope.spawn(store_text(run_on(io, ClientFixture::read_task(&fixture->node("n"), 0, 512, nullptr)), &error));
        // Lost, and then tried again in vain: it waits now.
        const bool waits = co_await wait_until([fixture] { return fixture->server->connections() >= 2; });
        if (!waits) co_return "the client did not come back";
        block::Graph::cancel_in_flight(fixture->node("n"));
        co_await scope.join();
        co_return error;
    };
    CHECK_THAT(f.run(give_up(&f)), Contains("no connection to NBD server"));
    CHECK(f.remove("n") == "");
    CHECK(since(begin) < std::chrono::seconds(10));
}

TEST_CASE("nbd client: a lost connection comes back while another one serves requests", "[nbd][client][reconnect]") {
    constexpr uint64_t kFatal = 4096;
    std::atomic<int> up{0};
    ClientFixture f([&up](ScriptPeer& peer, int) {
        peer.negotiate({.flags = nbd::kHasFlags | nbd::kCanMultiConn});
        ++up;
        for (;;) {
            const auto rq = peer.request();
            if (rq.command == nbd::kCmdDisc || rq.offset == kFatal) return;
            peer.answer(rq);
        }
    });
    REQUIRE(f.open(", 'multi-conn': 2") == "");
    REQUIRE(f.run(wait_until([&] { return up == 2; })));
    for (int expected = 3; expected <= 4; ++expected) {
        CAPTURE(expected);
        CHECK_THAT(f.read(kFatal, 512), Contains("no connection to NBD server"));
        const auto serves = [](block::Node* node, std::atomic<int>* count, int enough) -> Task<std::string> {
            for (const auto end = Clock::now() + std::chrono::seconds(10); *count < enough && Clock::now() < end;) {
                std::string error = co_await ClientFixture::read_task(node, 0, 512, nullptr);
                if (!error.empty()) co_return error;
                co_await sleep_for(std::chrono::milliseconds(1));
            }
            co_return "";
        };
        CHECK(f.runtime.run_on_io(serves(&f.node("n"), &up, expected)) == "");
        CHECK(up == expected);
    }
}

TEST_CASE("nbd client: a server that is silent on one connection is not waited for on others",
          "[nbd][client][reconnect][once]") {
    constexpr size_t kConnections = 4;
    std::atomic<size_t> up{0};
    ClientFixture f([&up](ScriptPeer& peer, int number) {
        if (number >= static_cast<int>(kConnections)) peer.wait_for_end();
        peer.negotiate({.flags = nbd::kHasFlags | nbd::kSendFlush | nbd::kCanMultiConn});
        ++up;
        for (;;) {
            const auto rq = peer.request();
            if (rq.command == nbd::kCmdDisc) return;
            // The only answer there is: it makes the node dirty.
            if (rq.command == nbd::kCmdWrite) peer.answer(rq);
        }
    });
    REQUIRE(f.open(", 'reconnect-delay': 600, 'multi-conn': 4") == "");
    REQUIRE(f.run(wait_until([&] { return up == kConnections; })));
    CHECK(f.write(0, 512) == "");
    const auto begin = Clock::now();
    const auto give_up = [](ClientFixture* fixture) -> Task<std::string> {
        block::Node& n = fixture->node("n");
        Loop& io = fixture->runtime.io_loop();
        block::RepeatedCancel cancel([&n] { n.cancel_in_flight(); });
        const std::string first_error = co_await run_on(io, ClientFixture::read_task(&n, 0, 512, nullptr));
        // Layers above may try more, each as long as there is a connection that looks good.
        const auto then = Clock::now();
        std::string errors = first_error;
        for (size_t i = 0; i < kConnections; ++i) {
            errors += "\n";
            errors += co_await run_on(io, ClientFixture::read_task(&n, 0, 512, nullptr));
        }
        co_await cancel.over();
        if (Clock::now() - then > std::chrono::seconds(2)) co_return "follow-ups take their time";
        co_return errors;
    };
    CHECK_THAT(f.run(give_up(&f)),
               Contains("it has not answered for 5 s and is given up") && Contains("has not answered and is given up"));
    // It flushes, and then says good-bye.
    CHECK(f.remove("n") == "");
    CHECK(since(begin) < std::chrono::seconds(15));
}

TEST_CASE("nbd client: closing does not wait for a server that is lost meanwhile", "[nbd][client][reconnect][once]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        if (number > 0) return;
        peer.negotiate({.flags = nbd::kHasFlags | nbd::kSendFlush});
        peer.answer(peer.request());
        // The last flush is read, and then the server is gone.
        CHECK(peer.request().command == nbd::kCmdFlush);
    });
    REQUIRE(f.open(", 'reconnect-delay': 600") == "");
    CHECK(f.write(0, 512) == "");
    const auto begin = Clock::now();
    CHECK(f.remove("n") == "");
    CHECK(since(begin) < std::chrono::seconds(15));
}

TEST_CASE("nbd client: a drain waits for requests that wait, and no longer", "[nbd][client][reconnect][once]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        if (number > 0) return;
        peer.negotiate();
        peer.request();
    });
    REQUIRE(f.open(", 'reconnect-delay': 1") == "");
    auto root = f.attach("n", GraphFixture::reader());
    const auto drain = [](ClientFixture* fx, block::Root* held, Clock::duration* took) -> Task<std::string> {
        Loop& io = fx->runtime.io_loop();
        block::Channel* channel = co_await held->channel(io);
        std::string error = "not finished";
        Bytes memory(512);
        const iovec iov{memory.data(), memory.size()};
        const auto read = [](Loop* loop, block::Channel* ch, const iovec* to) -> Task<std::string> {
            Result<> done = co_await run_on(*loop, ch->read(0, IoVec(*to)));
            co_return GraphFixture::text_of(done);
        };
        TaskScope scope;
        scope.spawn(store_text(read(&io, channel, &iov), &error));
        const bool waits = co_await wait_until([fx] { return fx->server->connections() >= 2; });
        if (!waits) co_return "the client did not come back";
        block::Node* nodes[] = {&fx->node("n")};
        const auto begin = Clock::now();
        {
            auto guard = co_await fx->graph->mutex().lock();
            co_await fx->graph->drain(nodes);
            *took = Clock::now() - begin;
            co_await fx->graph->undrain(nodes);
        }
        co_await scope.join();
        co_return error;
    };
    Clock::duration took{};
    CHECK_THAT(f.run(drain(&f, root.get(), &took)), Contains("no connection to NBD server"));
    CHECK(took < std::chrono::seconds(5));
    f.detach(std::move(root));
}

TEST_CASE("nbd client: open-timeout tries again", "[nbd][client][once]") {
    ClientFixture f([](ScriptPeer& peer, int number) {
        if (number == 0) return;
        peer.negotiate();
        peer.serve();
    });
    CHECK_THAT(f.open(), Contains("while it was to greet"));
    CHECK(f.open(", 'open-timeout': 20") == "");

    ClientFixture never([](ScriptPeer&, int) {});
    const auto begin = Clock::now();
    CHECK_THAT(never.open(", 'open-timeout': 1"), Contains("while it was to greet"));
    CHECK(since(begin).count() >= 990);
    CHECK(since(begin) < std::chrono::seconds(8));
}

TEST_CASE("nbd client: deleting a node that is being opened ends the opening", "[nbd][client]") {
    const bool silent = GENERATE(false, true);
    ClientFixture f([silent](ScriptPeer& peer, int) {
        if (silent) peer.wait_for_end();
    });
    const auto begin = Clock::now();
    const auto open_and_delete = [](ClientFixture* fixture) -> Task<std::string> {
        std::string error = "not finished";
        TaskScope scope;
        const auto add = [](ClientFixture* fx) -> Task<std::string> {
            auto added =
                co_await fx->graph->add(options_of("{'driver': 'raw', 'node-name': 'top', 'file': {'driver': "
                                                   "'nbd', 'server': {'type': 'unix', 'path': '" +
                                                   fx->server->path() + "'}, 'open-timeout': 600}}"));
            co_return GraphFixture::text_of(added);
        };
        scope.spawn(store_text(add(fixture), &error));
        const bool tried = co_await wait_until([fixture] { return fixture->server->connections() >= 1; });
        if (!tried) co_return "the client did not come";
        Result<> removed = co_await fixture->graph->remove("top");
        if (!removed) co_return "removing: " + removed.error().message();
        co_await scope.join();
        co_return error;
    };
    CHECK(f.run(open_and_delete(&f)) != "");
    CHECK(f.names() == "");
    CHECK(since(begin) < std::chrono::seconds(10));
}

TEST_CASE("nbd client: a connected descriptor can be the server", "[nbd][client]") {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds) == 0);
    std::thread server([fd = fds[1]] {
        ScriptPeer peer(fd);
        try {
            peer.negotiate();
            peer.serve(0x44);
        } catch (const ScriptPeer::Gone&) {
        }
        ::close(fd);
    });
    {
        GraphFixture f(nullptr, {nbd::kNbdDriver});
        f.graph->descriptor_source = [&](std::string_view name) -> Result<UniqueFd> {
            if (name != "socket") return fail(ErrorKind::kNotFound, "no descriptor '{}'", name);
            return UniqueFd(std::exchange(fds[0], -1));
        };
        const std::string node = "{'driver': 'nbd', 'node-name': 'n', 'server': {'type': 'fd', 'str': ";
        CHECK(f.add(node + "'other'}}") == "no descriptor 'other'");
        REQUIRE(f.add(node + "'socket'}, 'multi-conn': 4}") == "");
        Bytes data;
        CHECK(f.runtime.run_on_io(ClientFixture::read_task(&f.node("n"), 0, 512, &data)) == "");
        CHECK(data == Bytes(512, 0x44));
    }
    server.join();
}

TEST_CASE("nbd client: another meta context takes the place of base:allocation", "[nbd][client]") {
    const bool depth = GENERATE(false, true);
    ClientFixture f([](ScriptPeer& peer, int) {
        peer.negotiate();
        // Whatever the word is, it is read as that of base:allocation.
        for (const uint32_t word : {0u, 1u, 5u}) {
            const auto rq = peer.request();
            peer.send(peer.chunk(rq, 1, nbd::kChunkBlockStatus, peer.status_payload({{rq.length, word}})));
        }
        peer.serve();
    });
    REQUIRE(f.open(std::string(", 'x-dirty-bitmap': '") + (depth ? "qemu:allocation-depth" : "qemu:dirty-bitmap:b") +
                   "'") == "");
    std::string seen;
    for (int i = 0; i < 3; ++i) {
        auto status = f.status(0, 4096);
        REQUIRE(status);
        seen += fmt::format("{}/{} ", status->data, status->zero);
    }
    // Depths above 2 count as 2.
    CHECK(seen == (depth ? "true/false false/false true/true " : "true/false false/false false/false "));
}

TEST_CASE("nbd client: reopening does not make a read-only export writable", "[nbd][client]") {
    const bool writable = GENERATE(false, true);
    ClientFixture f([writable](ScriptPeer& peer, int) {
        peer.negotiate({.flags = static_cast<uint16_t>(nbd::kHasFlags | (writable ? 0 : nbd::kReadOnly))});
        peer.serve();
    });
    REQUIRE(f.open(", 'read-only': true") == "");
    CHECK_THAT(f.write(0, 512), Contains("read-only"));
    const std::string wanted =
        "{'driver': 'nbd', 'node-name': 'n', 'server': {'type': 'unix', 'path': '" + f.server->path() + "'}";
    const std::string error = f.reopen({wanted + "}"});
    if (writable) {
        CHECK(error == "");
        CHECK(f.write(0, 512) == "");
    } else {
        CHECK_THAT(error, Contains("Can't reopen read-only NBD mount as read/write"));
    }
    CHECK_THAT(f.reopen({wanted + ", 'export': 'other'}"}), Contains("Cannot change the option 'export'"));
}

TEST_CASE("nbd client: the name of a node leads to its export", "[nbd][client]") {
    ClientFixture f([](ScriptPeer& peer, int) {
        peer.negotiate();
        peer.serve();
    });
    REQUIRE(f.open(", 'export': 'a b/c', 'reconnect-delay': 1") == "");
    CHECK(f.node("n").filename() == "nbd+unix:///a%20b/c?socket=" + f.server->path());
}
