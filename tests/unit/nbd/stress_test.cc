// Verified load over several connections while exports come and go.

#include <catch2/catch.hpp>
#include <random>

#include "tests/support/nbd_client.h"
#include "tests/support/nbd_daemon.h"

using namespace gantry;
using namespace gantry::nbd;
using test::Bytes;
using test::NbdClient;
using test::NbdDaemon;

namespace {

constexpr uint32_t kRegion = 256 << 10;

/// Random writes and reads inside one region that nobody else touches, checked against a copy, several requests in
/// flight. The text of what went wrong, "" when nothing did.
std::string verified_load(const std::string& path, uint32_t region, bool structured, std::atomic<bool>* stop) {
    try {
        std::mt19937 random(region);
        NbdClient client(path);
        client.enter("stays", structured);
        Bytes model(kRegion);
        const uint64_t base = uint64_t{region} * kRegion;
        while (!stop->load()) {
            struct Expected {
                bool read;
                uint32_t offset, size;
            };
            std::vector<Expected> batch;
            Bytes out;
            // Disjoint pieces, so that the order of execution does not matter.
            for (uint32_t at = 0; at < kRegion;) {
                const uint32_t size = std::min<uint32_t>(kRegion - at, 1 + random() % (random() % 8 ? 8192 : 80000));
                const bool read = random() % 2;
                Bytes data;
                if (!read) {
                    data.assign(size, static_cast<uint8_t>(random()));
                    std::copy(data.begin(), data.end(), model.begin() + at);
                }
                const Bytes one =
                    NbdClient::request_bytes(read ? kCmdRead : kCmdWrite, batch.size(), base + at, size, 0, data);
                out.insert(out.end(), one.begin(), one.end());
                batch.push_back({read, at, size});
                at += size + random() % 20000;
            }
            client.send(out);
            for (size_t left = batch.size(); left > 0; --left) {
                NbdClient::Reply r = client.reply();
                if (r.error) return "error " + std::to_string(r.error);
                if (r.cookie >= batch.size()) return "unknown cookie";
                const Expected e = batch[r.cookie];
                if (!e.read) continue;
                Bytes data(e.size);
                if (!structured) {
                    data = client.receive(e.size);
                } else {
                    for (;;) {
                        const uint64_t begin = load_big<uint64_t>(r.payload.data()) - base - e.offset;
                        if (r.type == kChunkOffsetData)
                            std::copy(r.payload.begin() + 8, r.payload.end(), data.begin() + begin);
                        if (r.done()) break;
                        r = client.reply();
                    }
                }
                if (!std::equal(data.begin(), data.end(), model.begin() + e.offset)) return "wrong data";
            }
        }
        client.disconnect();
        return client.closed() ? "" : "not closed after DISC";
    } catch (const std::exception& e) {
        return e.what();
    }
}

/// Connects to an export that may be removed at any moment: everything may end early, nothing may be wrong.
void visitor(const std::string& path, std::atomic<bool>* stop, std::atomic<uint64_t>* served) {
    while (!stop->load()) {
        try {
            NbdClient client(path);
            client.enter("visits", true, true);
            for (int i = 0; i < 20; ++i) {
                client.request(kCmdRead, 1, 0, 100000);
                client.chunks();
                client.request(kCmdBlockStatus, 1, 0, 1 << 20);
                client.chunks();
                client.write(0, Bytes(50000, 1));
                ++*served;
            }
        } catch (const std::exception&) {
            continue;  // no such export at the moment, or it just went
        }
    }
}

}  // namespace

TEST_CASE("nbd stress: verified load on several loops while exports come, go and are drained", "[nbd][slow]") {
    RuntimeOptions options = test::runtime_options_from_env();
    options.io_loops = 4;
    NbdDaemon daemon(options);
    REQUIRE(daemon.start_server(0) == "");
    REQUIRE(daemon.add_disk({{"node-name", "stays"}, {"size", 4 * kRegion}}) == "");
    REQUIRE(daemon.add_disk({{"node-name", "visits"}, {"fast", false}}) == "");
    REQUIRE(daemon.add_export({{"id", "stays"}, {"node-name", "stays"}, {"writable", true}}) == "");
    std::atomic<bool> stop{false};
    std::atomic<uint64_t> served{0};
    std::vector<std::future<std::string>> loads;
    for (uint32_t i = 0; i < 4; ++i) {
        loads.push_back(std::async(std::launch::async, verified_load, daemon.socket_path(), i, i % 2 == 1, &stop));
    }
    std::vector<std::thread> visitors;
    for (int i = 0; i < 2; ++i) visitors.emplace_back(visitor, daemon.socket_path(), &stop, &served);
    block::Node* node = &daemon.disk("stays");
    size_t rounds = 0;
    const auto end = Clock::now() + std::chrono::seconds(3);
    while (Clock::now() < end) {
        REQUIRE(daemon.add_export({{"id", "visits"}, {"node-name", "visits"}, {"writable", true}}) == "");
        daemon.call([&] { return daemon.graph().drain({&node, 1}); });
        daemon.call([&] { return daemon.graph().undrain({&node, 1}); });
        REQUIRE(daemon.remove_export("visits", exports::RemoveMode::kHard) == "");
        ++rounds;
        REQUIRE(daemon.eventually([&] { return daemon.registry().size() == 1; }));
    }
    stop = true;
    for (auto& load : loads) CHECK(load.get() == "");
    for (auto& v : visitors) v.join();
    CHECK(rounds >= 10);
    CHECK(daemon.deleted().size() == rounds);
    INFO(rounds << " rounds, " << served << " visits");
    REQUIRE(daemon.eventually([&] { return daemon.server().connections() == 0; }));
}

TEST_CASE("nbd stress: a client that never lets the server rest does not starve others of the same loop", "[nbd]") {
    RuntimeOptions options = test::runtime_options_from_env();
    options.io_loops = 1;
    NbdDaemon daemon(options);
    daemon.serve_disk();
    std::atomic<bool> stop{false};
    std::atomic<bool> flooding{false};
    const auto flood = [](const std::string& path, std::atomic<bool>* end, std::atomic<bool>* begun) {
        NbdClient client(path);
        client.enter("disk");
        Bytes batch;
        for (int i = 0; i < 64; ++i) {
            const Bytes one = NbdClient::request_bytes(kCmdRead, 1, 0, 16);
            batch.insert(batch.end(), one.begin(), one.end());
        }
        client.send(batch);
        while (!end->load()) {
            // Always a full batch ahead.
            client.send(batch);
            client.receive(64 * (kSimpleReplySize + 16));
            begun->store(true);
        }
    };
    auto flooder = std::async(std::launch::async, flood, daemon.socket_path(), &stop, &flooding);
    REQUIRE(daemon.eventually([&] { return flooding.load(); }));
    NbdClient victim(daemon.socket_path());
    victim.enter("disk");
    for (int i = 0; i < 200; ++i) REQUIRE(victim.read(0, 512));
    stop = true;
    flooder.get();
}
