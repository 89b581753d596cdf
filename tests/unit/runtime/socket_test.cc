#include "runtime/socket.h"

#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/stat.h>

#include <catch2/catch.hpp>
#include <fstream>

#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TempDir;
using test::TestRuntime;
using namespace std::chrono_literals;

int option(int fd, int level, int name) {
    int value = -1;
    socklen_t len = sizeof value;
    return ::getsockopt(fd, level, name, &value, &len) == 0 ? value : -1;
}

TEST_CASE("listen_unix: the file has the asked mode whatever the umask", "[runtime][socket]") {
    TempDir dir;
    const mode_t mode = GENERATE(0600, 0660, 0777);
    const mode_t before = ::umask(077);
    auto fd = listen_unix(dir.file("s"), mode);
    ::umask(before);
    REQUIRE(fd);
    struct stat st;
    REQUIRE(::stat(dir.file("s").c_str(), &st) == 0);
    CHECK((st.st_mode & 07777) == mode);
    CHECK(check_listening_socket(fd->get()));
    CHECK(::fcntl(fd->get(), F_GETFD) == FD_CLOEXEC);
    CHECK((::fcntl(fd->get(), F_GETFL) & O_NONBLOCK) != 0);
    CHECK(local_name(fd->get()) == "unix:" + dir.file("s"));
}

TEST_CASE("listen_unix: a stale socket is replaced, a live one and other files are not", "[runtime][socket]") {
    TempDir dir;
    const std::string path = dir.file("s");
    {
        auto first = listen_unix(path);
        REQUIRE(first);
        const auto second = listen_unix(path);
        REQUIRE_FALSE(second);
        CHECK(second.error().kind() == ErrorKind::kBusy);
        CHECK_THAT(second.error().message(), Catch::Contains(path));
    }
    CHECK(std::filesystem::exists(path));  // left by the first
    CHECK(listen_unix(path));
    std::ofstream(dir.file("precious")) << "data";
    const auto refused = listen_unix(dir.file("precious"));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().kind() == ErrorKind::kExists);
    CHECK(std::filesystem::file_size(dir.file("precious")) == 4);
}

TEST_CASE("listen_unix: bad paths are refused with the path in the text", "[runtime][socket]") {
    TempDir dir;
    const auto too_long = listen_unix(dir.file(std::string(120, 'x')));
    REQUIRE_FALSE(too_long);
    CHECK(too_long.error().kind() == ErrorKind::kInvalid);
    CHECK_THAT(too_long.error().message(), Catch::Contains("too long"));
    CHECK_FALSE(listen_unix(""));
    CHECK_FALSE(listen_unix(std::string("a\0b", 3)));
    const auto missing = listen_unix(dir.file("no/such/dir"));
    REQUIRE_FALSE(missing);
    CHECK(missing.error().kind() == ErrorKind::kNotFound);
    CHECK_THAT(missing.error().message(), Catch::Contains("no/such/dir"));
}

struct Connected {
    UniqueFd client, server;
};
Task<void> accept_one(int listener, UniqueFd* out) {
    const int fd = co_await io_accept(listener);
    if (fd >= 0) out->reset(fd);
}
Task<Result<Connected>> connect_both(int listener, Task<Result<UniqueFd>> connecting) {
    Connected c;
    TaskScope scope;
    scope.spawn(accept_one(listener, &c.server));
    auto client = co_await std::move(connecting);
    if (!client) ::shutdown(listener, SHUT_RDWR);
    co_await scope.join();
    CO_TRY(c.client, std::move(client));
    co_return c;
}

TEST_CASE("unix sockets: connect, accept, and who is there", "[runtime][socket]") {
    TestRuntime rt;
    TempDir dir;
    auto listener = listen_unix(dir.file("s"));
    REQUIRE(listener);
    auto c = rt.run(connect_both(listener->get(), connect_unix(dir.file("s"), 5s)));
    REQUIRE(c);
    REQUIRE(c->server);
    CHECK(peer_name(c->server.get()) ==
          "unix:pid=" + std::to_string(::getpid()) + ",uid=" + std::to_string(::getuid()));
    CHECK(::fcntl(c->server.get(), F_GETFD) == FD_CLOEXEC);
    CHECK((::fcntl(c->server.get(), F_GETFL) & O_NONBLOCK) != 0);
    CHECK(check_connected_socket(c->client.get()));
    CHECK_FALSE(check_listening_socket(c->client.get()));
    CHECK(set_tcp_nodelay(c->client.get()));  // not TCP: nothing to do
}

TEST_CASE("unix sockets: connecting to nothing names the path", "[runtime][socket]") {
    TestRuntime rt;
    TempDir dir;
    auto missing = rt.run(connect_unix(dir.file("s")));
    REQUIRE_FALSE(missing);
    CHECK(missing.error().kind() == ErrorKind::kNotFound);
    CHECK_THAT(missing.error().message(), Catch::Contains(dir.file("s")));
    {
        REQUIRE(listen_unix(dir.file("s")));
    }
    auto refused = rt.run(connect_unix(dir.file("s")));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().errno_value() == ECONNREFUSED);
}

