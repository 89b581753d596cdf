#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <atomic>
#include <catch2/catch.hpp>
#include <cstring>

#include "runtime/buffer.h"
#include "runtime/io.h"
#include "runtime/socket.h"
#include "runtime/task_scope.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TempDir;
using test::TestRuntime;

struct Pair {
    UniqueFd a, b;
};
Pair socket_pair() {
    int fds[2];
    REQUIRE(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    return {UniqueFd(fds[0]), UniqueFd(fds[1])};
}

Task<bool> send_all(int fd, const uint8_t* data, size_t size) {
    while (size > 0) {
        const int n = co_await io_send(fd, data, size);
        if (n <= 0) co_return false;
        data += n;
        size -= static_cast<size_t>(n);
    }
    co_return true;
}
Task<bool> recv_all(int fd, uint8_t* data, size_t size) {
    while (size > 0) {
        const int n = co_await io_recv(fd, data, size);
        if (n <= 0) co_return false;
        data += n;
        size -= static_cast<size_t>(n);
    }
    co_return true;
}

Task<void> sender(int fd, size_t total, bool* ok) {
    Buffer b = Buffer::alloc(64 * 1024);
    for (size_t i = 0; i < b.size(); ++i) b.data()[i] = static_cast<uint8_t>(i * 31);
    *ok = true;
    for (size_t sent = 0; sent < total && *ok; sent += b.size()) *ok = co_await send_all(fd, b.data(), b.size());
    ::shutdown(fd, SHUT_WR);
}
Task<size_t> flood(int from, int to, size_t total) {
    bool sent = false;
    TaskScope scope;
    scope.spawn(sender(from, total, &sent));
    Buffer b = Buffer::alloc(48 * 1000);
    size_t got = 0;
    bool intact = true;
    for (;;) {
        const int n = co_await io_recv(to, b.data(), b.size());
        if (n <= 0) {
            intact = intact && n == 0;
            break;
        }
        for (int i = 0; i < n; i += 97) {
            intact = intact && b.data()[i] == static_cast<uint8_t>(((got + static_cast<size_t>(i)) % 65536) * 31);
        }
        got += static_cast<size_t>(n);
    }
    co_await scope.join();
    co_return sent&& intact ? got : 0;
}

TEST_CASE("socket io: a flood arrives complete, in order, with its end", "[runtime][io][stress]") {
    TestRuntime rt;
    const auto p = socket_pair();
    CHECK(rt.run(flood(p.a.get(), p.b.get(), 64 << 20)) == 64 << 20);
}

Task<void> echo(int fd) {
    uint8_t byte;
    for (;;) {
        const int n = co_await io_recv(fd, &byte, 1);
        if (n <= 0) break;
        co_await io_send(fd, &byte, 1);
    }
}
Task<void> on_loop(Loop* loop, Task<void> task) { co_await run_on(*loop, std::move(task)); }
Task<int> ping_pong(TestRuntime* rt, int fd, int peer, int rounds) {
    TaskScope scope;
    scope.spawn(on_loop(&rt->io_loop(), echo(peer)));
    int good = 0;
    for (int i = 0; i < rounds; ++i) {
        const uint8_t out = static_cast<uint8_t>(i);
        uint8_t in = 0;
        const int sent = co_await io_send(fd, &out, 1);
        const int got = co_await io_recv(fd, &in, 1);
        if (sent == 1 && got == 1 && in == out) ++good;
    }
    ::shutdown(fd, SHUT_WR);
    co_await scope.join();
    co_return good;
}

TEST_CASE("socket io: ping-pong between two sleeping loops", "[runtime][io][stress]") {
    TestRuntime rt;
    const auto p = socket_pair();
    CHECK(rt.run(ping_pong(&rt, p.a.get(), p.b.get(), 5000)) == 5000);
}

Task<void> full_duplex(int fd, int peer, std::atomic<int>* good) {
    bool sent_a = false, sent_b = false;
    std::vector<uint8_t> in_a(1 << 20), in_b(1 << 20);
    TaskScope scope;
    scope.spawn(sender(fd, 1 << 20, &sent_a));
    scope.spawn(sender(peer, 1 << 20, &sent_b));
    const bool got_b = co_await recv_all(peer, in_b.data(), in_b.size());
    const bool got_a = co_await recv_all(fd, in_a.data(), in_a.size());
    co_await scope.join();
    if (sent_a && sent_b && got_a && got_b && in_a == in_b) ++*good;
}
Task<void> many_pairs(TestRuntime* rt, std::vector<Pair>* pairs, std::atomic<int>* good) {
    TaskScope scope;
    for (size_t i = 0; i < pairs->size(); ++i) {
        scope.spawn(on_loop(&rt->io_loop(i), full_duplex((*pairs)[i].a.get(), (*pairs)[i].b.get(), good)));
    }
    co_await scope.join();
}

TEST_CASE("socket io: both directions of many connections on all loops", "[runtime][io][stress]") {
    TestRuntime rt;
    std::vector<Pair> pairs;
    for (int i = 0; i < 12; ++i) pairs.push_back(socket_pair());
    std::atomic<int> good{0};
    rt.run(many_pairs(&rt, &pairs, &good));
    CHECK(good == 12);
}

Task<void> await_into(CancellableIo* io, int* result) { *result = co_await *io; }

Task<int> cancel_started(IoAwait start) {
    CancellableIo io(start);
    int result = 1;
    TaskScope scope;
    scope.spawn(await_into(&io, &result));
    co_await sleep_for(std::chrono::microseconds(100));
    if (result != 1) co_return result;
    io.cancel();
    co_await scope.join();
    co_return result;
}

TEST_CASE("socket io: recv, accept, recvmsg, poll and a full send can be cancelled", "[runtime][io][cancel]") {
    TestRuntime rt;
    TempDir dir;
    const auto p = socket_pair();
    auto listener = listen_unix(dir.file("s"));
    REQUIRE(listener);
    char byte;
    iovec v{&byte, 1};
    msghdr msg{};
    msg.msg_iov = &v;
    msg.msg_iovlen = 1;
    CHECK(rt.run(cancel_started(io_recv(p.a.get(), &byte, 1))) == -ECANCELED);
    CHECK(rt.run(cancel_started(io_recvmsg(p.a.get(), &msg))) == -ECANCELED);
    CHECK(rt.run(cancel_started(io_accept(listener->get()))) == -ECANCELED);
    CHECK(rt.run(cancel_started(io_poll(p.a.get(), POLLIN))) == -ECANCELED);
    const std::vector<uint8_t> lots(1 << 20);
    while (::send(p.a.get(), lots.data(), lots.size(), MSG_DONTWAIT | MSG_NOSIGNAL) > 0) {
    }
    CHECK(rt.run(cancel_started(io_send(p.a.get(), lots.data(), lots.size()))) == -ECANCELED);
    // The descriptors are as good as before.
    CHECK(::shutdown(p.a.get(), SHUT_WR) == 0);
    CHECK(rt.run(cancel_started(io_recv(p.b.get(), &byte, 1))) == 1);
}

Task<void> shut_down_later(int fd) {
    co_await sleep_for(std::chrono::microseconds(200));
    ::shutdown(fd, SHUT_RDWR);
}
Task<std::vector<int>> ends(int fd, int peer) {
    std::vector<int> results;
    uint8_t byte = 0;
    TaskScope scope;
    scope.spawn(shut_down_later(fd));
    results.push_back(co_await io_recv(fd, &byte, 1));    // shut down under us
    results.push_back(co_await io_recv(peer, &byte, 1));  // the other end sees the end
    results.push_back(co_await io_send(peer, &byte, 1));
    results.push_back(co_await io_recv(fd, &byte, 1, MSG_DONTWAIT));
    co_await scope.join();
    co_return results;
}

TEST_CASE("socket io: shutdown ends a waiting recv; a send to nobody is EPIPE without a signal", "[runtime][io]") {
    TestRuntime rt;
    const auto p = socket_pair();
    CHECK(rt.run(ends(p.a.get(), p.b.get())) == std::vector<int>{0, 0, -EPIPE, 0});
}

Task<std::vector<int>> would_block(int fd) {
    std::vector<int> results;
    uint8_t byte = 0;
    iovec v{&byte, 1};
    msghdr msg{};
    msg.msg_iov = &v;
    msg.msg_iovlen = 1;
    results.push_back(co_await io_recv(fd, &byte, 1, MSG_DONTWAIT));
    results.push_back(co_await io_recvmsg(fd, &msg, MSG_DONTWAIT));
    results.push_back(co_await io_recv(9999, &byte, 1));
    co_return results;
}

TEST_CASE("socket io: MSG_DONTWAIT does not wait", "[runtime][io]") {
    TestRuntime rt;
    const auto p = socket_pair();
    CHECK(rt.run(would_block(p.a.get())) == std::vector<int>{-EAGAIN, -EAGAIN, -EBADF});
}

Task<int> pass_descriptor(int from, int to, int fd) {
    char byte = 'x';
    iovec v{&byte, 1};
    alignas(cmsghdr) static char control[CMSG_SPACE(sizeof(int))];
    msghdr msg{};
    msg.msg_iov = &v;
    msg.msg_iovlen = 1;
    msg.msg_control = control;
    msg.msg_controllen = sizeof control;
    cmsghdr* c = CMSG_FIRSTHDR(&msg);
    c->cmsg_level = SOL_SOCKET;
    c->cmsg_type = SCM_RIGHTS;
    c->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(c), &fd, sizeof fd);
    const int sent = co_await io_sendmsg(from, &msg);
    if (sent != 1) co_return -1;
    msg.msg_controllen = sizeof control;
    const int got = co_await io_recvmsg(to, &msg);
    c = CMSG_FIRSTHDR(&msg);
    if (got != 1 || !c || c->cmsg_type != SCM_RIGHTS) co_return -2;
    int received;
    std::memcpy(&received, CMSG_DATA(c), sizeof received);
    co_return received;
}

TEST_CASE("socket io: descriptors travel and arrive close-on-exec", "[runtime][io]") {
    TestRuntime rt;
    const auto p = socket_pair();
    const UniqueFd received(rt.run(pass_descriptor(p.a.get(), p.b.get(), 2)));
    REQUIRE(received);
    CHECK(::fcntl(received.get(), F_GETFD) == FD_CLOEXEC);
}

}  // namespace
}  // namespace gantry
