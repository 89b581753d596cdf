// What amend changes: the options read and checked, and the steps that have files of their own.

#pragma once

#include <optional>
#include <string>

#include "block/formats/qcow2/operation.h"
#include "block/formats/qcow2/qcow2_node.h"

namespace gantry::block::qcow2 {

struct AmendChange {
    uint32_t version = 3;  // afterwards
    uint32_t refcount_order = 4;
    std::optional<bool> lazy_refcounts;
    std::optional<uint64_t> size;
    std::optional<std::string> data_file;  // empty: the header names none
    bool drop_data_file_raw = false;
    std::optional<json::object> luks;  // QCryptoBlockAmendOptionsLUKS
};
/// Values as QMP has them or as text. Everything that can be refused by looking at the image's header is refused here,
/// with the reference's sentences.
Result<AmendChange> parse_amend(const Image& image, std::string_view node, const json::object& options);

/// New refcount structures of another width beside the old ones, then the header is switched to them.
Task<Result<>> rewrite_refcounts(Operation& op, uint32_t refcount_order, Progress progress);
/// When refcount structures are what is last in the file: the same with the width they have, if that makes room at the
/// end.
Task<Result<>> lower_refcounts(Operation& op);

/// 2 -> 3: only the header.
Task<Result<>> upgrade_version(Operation& op);
/// 3 -> 2: no entry has the zero flag any more, then the header. kUnsupported when something is in the way.
Task<Result<>> downgrade_version(Operation& op, Progress progress);
/// What downgrade_version() refuses by the header alone. `refcount_order` is what it will be then.
Result<> check_downgrade(const Image& image, std::string_view node, uint32_t refcount_order);

}  // namespace gantry::block::qcow2