TEST_CASE("unix sockets: a full backlog is waited for until the deadline", "[runtime][socket]") {
    TestRuntime rt;
    TempDir dir;
    auto listener = listen_unix(dir.file("s"), 0, 0);
    REQUIRE(listener);
    std::vector<UniqueFd> waiting;
    for (int i = 0; i < 10; ++i) {
        auto fd = rt.run(connect_unix(dir.file("s"), 20ms));
        if (!fd) {
            CHECK(fd.error().kind() == ErrorKind::kTimedOut);
            break;
        }
        waiting.push_back(std::move(*fd));
    }
    CHECK(waiting.size() < 10);
}

TEST_CASE("tcp: listen on a free port, connect, options and names", "[runtime][socket]") {
    TestRuntime rt;
    auto listeners = rt.run(listen_inet("127.0.0.1", "0"));
    REQUIRE(listeners);
    REQUIRE(listeners->size() == 1);
    const int listener = listeners->front().get();
    const auto port = local_port(listener);
    REQUIRE(port);
    CHECK(*port != 0);
    CHECK(local_name(listener) == fmt::format("127.0.0.1:{}", *port));
    auto c = rt.run(connect_both(listener, connect_inet("127.0.0.1", std::to_string(*port), {}, 5s)));
    REQUIRE(c);
    REQUIRE(c->server);
    CHECK(peer_name(c->client.get()) == fmt::format("127.0.0.1:{}", *port));
    CHECK(peer_name(c->server.get()) == local_name(c->client.get()));
    CHECK(option(c->client.get(), IPPROTO_TCP, TCP_NODELAY) == 1);
    CHECK(set_tcp_nodelay(c->server.get()));
    CHECK(option(c->server.get(), IPPROTO_TCP, TCP_NODELAY) == 1);
    CHECK(set_keepalive(c->server.get(), true, {.idle = 77s, .interval = 7s, .count = 3}));
    CHECK(option(c->server.get(), SOL_SOCKET, SO_KEEPALIVE) == 1);
    CHECK(option(c->server.get(), IPPROTO_TCP, TCP_KEEPIDLE) == 77);
    CHECK(option(c->server.get(), IPPROTO_TCP, TCP_KEEPCNT) == 3);
    auto taken = rt.run(listen_inet("127.0.0.1", std::to_string(*port)));
    REQUIRE_FALSE(taken);
    CHECK(taken.error().kind() == ErrorKind::kBusy);
}

TEST_CASE("tcp: every address of this machine on one port", "[runtime][socket]") {
    TestRuntime rt;
    auto all = rt.run(listen_inet("", "0"));
    REQUIRE(all);
    REQUIRE_FALSE(all->empty());
    for (const auto& fd : *all) CHECK(*local_port(fd.get()) == *local_port(all->front().get()));
    auto v4 = rt.run(listen_inet("", "0", {.ipv4 = true, .ipv6 = false}));
    REQUIRE(v4);
    CHECK(v4->size() == 1);
    CHECK(option(v4->front().get(), SOL_SOCKET, SO_DOMAIN) == AF_INET);
    auto none = rt.run(listen_inet("", "0", {.ipv4 = false, .ipv6 = false}));
    REQUIRE_FALSE(none);
    CHECK(none.error().kind() == ErrorKind::kInvalid);
}

TEST_CASE("tcp: refused connections and bad ports are errors", "[runtime][socket]") {
    TestRuntime rt;
    std::string port;
    {
        auto gone = rt.run(listen_inet("127.0.0.1", "0"));
        REQUIRE(gone);
        port = std::to_string(*local_port(gone->front().get()));
    }
    auto refused = rt.run(connect_inet("127.0.0.1", port));
    REQUIRE_FALSE(refused);
    CHECK(refused.error().errno_value() == ECONNREFUSED);
    CHECK_THAT(refused.error().message(), Catch::Contains("127.0.0.1:" + port));
    auto bad = rt.run(connect_inet("127.0.0.1", "no-such-service"));
    REQUIRE_FALSE(bad);
    CHECK_THAT(bad.error().message(), Catch::Contains("no-such-service"));
}

TEST_CASE("check_listening_socket: says what is wrong", "[runtime][socket]") {
    const UniqueFd file(::open("/dev/null", O_RDWR | O_CLOEXEC));
    const UniqueFd datagram(::socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0));
    const UniqueFd idle(::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0));
    CHECK_THAT(check_listening_socket(file.get()).error().message(), Catch::Contains("is not a socket"));
    CHECK_THAT(check_listening_socket(datagram.get()).error().message(), Catch::Contains("not a stream socket"));
    CHECK_THAT(check_listening_socket(idle.get()).error().message(), Catch::Contains("not a listening socket"));
    CHECK_FALSE(check_listening_socket(9999));
    CHECK_FALSE(check_connected_socket(idle.get()));
    CHECK_FALSE(local_port(file.get()));
}

TEST_CASE("descriptor flags: set and cleared", "[runtime][socket]") {
    const UniqueFd fd(::open("/dev/null", O_RDWR));
    CHECK(set_cloexec(fd.get()));
    CHECK(::fcntl(fd.get(), F_GETFD) == FD_CLOEXEC);
    CHECK(set_cloexec(fd.get(), false));
    CHECK(::fcntl(fd.get(), F_GETFD) == 0);
    CHECK(set_nonblocking(fd.get()));
    CHECK((::fcntl(fd.get(), F_GETFL) & O_NONBLOCK) != 0);
    CHECK_FALSE(set_nonblocking(9999));
}

}  // namespace
}  // namespace gantry
