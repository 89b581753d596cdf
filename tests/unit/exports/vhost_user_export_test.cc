// The export: its options, who may come in, removal, sockets that were passed, changes of the size.

#include <sys/socket.h>
#include <sys/un.h>

#include <catch2/catch.hpp>

#include "exports/vhost_user/export.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/temp_dir.h"
#include "tests/support/vhost_user_front.h"

using namespace gantry;
using namespace gantry::vhost_user;
using namespace gantry::test;

namespace {

constexpr uint64_t kDisk = 1 << 20;

struct Fixture : GraphFixture {
    Fixture() {
        disk->resize(kDisk);
        if (!add("{'driver': 'memory', 'node-name': 'n', 'disk': 'vhost-export'}").empty())
            throw std::runtime_error("no node");
        registry.set_resolve_fd([this](std::string_view) -> Result<UniqueFd> {
            if (!passed) return fail(ErrorKind::kNotFound, "nobody has passed anything");
            return std::move(passed);
        });
    }
    ~Fixture() {
        disk->open_gate();
        run(registry.remove_all());
        MemoryDisk::forget("vhost-export");
    }

    /// block-export-add of an export "v"; what was wrong.
    std::string serve(const std::string& more = "", std::string address = "") {
        if (address.empty()) address = "{'type': 'unix', 'path': '" + path + "'}";
        return text_of(
            run(registry.add(options_of("{'type': 'vhost-user-blk', 'id': 'v', 'node-name': 'n', "
                                        "'writable': true, 'addr': " +
                                        address + more + "}"))));
    }
    std::string remove(exports::RemoveMode mode = exports::RemoveMode::kSafe) {
        return text_of(run(registry.remove("v", mode)));
    }
    VhostFront connect() {
        UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        path.copy(address.sun_path, sizeof address.sun_path - 1);
        if (::connect(fd.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0)
            throw std::runtime_error("cannot connect: " + errno_text(errno));
        return VhostFront(runtime, std::move(fd));
    }
    uint64_t capacity(VhostFront& front) {
        return front.ask(Request::kGetConfig, wire(ConfigRange{0, 8, 0}, uint64_t{0}))
            .as<uint64_t>(sizeof(ConfigRange));
    }
    bool connected() { return registry.find("v")->has_clients(); }
    bool eventually(std::function<bool()> condition) { return run(wait_until(std::move(condition))); }

    TempDir directory;
    std::string path = directory.file("v.sock");
    std::shared_ptr<MemoryDisk> disk = MemoryDisk::named("vhost-export");
    std::vector<exports::ExportType> types{kVhostUserExportType};
    std::vector<std::string> deleted;
    exports::Registry registry{*runtime.runtime, *graph, types,
                               [this](std::string_view id) { deleted.emplace_back(id); }};
    UniqueFd passed;
};

}  // namespace

TEST_CASE("vhost-user export: options that make no sense", "[vhost-user][once]") {
    Fixture f;
    CHECK(f.serve("", "{'type': 'inet', 'host': '', 'port': '1'}") ==
          "Only socket address types 'unix' and 'fd' are supported; 'inet' cannot carry descriptors");
    CHECK(f.serve(", 'num-queues': 0") == "num-queues must be greater than 0");
    CHECK_THAT(f.serve(", 'num-queues': 257"), Catch::Contains("must not be greater than 256"));
    CHECK(f.serve(", 'logical-block-size': 513") ==
          "Property v.logical-block-size doesn't take value '513', it's not a power of 2");
    CHECK(f.serve(", 'logical-block-size': 256") ==
          "Property v.logical-block-size doesn't take value 256 (minimum: 512, maximum: 65536)");
    CHECK_THAT(f.serve(", 'logical-block-size': 131072"), Catch::Contains("maximum: 65536"));
    for (const char* size : {"2", "100", "2048", "0"}) {
        CHECK_THAT(f.serve(std::string(", 'x-queue-size': ") + size), Catch::Contains("from 4 to 1024"));
    }
    CHECK_THAT(f.serve(", 'x-serial': '123456789012345678901'"), Catch::Contains("at most 20"));
    CHECK(f.serve(", 'x-serial': '12345678901234567890', 'num-queues': 256, 'x-queue-size': 1024") == "");
    VhostFront front = f.connect();
    CHECK(front.ask(Request::kGetQueueNum).as<uint64_t>() == 256);
}

TEST_CASE("vhost-user export: one front end at a time, any number one after another", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.serve() == "");
    CHECK_FALSE(f.connected());
    VhostFront first = f.connect();
    CHECK(f.capacity(first) == kDisk / 512);
    CHECK(f.connected());
    VhostFront second = f.connect();
    CHECK(second.closed());
    CHECK(f.capacity(first) == kDisk / 512);
    first.close();
    for (int i = 0; i < 50; ++i) {
        VhostFront next = f.connect();
        CHECK(f.capacity(next) == kDisk / 512);
    }
    CHECK(f.eventually([&] { return !f.connected(); }));
}

