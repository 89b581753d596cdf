// TLS over a socket pair: what both ends see, and what they say when something is wrong.

#include <sys/socket.h>

#include <catch2/catch.hpp>
#include <fstream>

#include "nbd/tls/authority.h"
#include "nbd/tls/stream.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::nbd;
using test::TempDir;
using test::TestRuntime;

namespace {

using Credentials = std::shared_ptr<const TlsCredentials>;

TlsCredentialsOptions options(TlsKind kind, TlsEndpoint endpoint, const std::string& dir) {
    TlsCredentialsOptions o;
    o.kind = kind;
    o.endpoint = endpoint;
    o.dir = dir;
    return o;
}

Credentials load(TlsCredentialsOptions o) {
    auto loaded = TlsCredentials::load(std::move(o));
    if (!loaded) FAIL(loaded.error().message());
    return *loaded;
}

std::string load_error(TlsCredentialsOptions o) {
    auto loaded = TlsCredentials::load(std::move(o));
    return loaded ? "" : loaded.error().message();
}

void make_pki(const std::string& dir, std::vector<std::string> names = {"localhost", "127.0.0.1"}) {
    auto made = make_certificates({.dir = dir, .server_names = std::move(names), .client_name = "alice", .days = 5});
    REQUIRE(made);
    REQUIRE(made->size() == 6);
}

/// The two ends of a connection after their handshakes.
struct Ends {
    UniqueFd server_fd, client_fd;
    std::unique_ptr<TlsStream> server, client;
    Result<> served, connected;
};

Task<void> shake(TlsStream* stream, int fd, Result<>* into) {
    *into = co_await stream->handshake(fd);
    // The other end must not wait for one that has given up.
    if (!*into) ::shutdown(fd, SHUT_RDWR);
}

Task<void> shake_both(Ends* ends) {
    TaskScope scope;
    scope.spawn(shake(ends->server.get(), ends->server_fd.get(), &ends->served));
    scope.spawn(shake(ends->client.get(), ends->client_fd.get(), &ends->connected));
    co_await scope.join();
}

Ends connect(TestRuntime& rt, const Credentials& server, const Credentials& client,
             const std::string& hostname = "localhost") {
    Ends ends;
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    ends.server_fd.reset(fds[0]);
    ends.client_fd.reset(fds[1]);
    ends.server = std::move(TlsStream::create(server).value());
    ends.client = std::move(TlsStream::create(client, hostname).value());
    rt.run(shake_both(&ends));
    return ends;
}

Task<void> send_all(TlsStream* stream, int fd, std::vector<uint8_t> data, int* result) {
    // In three uneven parts.
    const size_t first = data.size() / 5, second = data.size() / 2;
    const iovec parts[] = {
        {data.data(), first}, {data.data() + first, second - first}, {data.data() + second, data.size() - second}};
    *result = co_await stream->send(fd, parts, 3);
}

Task<void> receive_all(TlsStream* stream, int fd, size_t size, std::vector<uint8_t>* into) {
    into->resize(size);
    size_t have = 0;
    while (have < size) {
        const int n = co_await stream->recv(fd, into->data() + have, std::min<size_t>(size - have, 70001));
        if (n <= 0) break;
        have += static_cast<size_t>(n);
    }
    into->resize(have);
}

Task<bool> transfer(TlsStream* from, int from_fd, TlsStream* to, int to_fd, size_t size) {
    std::vector<uint8_t> data(size), got;
    for (size_t i = 0; i < size; ++i) data[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
    int sent = 0;
    TaskScope scope;
    scope.spawn(send_all(from, from_fd, data, &sent));
    scope.spawn(receive_all(to, to_fd, size, &got));
    co_await scope.join();
    co_return sent == static_cast<int>(size) && got == data;
}

Task<int> receive_one(TlsStream* stream, int fd) {
    uint8_t byte;
    const int n = co_await stream->recv(fd, &byte, 1);
    co_return n;
}

void append(const std::string& path, const std::string& text) { std::ofstream(path, std::ios::app) << text; }

/// With the files of `gantry tls init`.
Ends connect_x509(TestRuntime& rt) {
    const TempDir dir;
    make_pki(dir.file("pki"));
    return connect(rt, load(options(TlsKind::kX509, TlsEndpoint::kServer, dir.file("pki"))),
                   load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("pki"))));
}

}  // namespace

