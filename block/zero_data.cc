#include "block/zero_data.h"

namespace gantry::block {
namespace {

/// Never written: its pages stay the kernel's zero page.
alignas(4096) constinit uint8_t zero_block[ZeroData::kBlock] = {};

}  // namespace

ZeroData::ZeroData() { list_.fill(iovec{zero_block, kBlock}); }

const uint8_t* ZeroData::block() { return zero_block; }

}  // namespace gantry::block