TEST_CASE("vhost-user export: one that makes no sense is cut off, and the next one served", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.serve() == "");
    for (int i = 0; i < 10; ++i) {
        VhostFront hostile = f.connect();
        hostile.send_raw(wire(Header{1, 1, UINT32_MAX}));
        CHECK(hostile.closed());
    }
    VhostFront good = f.connect();
    CHECK(f.capacity(good) == kDisk / 512);
}

TEST_CASE("vhost-user export: the next front end waits until the last one's requests are over", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.serve() == "");
    Guest guest;
    VhostRing ring(guest, {.size = 64, .packed = false, .event_idx = false, .indirect = false}, 0);
    VhostFront first = f.connect();
    REQUIRE(first.tell(Request::kSetFeatures, wire(virtio::kVersion1)) == true);
    REQUIRE(
        first.tell(Request::kAddMemReg,
                   wire(SingleRegion{
                       0, {guest.parts()[2].guest, guest.parts()[2].size, guest.parts()[2].guest + Guest::kUser, 0}}),
                   {guest.fd(2)}) == true);
    REQUIRE(first.tell(Request::kSetVringNum, wire(VringState{0, 64})) == true);
    REQUIRE(first.tell(Request::kSetVringAddr, wire(ring.address())) == true);
    REQUIRE(first.tell(Request::kSetVringKick, wire(uint64_t{0}), {ring.kick.get()}) == true);
    f.disk->close_gate();
    const VhostRequest write = submit_request(guest, ring, 1, 0, 512, 'z');
    REQUIRE(f.eventually([&] { return f.disk->at_gate() == 1; }));
    first.close();

    VhostFront second = f.connect();
    second.send(Request::kGetQueueNum);
    CHECK_FALSE(f.run(wait_until([&] { return f.disk->at_gate() == 0; }, std::chrono::milliseconds(20))));
    CHECK(f.connected());
    f.disk->open_gate();
    const auto answer = second.reply();
    REQUIRE(answer);
    CHECK(answer->as<uint64_t>() == 64);
    CHECK(guest.read(write.status, 1) == std::string(1, '\0'));
    CHECK(f.disk->bytes(0, 1)[0] == 'z');
}

TEST_CASE("vhost-user export: safe removal refuses while a front end is connected, hard does not", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.serve() == "");
    VhostFront front = f.connect();
    CHECK(f.capacity(front) == kDisk / 512);
    CHECK_THAT(f.remove(), Catch::Contains("still in use"));
    CHECK(f.capacity(front) == kDisk / 512);
    CHECK(f.remove(exports::RemoveMode::kHard) == "");
    CHECK(front.closed());
    CHECK(f.eventually([&] { return f.deleted.size() == 1; }));
    CHECK(::access(f.path.c_str(), F_OK) != 0);

    REQUIRE(f.serve() == "");
    CHECK(f.remove() == "");
    CHECK(f.eventually([&] { return f.deleted.size() == 2; }));
    CHECK_THROWS(f.connect());
}

