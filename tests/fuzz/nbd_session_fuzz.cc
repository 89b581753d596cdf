// Transmission on arbitrary bytes: byte 0 chooses what was negotiated and how the disk answers, the rest is what the
// client sends.

#include <sys/socket.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "nbd/session.h"
#include "runtime/io.h"
#include "runtime/unique_fd.h"
#include "tests/support/export_disk.h"
#include "tests/support/test_runtime.h"

namespace {

using namespace gantry;

void expect(bool condition) {
    if (!condition) std::abort();
}

/// One disk and its channels for all inputs.
struct World {
    World() {
        runtime.run(open("fast", true));
        runtime.run(open("slow", false));
    }
    Task<void> open(std::string name, bool fast) {
        auto node = co_await graph.add({{"driver", "memory"}, {"node-name", name}, {"size", 3 << 20}, {"fast", fast}});
        expect(node.has_value());
        static_cast<test::ExportDisk*>(*node)->fill(1 << 20, 1 << 20, 1);
        block::RootOptions options;
        options.perms = {block::Perm::kConsistentRead | block::Perm::kWrite, block::Perm::kAll};
        options.user = "a fuzz target";
        auto root = co_await graph.attach(**node, std::move(options));
        expect(root.has_value());
        roots.push_back(std::move(*root));
        channels.push_back(co_await roots.back()->channel(Loop::current()));
    }

    test::TestRuntime runtime{RuntimeOptions{IoBackendKind::kEpoll, 0, 2}};
    std::vector<block::Driver> drivers{test::kExportDiskDriver};
    // Never closed: the process ends with it.
    block::Graph& graph = *new block::Graph(*runtime.runtime, drivers, nullptr);
    std::vector<std::unique_ptr<block::Root>> roots;
    std::vector<block::Channel*> channels;
};

Task<void> feed(int fd, const uint8_t* data, size_t size) {
    size_t sent = 0;
    while (sent < size) {
        const int n = co_await io_send(fd, data + sent, size - sent);
        if (n <= 0) break;
        sent += static_cast<size_t>(n);
    }
    ::shutdown(fd, SHUT_WR);
}

/// Reads what the server says to its end; it must be replies and nothing else.
Task<void> check_replies(int fd, bool structured) {
    std::vector<uint8_t> in(256 << 10);
    std::vector<uint8_t> pending;
    for (;;) {
        const int n = co_await io_recv(fd, in.data(), in.size());
        if (n <= 0) break;
        // Simple READ data cannot be told from replies without the requests: only structured streams are parsed.
        if (structured) pending.insert(pending.end(), in.begin(), in.begin() + n);
    }
    for (size_t at = 0; pending.size() - at >= nbd::kSimpleReplySize;) {
        const auto magic = nbd::load_big<uint32_t>(&pending[at]);
        if (magic == nbd::kSimpleReplyMagic) {
            at += nbd::kSimpleReplySize;
            continue;
        }
        expect(magic == nbd::kStructuredReplyMagic);
        if (pending.size() - at < nbd::kChunkHeaderSize) break;
        const auto length = nbd::load_big<uint32_t>(&pending[at + 16]);
        expect(length <= nbd::kMaxPayload + 8);
        if (length > pending.size() - at - nbd::kChunkHeaderSize) break;
        at += nbd::kChunkHeaderSize + length;
    }
}

Task<void> serve(int fd, block::Channel* channel, nbd::SessionConfig config) {
    nbd::SessionCounters counters;
    co_await nbd::serve_session(fd, *channel, std::move(config), counters);
    expect(counters.in_flight == 0);
    ::shutdown(fd, SHUT_RDWR);
}

Task<void> talk(World* world, uint8_t choice, const uint8_t* data, size_t size) {
    int fds[2];
    expect(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    UniqueFd server(fds[0]), client(fds[1]);
    nbd::SessionConfig config;
    config.structured = choice & 1;
    config.read_only = choice & 2;
    if (choice & 1) config.contexts = {{nbd::ContextKind::kBaseAllocation, "base:allocation", 1}};
    block::Channel* channel = world->channels[choice & 4 ? 1 : 0];
    TaskScope scope;
    scope.spawn(serve(server.get(), channel, std::move(config)));
    scope.spawn(feed(client.get(), data, size));
    scope.spawn(check_replies(client.get(), choice & 1));
    co_await scope.join();
    Loop::current().forget_fd(server.get());
    Loop::current().forget_fd(client.get());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static World& world = *new World;
    if (size == 0) return 0;
    world.runtime.run(talk(&world, data[0], data + 1, size - 1));
    return 0;
}
