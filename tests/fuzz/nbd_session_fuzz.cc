// Transmission on arbitrary bytes: byte 0 chooses what was negotiated and how the disk answers, the rest is what the
// client sends. Bits: 1 structured, 2 read-only, 4 a slow disk, 8 extended headers, 16 all contexts.

#include <sys/socket.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "block/bitmap.h"
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
        auto made = block::DirtyBitmap::create("b", 3 << 20, 512);
        expect(made.has_value());
        bitmap = std::move(*made);
        for (uint64_t at = 0; at < 3 << 20; at += 5000) bitmap->set_range(at, 700);
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
    std::shared_ptr<block::DirtyBitmap> bitmap;
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

/// What a chunk must be, whatever was asked.
void check_chunk(const uint8_t* payload, size_t length, uint16_t flags, uint16_t type, bool extended) {
    expect((flags & ~nbd::kChunkDone) == 0);
    switch (type) {
        case nbd::kChunkNone:
            return expect(length == 0 && flags == nbd::kChunkDone);
        case nbd::kChunkOffsetData:
            return expect(length > 8);
        case nbd::kChunkOffsetHole:
            return expect(length == 12 && nbd::load_big<uint32_t>(payload + 8) != 0);
        case nbd::kChunkBlockStatus:
            return expect(!extended && length >= 12 && (length - 4) % 8 == 0);
        case nbd::kChunkBlockStatusExt:
            expect(extended && length >= 24 && (length - 8) % 16 == 0);
            return expect(nbd::load_big<uint32_t>(payload + 4) == (length - 8) / 16);
        case nbd::kChunkError:
        case nbd::kChunkErrorOffset: {
            expect(flags == nbd::kChunkDone && length >= 6 && nbd::load_big<uint32_t>(payload) != 0);
            const size_t text = nbd::load_big<uint16_t>(payload + 4);
            return expect(length == 6 + text + (type == nbd::kChunkErrorOffset ? 8 : 0));
        }
        default:
            expect(false);
    }
}

/// Reads what the server says to its end; it must be replies and nothing else.
Task<void> check_replies(int fd, bool structured, bool extended) {
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
            expect(!extended);
            at += nbd::kSimpleReplySize;
            continue;
        }
        expect(magic == (extended ? nbd::kExtendedReplyMagic : nbd::kStructuredReplyMagic));
        const size_t header = extended ? nbd::kExtendedChunkHeaderSize : nbd::kChunkHeaderSize;
        if (pending.size() - at < header) break;
        const uint64_t length =
            extended ? nbd::load_big<uint64_t>(&pending[at + 24]) : nbd::load_big<uint32_t>(&pending[at + 16]);
        expect(length <= nbd::kMaxPayload + 8);
        if (length > pending.size() - at - header) break;
        check_chunk(pending.data() + at + header, length, nbd::load_big<uint16_t>(&pending[at + 4]),
                    nbd::load_big<uint16_t>(&pending[at + 6]), extended);
        at += header + length;
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
    config.extended = choice & 8;
    config.structured = choice & 9;
    config.read_only = choice & 2;
    if (config.structured) config.contexts = *nbd::base_contexts();
    if (config.structured && (choice & 16)) {
        config.contexts.push_back({nbd::ContextKind::kAllocationDepth, "qemu:allocation-depth", 2});
        config.contexts.push_back({nbd::ContextKind::kDirtyBitmap, "qemu:dirty-bitmap:b", 3, world->bitmap});
    }
    const bool structured = config.structured, extended = config.extended;
    block::Channel* channel = world->channels[choice & 4 ? 1 : 0];
    TaskScope scope;
    scope.spawn(serve(server.get(), channel, std::move(config)));
    scope.spawn(feed(client.get(), data, size));
    scope.spawn(check_replies(client.get(), structured, extended));
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
