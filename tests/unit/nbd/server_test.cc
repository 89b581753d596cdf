// The server: listeners, limits, the handshake over sockets, stop.

#include <netinet/in.h>
#include <sys/stat.h>
#include <catch2/catch.hpp>

#include "runtime/socket.h"
#include "tests/support/nbd_client.h"
#include "tests/support/nbd_daemon.h"

using namespace gantry;
using namespace gantry::nbd;
using namespace std::chrono_literals;
using test::Bytes;
using test::NbdClient;
using test::NbdDaemon;

TEST_CASE("nbd server: starts once, stops, and leaves no socket behind", "[nbd][server]") {
    NbdDaemon daemon;
    CHECK_FALSE(daemon.server().running());
    CHECK(daemon.start_server() == "");
    CHECK(daemon.start_server() == "NBD server already running");
    struct stat st;
    CHECK(::stat(daemon.socket_path().c_str(), &st) == 0);
    daemon.stop_server();
    CHECK(::stat(daemon.socket_path().c_str(), &st) != 0);
    CHECK(daemon.start_server() == "");
}

TEST_CASE("nbd server: a socket that somebody listens on is refused, a stale one replaced", "[nbd][server]") {
    NbdDaemon daemon;
    {
        auto other = listen_unix(daemon.socket_path());
        REQUIRE(other);
        CHECK(daemon.start_server() != "");
        CHECK_FALSE(daemon.server().running());
    }
    CHECK(daemon.start_server() == "");
}

TEST_CASE("nbd server: a socket that replaced ours is left alone at the stop", "[nbd][server]") {
    NbdDaemon daemon;
    REQUIRE(daemon.start_server() == "");
    ::unlink(daemon.socket_path().c_str());
    auto other = listen_unix(daemon.socket_path());
    REQUIRE(other);
    daemon.stop_server();
    struct stat st;
    CHECK(::stat(daemon.socket_path().c_str(), &st) == 0);
}

TEST_CASE("nbd server: addresses that make no sense are refused", "[nbd][server]") {
    NbdDaemon daemon;
    const auto start = [&](json::object address) {
        ServerOptions options;
        options.address = std::move(address);
        return daemon.start_server(options);
    };
    CHECK(start({{"type", "inet"}, {"host", "127.0.0.1"}, {"port", "99999"}}) != "");
    CHECK(start({{"type", "inet"}, {"host", "127.0.0.1"}, {"port", ""}}) != "");
    CHECK(start({{"type", "inet"}, {"host", "127.0.0.1"}, {"port", "5000"}, {"to", 4000}}) != "");
    CHECK(start({{"type", "inet"}, {"host", "127.0.0.1"}, {"port", "0"}, {"ipv4", false}, {"ipv6", false}}) != "");
    CHECK(start({{"type", "unix"}, {"path", std::string(200, 'p')}}) != "");
    CHECK(start({{"type", "unix"}, {"path", std::string(200, 'p')}, {"abstract", true}}) != "");
    CHECK(start({{"type", "vsock"}, {"cid", "one"}, {"port", "1"}}) != "");
    CHECK(start({{"type", "fd"}, {"str", "7"}}) != "");
    CHECK_FALSE(daemon.server().running());
    CHECK(daemon.start_server() == "");
}

TEST_CASE("nbd server: listens on TCP, tries ports up to 'to'", "[nbd][server]") {
    NbdDaemon daemon;
    auto taken = daemon.call([] { return listen_inet("127.0.0.1", "0"); });
    REQUIRE(taken);
    const uint16_t port = local_port(taken->front().get()).value();
    ServerOptions options;
    options.address = {{"type", "inet"}, {"host", "127.0.0.1"}, {"port", std::to_string(port)}};
    CHECK(daemon.start_server(options) != "");
    options.address["to"] = port + 50 < 65536 ? port + 50 : 65535;
    REQUIRE(daemon.start_server(options) == "");
    const auto uris = daemon.on_main([&] { return daemon.server().uris(); });
    REQUIRE(uris.size() == 1);
    CHECK(uris[0].starts_with("nbd://127.0.0.1:"));
    const std::string there = uris[0].substr(16, uris[0].find('/', 16) - 16);
    auto fd = daemon.call([&] { return connect_inet("127.0.0.1", there); });
    REQUIRE(fd);
    uint8_t greeting[18];
    REQUIRE(set_nonblocking(fd->get(), false));
    CHECK(::recv(fd->get(), greeting, sizeof greeting, MSG_WAITALL) == 18);
}