TEST_CASE("tls: certificates of gantry tls let both ends in", "[nbd][tls]") {
    TestRuntime rt;
    TempDir dir;
    make_pki(dir.file("pki"));
    const auto server = load(options(TlsKind::kX509, TlsEndpoint::kServer, dir.file("pki")));
    const auto client = load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("pki")));
    const std::string name = GENERATE("localhost", "127.0.0.1");
    Ends ends = connect(rt, server, client, name);
    REQUIRE(ends.served);
    REQUIRE(ends.connected);
    CHECK(ends.server->peer_name() == "CN=alice");
    CHECK(ends.client->peer_name() == "CN=localhost");
    CHECK(ends.server->summary() == "TLS1.3 AES-128-GCM");
}

TEST_CASE("tls: data of any length arrives, in both directions, on another loop too", "[nbd][tls]") {
    TestRuntime rt;
    Ends ends = connect_x509(rt);
    REQUIRE(ends.served);
    REQUIRE(ends.connected);
    rt.main_loop().forget_fd(ends.server_fd.get());
    rt.main_loop().forget_fd(ends.client_fd.get());
    for (const size_t size : {size_t{5}, size_t{16384}, size_t{16389}, size_t{100000}, size_t{3} << 20}) {
        INFO(size);
        CHECK(rt.run_on_io(
            transfer(ends.server.get(), ends.server_fd.get(), ends.client.get(), ends.client_fd.get(), size)));
        CHECK(rt.run_on_io(
            transfer(ends.client.get(), ends.client_fd.get(), ends.server.get(), ends.server_fd.get(), size)));
        ends.server->release_buffers();
        ends.client->release_buffers();
    }
}

TEST_CASE("tls: encrypt takes what it is allowed, try_flush says when the socket is full", "[nbd][tls]") {
    TestRuntime rt;
    Ends ends = connect_x509(rt);
    REQUIRE(ends.served);
    std::vector<uint8_t> data(1u << 20, 'x');
    const iovec all{data.data(), data.size()};
    CHECK(ends.server->encrypt(&all, 1, 50000) == 50000);
    CHECK(ends.server->unsent() > 50000);
    CHECK(ends.server->unsent() < 50000 + 4 * 64);  // four records
    int flushed = 0;
    for (int i = 0; i < 100 && flushed == 0; ++i) {
        flushed = ends.server->try_flush(ends.server_fd.get());
        if (flushed == 0) CHECK(ends.server->encrypt(&all, 1, data.size()) == static_cast<int>(data.size()));
    }
    CHECK(flushed == -EAGAIN);
    CHECK(ends.server->unsent() > 0);
}

TEST_CASE("tls: an end with a good-bye is told from one without", "[nbd][tls]") {
    TestRuntime rt;
    Ends ends = connect_x509(rt);
    REQUIRE(ends.served);
    SECTION("close_notify") {
        rt.run(ends.server->bye(ends.server_fd.get()));
        CHECK(rt.run(receive_one(ends.client.get(), ends.client_fd.get())) == 0);
        CHECK(rt.run(receive_one(ends.client.get(), ends.client_fd.get())) == 0);
        uint8_t byte = 0;
        const iovec one{&byte, 1};
        CHECK(ends.server->encrypt(&one, 1, 1) == -EPIPE);
    }
    SECTION("just gone") {
        rt.main_loop().forget_fd(ends.server_fd.get());
        ends.server_fd.reset();
        CHECK(rt.run(receive_one(ends.client.get(), ends.client_fd.get())) == -ECONNABORTED);
    }
    SECTION("bytes that are no record") {
        REQUIRE(::send(ends.server_fd.get(), "plain text, in the middle", 25, 0) == 25);
        CHECK(rt.run(receive_one(ends.client.get(), ends.client_fd.get())) == -EPROTO);
        CHECK(rt.run(receive_one(ends.client.get(), ends.client_fd.get())) == -EPROTO);
    }
    SECTION("a peer that takes nothing does not hold up the good-bye") {
        std::vector<uint8_t> data(4u << 20, 'x');
        const iovec all{data.data(), data.size()};
        REQUIRE(ends.server->encrypt(&all, 1, data.size()) > 0);
        const auto begin = Clock::now();
        rt.run(ends.server->bye(ends.server_fd.get()));
        CHECK(Clock::now() - begin < std::chrono::seconds(10));
    }
}

