// Opens any bytes as a qcow2 image on a memory node, asks everything a reader may ask, checks it, and closes it again.

#include <algorithm>

#include "block/image_control.h"
#include "block/measure.h"
#include "tests/fuzz/qcow2_environment.h"

namespace {

using namespace gantry;
using test::Qcow2Environment;
using test::Qcow2Input;

constexpr uint64_t kReadBytes = 128 * 1024;
constexpr uint64_t kMeasuredBytes = uint64_t{64} << 20;
constexpr int kMaxExtents = 1000;

/// Pieces of the disk: both ends, and places spread between them.
Task<void> read_pieces(block::Node& node) {
    block::Request rq = block::Request::internal();
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
        FUZZ_REQUIRE(!status || status->length != 0);
    }
}

/// As `map` does: extent by extent from the start.
Task<void> map(block::Node& node) {
    block::Request rq = block::Request::internal();
    uint64_t at = 0;
    for (int i = 0; i < kMaxExtents && at < node.size(); i++) {
        auto status = co_await node.block_status(rq, at, node.size() - at);
        if (!status) co_return;
        FUZZ_REQUIRE(status->length != 0 && status->length <= node.size() - at);
        at += status->length;
    }
}

Task<void> check(block::Graph& graph, block::Node& node) {
    auto first = co_await block::check_image(graph, node, block::CheckRepair::kNone);
    auto second = co_await block::check_image(graph, node, block::CheckRepair::kNone);
    FUZZ_REQUIRE(first.has_value() == second.has_value());
    if (!first) co_return;
    FUZZ_REQUIRE(first->corruptions == second->corruptions && first->leaks == second->leaks);
    FUZZ_REQUIRE(first->corruptions_fixed == 0 && first->leaks_fixed == 0);
    FUZZ_REQUIRE((first->corruptions + first->leaks + first->check_errors == 0) == first->findings.empty());
    FUZZ_REQUIRE(first->findings.size() <= block::ImageCheck::kMaxFindings);
    auto refused = co_await block::check_image(graph, node, block::CheckRepair::kAll);
    FUZZ_REQUIRE(!refused && refused.error().kind() == ErrorKind::kReadOnly);
}

Task<void> open_and_use(block::Graph& graph, json::object options) {
    auto added = co_await graph.add(std::move(options));
    if (!added) {
        FUZZ_REQUIRE(!added.error().message().empty());
        FUZZ_REQUIRE(graph.nodes().empty());
        co_return;
    }
    auto root = co_await test::use_node(graph, **added, block::Perm::kConsistentRead);
    block::Node& node = root->node();
    (void)co_await node.image_info();
    co_await read_pieces(node);
    co_await map(node);
    co_await check(graph, node);
    if (node.size() <= kMeasuredBytes) {
        (void)co_await block::measure_image(graph, "qcow2", {.size = node.size(), .source = &node}, {});
    }
    co_await graph.detach(std::move(root));
    auto removed = co_await graph.remove("q");
    FUZZ_REQUIRE(removed);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static Qcow2Environment* const environment = new Qcow2Environment;
    if (size > test::MemoryDisk::kCapacity) return 0;
    Qcow2Input input(*environment, data, size);
    json::object plain = input.image();
    plain["read-only"] = true;
    json::object snapshot = plain;
    snapshot["snapshot"] = "1";
    for (const json::object& options : {plain, snapshot}) {
        environment->run(open_and_use(*input.graph, options));
    }
    FUZZ_REQUIRE(input.holds(data, size));  // read-only changes nothing
    return 0;
}