TEST_CASE("nbd server: an abstract socket and a socket handed over", "[nbd][server]") {
    NbdDaemon daemon;
    ServerOptions options;
    options.address = {{"type", "unix"}, {"path", daemon.socket_path()}, {"abstract", true}};
    REQUIRE(daemon.start_server(options) == "");
    daemon.stop_server();

    auto listening = listen_unix(daemon.socket_path());
    REQUIRE(listening);
    options.address = {{"type", "fd"}, {"str", "nbd"}};
    options.resolve_fd = [&](std::string_view name) -> Result<UniqueFd> {
        CHECK(name == "nbd");
        return UniqueFd(::dup(listening->get()));
    };
    REQUIRE(daemon.start_server(options) == "");
    NbdClient client(daemon.socket_path());
    client.greet();
    CHECK(client.final_type(kOptList) == kRepAck);
    daemon.stop_server();
    struct stat st;
    CHECK(::stat(daemon.socket_path().c_str(), &st) == 0);  // not ours to remove
}

TEST_CASE("nbd server: a descriptor that does not listen is refused", "[nbd][server]") {
    NbdDaemon daemon;
    ServerOptions options;
    options.address = {{"type", "fd"}, {"str", "x"}};
    options.resolve_fd = [](std::string_view) -> Result<UniqueFd> {
        return UniqueFd(::socket(AF_UNIX, SOCK_STREAM, 0));
    };
    CHECK(daemon.start_server(options) != "");
}

TEST_CASE("nbd server: at max-connections clients wait for a slot and then are served", "[nbd][server]") {
    NbdDaemon daemon;
    REQUIRE(daemon.start_server(2) == "");
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "e"}, {"node-name", "disk"}}) == "");
    auto first = std::make_unique<NbdClient>(daemon.socket_path());
    CHECK(first->enter("disk").flags & kCanMultiConn);
    NbdClient second(daemon.socket_path());
    second.greet();
    NbdClient third(daemon.socket_path());
    uint8_t byte;
    CHECK(::recv(third.fd(), &byte, 1, MSG_DONTWAIT) < 0);
    CHECK(daemon.on_main([&] { return daemon.server().connections(); }) == 2);
    first.reset();
    CHECK(third.enter("disk").size == 1u << 20);
}

TEST_CASE("nbd server: with one connection allowed CAN_MULTI_CONN is withheld", "[nbd][server]") {
    NbdDaemon daemon;
    REQUIRE(daemon.start_server(1) == "");
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "e"}, {"node-name", "disk"}, {"writable", true}}) == "");
    NbdClient client(daemon.socket_path());
    CHECK_FALSE(client.enter("disk").flags & kCanMultiConn);
}

TEST_CASE("nbd server: what one connection wrote every other one reads", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    std::vector<std::unique_ptr<NbdClient>> clients;
    for (int i = 0; i < 6; ++i) {
        clients.push_back(std::make_unique<NbdClient>(daemon.socket_path()));
        CHECK(clients.back()->enter("disk").flags & kCanMultiConn);
    }
    for (uint8_t i = 0; i < 6; ++i) {
        REQUIRE(clients[i]->write(i * 4096u, Bytes(4096, i)) == 0);
        REQUIRE(clients[i]->command(kCmdFlush, 0, 0) == 0);
        for (auto& other : clients) REQUIRE(other->read(i * 4096u, 4096) == Bytes(4096, i));
    }
}

TEST_CASE("nbd server: the handshake time limit is absolute", "[nbd][server]") {
    NbdDaemon daemon;
    REQUIRE(daemon.start_server(100, 1s) == "");
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "e"}, {"node-name", "disk"}}) == "");
    NbdClient entered(daemon.socket_path());
    entered.enter("disk");
    NbdClient silent(daemon.socket_path());
    NbdClient busy(daemon.socket_path());
    busy.greet();
    const auto begin = std::chrono::steady_clock::now();
    // Talking does not prolong it.
    bool alive = true;
    while (alive && std::chrono::steady_clock::now() - begin < 15s) {
        alive = busy.try_send(NbdClient::option_bytes(kOptList)) && [&] {
            try {
                while (busy.option_reply().type != kRepAck) continue;
                return true;
            } catch (const std::runtime_error&) {
                return false;
            }
        }();
    }
    CHECK_FALSE(alive);
    CHECK(std::chrono::steady_clock::now() - begin < 10s);
    CHECK(silent.ends());
    CHECK(entered.command(kCmdFlush, 0, 0) == 0);  // transmission has no limit
}

