// Opens any bytes as a qcow2 image on a memory node, asks everything a reader may ask, and closes it again.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "block/crypto/secrets.h"
#include "block/formats/qcow2/qcow2.h"
#include "block/formats/raw.h"
#include "block/graph.h"
#include "block/root.h"
#include "runtime/log.h"
#include "runtime/runtime.h"
#include "tests/support/memory_node.h"

namespace {

using namespace gantry;

constexpr uint64_t kReadBytes = 128 * 1024;

/// Pieces of the disk: both ends, and places spread between them.
Task<void> use(block::Node& node) {
    block::Request rq = block::Request::internal();
    (void)co_await node.image_info();
    Buffer buffer = Buffer::alloc(kReadBytes);
    const uint64_t size = node.size();
    for (unsigned i = 0; i < 8; i++) {
        const uint64_t at = i == 7 ? (size > kReadBytes ? size - kReadBytes : 0) : size / 7 * i;
        const uint64_t length = std::min(kReadBytes, size - at);
        if (length == 0) break;
        const iovec one = buffer.iov(0, length);
        if (node.try_read(rq, at, IoVec(one)) != 0) (void)co_await node.read(rq, at, IoVec(one));
        const iovec odd = buffer.iov(0, std::min<uint64_t>(length, 777));
        (void)co_await node.read(rq, at, IoVec(odd));
        auto status = co_await node.block_status(rq, at, size - at);
        if (status && status->length == 0) std::abort();
    }
}

Task<void> open_and_use(block::Graph& graph, json::object options) {
    auto added = co_await graph.add(std::move(options));
    if (!added) co_return;
    block::RootOptions reader;
    reader.perms = {block::Perm::kConsistentRead, block::Perm::kAll};
    reader.user = "the fuzzer";
    auto root = co_await graph.attach(**added, std::move(reader));
    if (!root) std::abort();
    co_await use((*root)->node());
    co_await graph.detach(std::move(*root));
    auto removed = co_await graph.remove("q");
    if (!removed) std::abort();
}

struct Environment {
    Environment() {
        log::set_level(log::Level::kOff);
        RuntimeOptions options;
        options.backend = IoBackendKind::kEpoll;
        options.io_loops = 0;
        options.pool_threads = 1;
        runtime = std::move(*Runtime::create(options));
        // No file driver: names found in an image lead nowhere on this machine.
        drivers = {block::kQcow2Driver, block::kRawDriver, test::kMemoryDriver};
        disk = test::MemoryDisk::named("image");
    }
    std::unique_ptr<Runtime> runtime;
    std::vector<block::Driver> drivers;
    std::shared_ptr<test::MemoryDisk> disk;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Environment* const environment = new Environment;
    Environment& e = *environment;
    if (size > test::MemoryDisk::kCapacity) return 0;
    e.disk->resize(0);
    e.disk->resize(size);
    if (size != 0) e.disk->write(0, data, size);
    block::Graph graph(*e.runtime, e.drivers, nullptr);
    graph.opens_locked = true;  // unlocking is bounded, but not by milliseconds
    const json::object secret{{"qom-type", "secret"}, {"id", "s"}, {"data", "key"}};
    (void)e.runtime->main_loop().run_until_complete(graph.secrets().add(secret));
    const json::object file{{"driver", "memory"}, {"disk", "image"}};
    const json::object plain{{"driver", "qcow2"}, {"node-name", "q"}, {"read-only", true}, {"file", file}};
    json::object snapshot = plain;
    snapshot["snapshot"] = "1";
    json::object legacy = plain;
    legacy["encrypt"] = json::object{{"format", "aes"}, {"key-secret", "s"}};
    for (const json::object& options : {plain, snapshot, legacy}) {
        e.runtime->main_loop().run_until_complete(open_and_use(graph, options));
    }
    e.runtime->main_loop().run_until_complete(graph.close_all());
    return 0;
}