TEST_CASE("vhost-user export: a socket that is in use is left alone", "[vhost-user]") {
    Fixture f;
    const auto other = listen_unix(f.path);
    REQUIRE(other);
    CHECK_THAT(f.serve(), Catch::Contains(f.path));
    CHECK(::access(f.path.c_str(), F_OK) == 0);
}

TEST_CASE("vhost-user export: sockets that were passed", "[vhost-user]") {
    Fixture f;
    const std::string address = "{'type': 'fd', 'str': 'guest'}";
    SECTION("listening") {
        auto listening = listen_unix(f.path);
        REQUIRE(listening);
        f.passed = std::move(*listening);
        REQUIRE(f.serve("", address) == "");
        VhostFront front = f.connect();
        CHECK(f.capacity(front) == kDisk / 512);
        CHECK(f.remove(exports::RemoveMode::kHard) == "");
        CHECK(f.eventually([&] { return f.deleted.size() == 1; }));
        // Whoever made it removes it.
        CHECK(::access(f.path.c_str(), F_OK) == 0);
    }
    SECTION("connected") {
        auto [ours, theirs] = make_sockets();
        f.passed = std::move(theirs);
        REQUIRE(f.serve("", address) == "");
        VhostFront front(f.runtime, std::move(ours));
        CHECK(f.capacity(front) == kDisk / 512);
        front.close();
        CHECK(f.eventually([&] { return !f.connected(); }));
        CHECK(f.remove() == "");
    }
    SECTION("what is none") {
        CHECK(f.serve("", address) == "nobody has passed anything");
        f.passed = make_eventfd();
        CHECK_THAT(f.serve("", address), Catch::Contains("not a unix socket"));
        f.passed = UniqueFd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        CHECK_THAT(f.serve("", address), Catch::Contains("neither a listening nor a connected socket"));
        f.passed = UniqueFd(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
        CHECK_THAT(f.serve("", address), Catch::Contains("not a unix socket"));
    }
}

TEST_CASE("vhost-user export: a front end sees a new size", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.serve() == "");
    VhostFront front = f.connect();
    auto [ours, theirs] = make_sockets();
    REQUIRE(front.tell(Request::kSetBackendReqFd, {}, {theirs.get()}) == true);
    REQUIRE(f.run(f.graph->resize(f.node("n"), 2 * kDisk)));
    CHECK(f.capacity(front) == 2 * kDisk / 512);
    Header notice;
    REQUIRE(::read(ours.get(), &notice, sizeof notice) == sizeof notice);
    CHECK(notice.request == kConfigChange);
    front.close();
    CHECK(f.eventually([&] { return !f.connected(); }));
    REQUIRE(f.run(f.graph->resize(f.node("n"), kDisk)));
    VhostFront next = f.connect();
    CHECK(f.capacity(next) == kDisk / 512);
}

TEST_CASE("vhost-user export: what operators see", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.serve(", 'num-queues': 3, 'x-queue-size': 128, 'logical-block-size': 4096") == "");
    json::object details = f.registry.find("v")->details();
    CHECK(details.at("socket").as_string() == f.path);
    CHECK(details.at("num-queues").to_number<int>() == 3);
    CHECK(details.at("queue-size").to_number<int>() == 128);
    CHECK(details.at("logical-block-size").to_number<int>() == 4096);
    CHECK(details.at("serial").as_string() == "v");
    CHECK_FALSE(details.at("connected").as_bool());
    CHECK_FALSE(details.contains("front-end"));
    VhostFront front = f.connect();
    REQUIRE(front.tell(Request::kSetFeatures, wire(virtio::kVersion1)) == true);
    details = f.registry.find("v")->details();
    CHECK(details.at("connected").as_bool());
    CHECK(details.at("front-end").as_object().at("features").to_number<uint64_t>() == virtio::kVersion1);
}