TEST_CASE("nbd server: too long options end the connection, long ones are skipped", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient client(daemon.socket_path());
    client.greet();
    CHECK(client.final_type(99, Bytes(1 << 20)) == kRepErrUnsup);
    CHECK(client.final_type(kOptGo, Bytes(1 << 20)) == kRepErrTooBig);
    CHECK(client.go("disk").size == 1u << 20);
    NbdClient flood(daemon.socket_path());
    flood.greet();
    Bytes header;
    test::put(header, kOptionMagic);
    test::put(header, uint32_t{kOptGo});
    test::put(header, uint32_t{0xffffffff});
    flood.send(header);
    CHECK(flood.ends());
}

TEST_CASE("nbd server: bad option magic and bad client flags end only that connection", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient magic(daemon.socket_path());
    magic.greet();
    magic.send(Bytes(16, 'x'));
    CHECK(magic.ends());
    NbdClient flags(daemon.socket_path());
    flags.greet(0x80);
    CHECK(flags.ends());
    NbdClient good(daemon.socket_path());
    CHECK(good.enter("disk").size == 1u << 20);
}

TEST_CASE("nbd server: a flood of options is cut off", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient client(daemon.socket_path());
    client.greet();
    int served = 0;
    bool alive = true;
    while (alive && served < 10000) {
        alive = client.try_send(NbdClient::option_bytes(99));
        if (!alive) break;
        try {
            client.option_reply();
            ++served;
        } catch (const std::runtime_error&) {
            alive = false;
        }
    }
    CHECK(served == 4096);
}

TEST_CASE("nbd server: stop cuts off clients in transmission and in the handshake", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk();
    NbdClient silent(daemon.socket_path());
    NbdClient negotiating(daemon.socket_path());
    negotiating.greet();
    CHECK(negotiating.final_type(kOptList) == kRepAck);
    NbdClient half(daemon.socket_path());
    half.greet();
    half.send(Bytes(7, 0));
    NbdClient entered(daemon.socket_path());
    entered.enter("disk");
    daemon.call([&] { return daemon.registry().remove_all("nbd"); });
    daemon.stop_server();
    CHECK(silent.ends());
    CHECK(negotiating.ends());
    CHECK(half.ends());
    CHECK(entered.ends());
    CHECK(daemon.start_server() == "");
}

TEST_CASE("nbd server: a stop ends although a client reads nothing", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"size", 32 << 20}});
    NbdClient lazy(daemon.socket_path());
    lazy.enter("disk");
    for (uint64_t i = 0; i < 8; ++i) lazy.request(kCmdRead, i, 0, 32 << 20);
    REQUIRE(daemon.eventually([&disk = daemon.disk()] { return disk.reads > 0; }));
    daemon.call([&] { return daemon.registry().remove_all("nbd"); });
    daemon.stop_server();
    CHECK(daemon.deleted() == std::vector<std::string>{"disk"});
}

TEST_CASE("nbd server: names of exports are unique, and need a running server", "[nbd][server]") {
    NbdDaemon daemon;
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    CHECK(daemon.add_export({{"id", "a"}, {"node-name", "disk"}}) == "NBD server not running");
    REQUIRE(daemon.start_server() == "");
    CHECK(daemon.add_export({{"id", "a"}, {"node-name", "disk"}}) == "");
    CHECK(daemon.add_export({{"id", "b"}, {"node-name", "disk"}}) == "NBD server already has export named 'disk'");
    CHECK(daemon.add_export({{"id", "b"}, {"node-name", "disk"}, {"name", ""}}) == "");
    CHECK(daemon.add_export({{"id", "c"}, {"node-name", "disk"}, {"name", std::string(4097, 'n')}}) != "");
    CHECK(daemon.add_export(
              {{"id", "c"}, {"node-name", "disk"}, {"name", "c"}, {"description", std::string(4097, 'n')}}) != "");
    CHECK(daemon.add_export({{"id", "c"}, {"node-name", "disk"}, {"name", std::string(4096, 'n')}}) == "");
    NbdClient client(daemon.socket_path());
    client.greet();
    CHECK(client.option(kOptList).size() == 4);
    CHECK(client.go("").size == 1u << 20);
}