TEST_CASE("tls: a client says what is wrong with the server", "[nbd][tls]") {
    TestRuntime rt;
    TempDir dir;
    make_pki(dir.file("pki"));
    make_pki(dir.file("other"));
    const auto server = load(options(TlsKind::kX509, TlsEndpoint::kServer, dir.file("pki")));
    SECTION("another name") {
        Ends ends =
            connect(rt, server, load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("pki"))), "elsewhere");
        REQUIRE(!ends.connected);
        CHECK(ends.connected.error().message() ==
              "TLS handshake failed: the server certificate does not match the hostname 'elsewhere': it is for "
              "localhost, 127.0.0.1");
        REQUIRE(!ends.served);
        CHECK_THAT(ends.served.error().message(), Catch::Contains("the client refused us: "));
    }
    SECTION("another authority") {
        Ends ends = connect(rt, server, load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("other"))));
        REQUIRE(!ends.connected);
        CHECK_THAT(ends.connected.error().message(), Catch::Contains("does not have a known issuer: it was issued by"));
    }
    SECTION("nothing to compare with") {
        auto stream = TlsStream::create(load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("pki"))));
        REQUIRE(!stream);
        CHECK_THAT(stream.error().message(), Catch::StartsWith("No hostname for certificate validation"));
    }
    SECTION("verification switched off") {
        auto careless = options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("other"));
        careless.verify_peer = false;
        careless.ca_cert = dir.file("pki/ca-cert.pem");
        careless.cert = dir.file("pki/client-cert.pem");
        careless.key = dir.file("pki/client-key.pem");
        Ends ends = connect(rt, server, load(std::move(careless)), "");
        CHECK(ends.connected);
        CHECK(ends.client->peer_name().empty());
    }
}

TEST_CASE("tls: bytes in front of the server's hello end a client's handshake", "[nbd][tls]") {
    TestRuntime rt;
    TempDir dir;
    make_pki(dir.file("pki"));
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    UniqueFd server(fds[0]), client(fds[1]);
    REQUIRE(::send(server.get(), "\0\3\350\211\4Ue\251 injected by somebody", 30, 0) == 30);
    auto stream = std::move(
        TlsStream::create(load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("pki"))), "localhost").value());
    const Result<> shaken = rt.run(stream->handshake(client.get()));
    REQUIRE(!shaken);
    CHECK_THAT(shaken.error().message(), Catch::StartsWith("TLS handshake failed: "));
}

TEST_CASE("tls: pre-shared keys", "[nbd][tls]") {
    TestRuntime rt;
    TempDir dir;
    REQUIRE(make_psk_file(dir.file("psk"), {"qemu", "second: bad"}).error().kind() == ErrorKind::kInvalid);
    REQUIRE(make_psk_file(dir.file("psk"), {"qemu", "second"}));
    CHECK(make_psk_file(dir.file("psk"), {"qemu"}).error().kind() == ErrorKind::kExists);
    const auto server = load(options(TlsKind::kPsk, TlsEndpoint::kServer, dir.file("psk")));
    auto as = options(TlsKind::kPsk, TlsEndpoint::kClient, dir.file("psk"));
    SECTION("the right one") {
        as.username = "second";
        Ends ends = connect(rt, server, load(std::move(as)), "");
        REQUIRE(ends.served);
        REQUIRE(ends.connected);
        CHECK(ends.server->peer_name() == "second");
        CHECK(ends.server->summary() == "TLS1.3 AES-128-GCM");
    }
    SECTION("an identity without a key here") {
        as.username = "third";
        CHECK_THAT(load_error(std::move(as)), Catch::Contains("has no key for the username 'third'"));
    }
    SECTION("another key") {
        REQUIRE(make_psk_file(dir.file("other"), {"qemu", "stranger"}));
        as.dir = dir.file("other");
        as.username = GENERATE("qemu", "stranger");
        const bool known = as.username == "qemu";
        Ends ends = connect(rt, server, load(std::move(as)), "");
        CHECK(!ends.connected);
        REQUIRE(!ends.served);
        if (!known) CHECK_THAT(ends.served.error().message(), Catch::Contains("'stranger' is not in keys.psk"));
    }
}

