// An overlay whose contents were committed to its backing file starts anew.

#include "block/formats/qcow2/compaction.h"
#include "block/formats/qcow2/refusal.h"
#include "block/formats/qcow2/resize_steps.h"

namespace gantry::block::qcow2 {

Task<Result<>> Qcow2Node::make_empty() {
    CO_CHECK(check_writable());
    if (geometry().raw_external_data) {
        co_return refuse(ErrorKind::kUnsupported, name(), "Operation not supported",
                         "what no entry describes is read from its raw data file, not from a backing file");
    }
    Operation op(*this);
    CO_CHECK(co_await op.begin());
    Result<> emptied = co_await cut_mappings(op, 0, op.header().l1_size, op.header().size);
    if (!emptied) {
        co_await op.give_back();
        co_return emptied;
    }
    if (geometry().external_data) {
        const ImageFile contents(name(), data());
        co_await contents.discard(0, contents.size());
    }
    Compaction compaction(op, {});
    Result<> moved = co_await compaction.run_metadata();
    if (!moved) co_await op.give_back();
    co_return moved;
}

}  // namespace gantry::block::qcow2