TEST_CASE("nbd server: URIs lead to each export", "[nbd][server]") {
    NbdDaemon daemon;
    REQUIRE(daemon.start_server() == "");
    CHECK(daemon.on_main([&] { return daemon.server().uris(); }) ==
          std::vector<std::string>{"nbd+unix:///?socket=" + daemon.socket_path()});
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "a"}, {"node-name", "disk"}, {"name", "my disk"}}) == "");
    CHECK(daemon.on_main([&] { return daemon.server().uris(); }) ==
          std::vector<std::string>{"nbd+unix:///my%20disk?socket=" + daemon.socket_path()});
}

TEST_CASE("nbd server: several servers have exports and clients of their own", "[nbd][server]") {
    NbdDaemon daemon;
    const auto start = [&](std::string id, std::string_view path) {
        ServerOptions options;
        options.address = {{"type", "unix"}, {"path", path}};
        const auto started = daemon.call([&] { return daemon.servers().start(id, options); });
        return started ? std::string() : started.error().message();
    };
    const auto stop = [&](std::string id) {
        const auto stopped = daemon.call([&] { return daemon.servers().stop(id, daemon.registry()); });
        return stopped ? std::string() : stopped.error().message();
    };
    const std::string other = daemon.socket_path() + ".b";
    REQUIRE(daemon.start_server() == "");
    REQUIRE(start("b", other) == "");
    CHECK(start("b", other) == "NBD server already running: 'b'");
    CHECK(start("0b", other) != "");
    REQUIRE(daemon.add_disk({{"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "a"}, {"node-name", "disk"}}) == "");
    REQUIRE(daemon.add_export({{"id", "b"}, {"node-name", "disk"}, {"server", "b"}}) == "");
    CHECK(daemon.add_export({{"id", "c"}, {"node-name", "disk"}, {"server", "c"}}) != "");
    NbdClient first(daemon.socket_path()), second(other);
    CHECK(first.enter("disk").size == 1u << 20);
    CHECK(second.enter("disk").size == 1u << 20);
    CHECK(daemon.on_main([&] { return daemon.servers().connections(); }) == 2);
    CHECK(stop("b") == "");
    CHECK(second.ends());
    CHECK(daemon.deleted() == std::vector<std::string>{"b"});
    CHECK(stop("b").starts_with("NBD server not running"));
    CHECK(first.read(0, 512));
    CHECK(daemon.on_main([&] { return daemon.servers().running().size(); }) == 1);
}

TEST_CASE("nbd server: before the end new requests and options are refused, what is in flight is answered",
          "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"fast", false}});
    NbdClient working(daemon.socket_path()), negotiating(daemon.socket_path());
    working.enter("disk");
    negotiating.greet();
    auto& disk = daemon.disk();
    disk.hold = true;
    working.request(kCmdRead, 7, 0, 512);
    REQUIRE(daemon.eventually([&] { return disk.held.load() == 1; }));
    std::thread stopper([&] {
        [[maybe_unused]] auto stopped = daemon.call([&] { return daemon.servers().stop("", daemon.registry()); });
    });
    // The request in flight keeps the server; it no longer counts as running once it has begun to end.
    REQUIRE(daemon.eventually([&] { return !daemon.server().running(); }));
    CHECK(negotiating.final_type(kOptList) == kRepErrShutdown);
    working.request(kCmdFlush, 8, 0, 0);
    const auto refused = working.reply();
    CHECK(refused.cookie == 8);
    CHECK(refused.error == kWireShutdown);
    disk.hold = false;
    const auto answered = working.reply();
    CHECK(answered.cookie == 7);
    CHECK(answered.error == 0);
    stopper.join();
    CHECK(negotiating.ends());
}

TEST_CASE("nbd server: requests that were answered late are no longer in flight", "[nbd][server]") {
    NbdDaemon daemon;
    daemon.serve_disk({{"fast", false}});
    NbdClient client(daemon.socket_path());
    client.enter("disk");
    auto& disk = daemon.disk();
    disk.hold = true;
    client.request(kCmdRead, 7, 0, 512);
    const auto in_flight = [&] {
        const json::object about = daemon.server().details();
        return about.at("clients").get_array().at(0).at("in-flight").to_number<int>();
    };
    CHECK(daemon.eventually([&] { return in_flight() == 1; }));
    disk.hold = false;
    CHECK(client.reply().cookie == 7);
    CHECK(daemon.eventually([&] { return in_flight() == 0; }));
}