TEST_CASE("tls: anonymous", "[nbd][tls]") {
    TestRuntime rt;
    Ends ends = connect(rt, load(options(TlsKind::kAnon, TlsEndpoint::kServer, "")),
                        load(options(TlsKind::kAnon, TlsEndpoint::kClient, "")), "");
    REQUIRE(ends.served);
    REQUIRE(ends.connected);
    CHECK(ends.server->peer_name().empty());
    CHECK(rt.run(transfer(ends.server.get(), ends.server_fd.get(), ends.client.get(), ends.client_fd.get(), 100000)));
}

TEST_CASE("tls: one more client of an authority", "[nbd][tls][once]") {
    TestRuntime rt;
    TempDir dir;
    make_pki(dir.file("pki"));
    REQUIRE(make_client_certificate({.dir = dir.file("pki"), .client_name = "bob"}, dir.file("bob")));
    Ends ends = connect(rt, load(options(TlsKind::kX509, TlsEndpoint::kServer, dir.file("pki"))),
                        load(options(TlsKind::kX509, TlsEndpoint::kClient, dir.file("bob"))));
    REQUIRE(ends.served);
    CHECK(ends.server->peer_name() == "CN=bob");
    CHECK(make_client_certificate({.dir = dir.file("pki"), .client_name = "bob"}, dir.file("bob")).error().kind() ==
          ErrorKind::kExists);
    CHECK(make_client_certificate({.dir = dir.file("bob"), .client_name = "eve"}, dir.file("eve"))
              .error()
              .errno_value() == ENOENT);
}

TEST_CASE("tls: a priority is taken, nonsense refused", "[nbd][tls][once]") {
    TestRuntime rt;
    auto server = options(TlsKind::kAnon, TlsEndpoint::kServer, "");
    server.priority = "NORMAL:NONSENSE";
    CHECK_THAT(load_error(std::move(server)), Catch::StartsWith("Unable to set TLS session priority"));
    TempDir dir;
    REQUIRE(make_psk_file(dir.file("psk"), {"qemu"}));
    auto chosen = options(TlsKind::kPsk, TlsEndpoint::kServer, dir.file("psk"));
    chosen.priority = "NORMAL:-VERS-ALL:+VERS-TLS1.2";
    Ends ends =
        connect(rt, load(std::move(chosen)), load(options(TlsKind::kPsk, TlsEndpoint::kClient, dir.file("psk"))), "");
    REQUIRE(ends.served);
    CHECK_THAT(ends.server->summary(), Catch::StartsWith("TLS1.2 "));
}

TEST_CASE("tls: key files with anything in them are read or refused", "[nbd][tls][once]") {
    TempDir dir;
    const auto path = dir.file("keys.psk");
    const auto server = [&] { return options(TlsKind::kPsk, TlsEndpoint::kServer, dir.path()); };
    CHECK_THAT(load_error(server()), Catch::Contains("Unable to access credentials " + path + ": No such file"));
    append(path, "# nobody yet\n\n");
    CHECK_THAT(load_error(server()), Catch::Contains("holds no key"));
    append(path, "a:00ff\r\nb:c:ABcd\n");
    CHECK(load_error(server()) == "");
    append(path, "x:" + std::string(2000, '0') + "\n");
    CHECK_THAT(load_error(server()), Catch::Contains("line 5 has a key of a bad length"));
}
