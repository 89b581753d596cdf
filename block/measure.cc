#include "block/measure.h"

#include <algorithm>

#include "block/graph.h"

namespace gantry::block {

Task<Result<MeasureResult>> measure_image(Graph& graph, std::string format, MeasureSource what, CreationWords words) {
    const Driver* driver = graph.driver(format);
    if (!driver) co_return fail(ErrorKind::kInvalid, "Unknown file format '{}'", format);
    const Creator* found = driver->creator;
    if (!found || !found->measure) {
        co_return fail(ErrorKind::kUnsupported, "Block driver '{}' does not support size measurement", format);
    }
    CO_CHECK(check_words(*found, words, format));
    if (what.source) what.size = what.source->size();
    // One word for creators: whole sectors, checked.
    std::erase_if(words, [](const auto& pair) { return pair.first == "size"; });
    words.emplace_back("size", fmt::format("{}", what.size));
    co_return co_await found->measure(what, std::move(words));
}

Task<Result<uint64_t>> count_data(Node& source, uint64_t unit) {
    const uint64_t size = source.size();
    uint64_t total = 0, counted_to = 0;  // whole units below that are counted
    for (uint64_t offset = 0; offset < size;) {
        Request rq = Request::internal();
        CO_TRY(const BlockStatus status, co_await source.block_status(rq, offset, size - offset));
        const uint64_t end = offset + status.length;
        if (status.data && !status.zero) {
            const uint64_t from = std::max(counted_to, offset / unit * unit);
            counted_to = (end + unit - 1) / unit * unit;
            if (counted_to > from) total += counted_to - from;
        }
        offset = end;
    }
    co_return total;
}

}  // namespace gantry::block
