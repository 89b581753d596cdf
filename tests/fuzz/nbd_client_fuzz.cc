// The client node against arbitrary servers: byte 0 chooses what was negotiated (or that the negotiation itself is what
// comes), the rest is what the server sends.

#include <sys/socket.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "block/graph.h"
#include "nbd/client/node.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"
#include "tests/support/test_runtime.h"

namespace {

using namespace gantry;

void expect(bool condition) {
    if (!condition) std::abort();
}

template <class T>
void put(std::vector<uint8_t>& out, T value) {
    const size_t at = out.size();
    out.resize(at + sizeof value);
    nbd::store_big(out.data() + at, value);
}

void put_reply(std::vector<uint8_t>& out, uint32_t option, uint32_t type, const std::vector<uint8_t>& payload = {}) {
    put(out, nbd::kOptionReplyMagic);
    put(out, option);
    put(out, type);
    put(out, static_cast<uint32_t>(payload.size()));
    out.insert(out.end(), payload.begin(), payload.end());
}

/// All that a server says before transmission, whatever it is asked meanwhile.
std::vector<uint8_t> negotiation(bool structured, bool extended) {
    std::vector<uint8_t> out;
    put(out, nbd::kNbdMagic);
    put(out, nbd::kOptionMagic);
    put(out, uint16_t{3});
    put_reply(out, nbd::kOptExtendedHeaders, extended ? nbd::kRepAck : nbd::kRepErrUnsup);
    if (!extended) put_reply(out, nbd::kOptStructuredReply, structured ? nbd::kRepAck : nbd::kRepErrUnsup);
    if (structured || extended) {
        std::vector<uint8_t> context;
        put(context, uint32_t{7});
        for (const char c : std::string_view("base:allocation")) context.push_back(static_cast<uint8_t>(c));
        put_reply(out, nbd::kOptSetMetaContext, nbd::kRepMetaContext, context);
        put_reply(out, nbd::kOptSetMetaContext, nbd::kRepAck);
    }
    std::vector<uint8_t> info;
    put(info, uint16_t{nbd::kInfoExport});
    put(info, uint64_t{1} << 20);
    put(info, static_cast<uint16_t>(nbd::kHasFlags | nbd::kSendFlush | nbd::kSendFua | nbd::kSendTrim |
                                    nbd::kSendWriteZeroes | nbd::kSendCache));
    put_reply(out, nbd::kOptGo, nbd::kRepInfo, info);
    put_reply(out, nbd::kOptGo, nbd::kRepAck);
    return out;
}

struct World {
    World() { log::set_level(log::Level::kOff); }
    test::TestRuntime runtime{RuntimeOptions{IoBackendKind::kEpoll, 0, 2}};
    std::vector<block::Driver> drivers{nbd::kNbdDriver};
    // Never closed: the process ends with it.
    block::Graph& graph = *new block::Graph(*runtime.runtime, drivers, nullptr);
};

Task<void> serve(int fd, const std::vector<uint8_t>* says) {
    for (size_t sent = 0; sent < says->size();) {
        const int n = co_await io_send(fd, says->data() + sent, says->size() - sent);
        if (n <= 0) break;
        sent += static_cast<size_t>(n);
    }
    ::shutdown(fd, SHUT_WR);
    std::vector<uint8_t> scratch(64 << 10);
    for (;;) {
        const int n = co_await io_recv(fd, scratch.data(), scratch.size());
        if (n <= 0) break;
    }
}

Task<void> read_one(block::Node* node, uint64_t offset, size_t length) {
    std::vector<uint8_t> memory(length);
    const iovec iov{memory.data(), memory.size()};
    block::Request rq = block::Request::internal();
    (void)co_await node->read(rq, offset, IoVec(iov));
}
Task<void> write_one(block::Node* node, size_t length) {
    std::vector<uint8_t> memory(length);
    const iovec iov{memory.data(), memory.size()};
    block::Request rq = block::Request::internal();
    (void)co_await node->write(rq, 0, IoVec(iov), block::WriteFlags::kFua);
}
Task<void> status_one(block::Node* node) {
    block::Request rq = block::Request::internal();
    const auto status = co_await node->block_status(rq, 0, 1 << 16);
    expect(!status || (status->length > 0 && status->length <= 1 << 16));
}

Task<void> use(block::Graph* graph) {
    auto opened = co_await graph->add(
        {{"driver", "nbd"}, {"node-name", "n"}, {"server", {{"type", "fd"}, {"str", "s"}}}, {"auto-read-only", true}});
    if (!opened) co_return;
    block::Node* node = *opened;
    expect(node->size() <= INT64_MAX);
    const bool large = node->size() >= (1 << 17);
    TaskScope scope;
    if (large) {
        // Cookies: the first request has 0x100, the second 0x201, ...
        scope.spawn(read_one(node, 0, 4096));
        scope.spawn(read_one(node, 4096, 64 << 10));
        scope.spawn(status_one(node));
        if (!node->read_only()) scope.spawn(write_one(node, 512));
    }
    co_await scope.join();
    expect((co_await graph->remove("n")).has_value());
}

Task<void> talk(World* world, const std::vector<uint8_t>* says) {
    int fds[2];
    expect(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, fds) == 0);
    UniqueFd client(fds[0]), server(fds[1]);
    world->graph.descriptor_source = [&client](std::string_view) -> Result<UniqueFd> { return std::move(client); };
    TaskScope scope;
    scope.spawn(serve(server.get(), says));
    co_await use(&world->graph);
    client.reset();
    co_await scope.join();
    Loop::current().forget_fd(server.get());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static World& world = *new World;
    if (size == 0) return 0;
    std::vector<uint8_t> says;
    switch (data[0] & 3) {
        case 0:
            says = negotiation(false, false);
            break;
        case 1:
            says = negotiation(true, false);
            break;
        case 2:
            says = negotiation(true, true);
            break;
        default:
            break;
    }
    says.insert(says.end(), data + 1, data + size);
    world.runtime.run(talk(&world, &says));
    return 0;
}
