// Filter: everything is forwarded to the one child.

#include "block/node.h"

namespace gantry::block {

Task<Result<>> Filter::do_read(Request& rq, uint64_t offset, IoVec iov) { return below().read(rq, offset, iov); }

Task<Result<>> Filter::do_write(Request& rq, uint64_t offset, IoVec iov, WriteFlags flags) {
    return below().write(rq, offset, iov, flags);
}

Task<Result<>> Filter::do_write_zeroes(Request& rq, uint64_t offset, uint64_t length, WriteFlags flags) {
    return below().write_zeroes(rq, offset, length, flags);
}

Task<Result<>> Filter::do_discard(Request& rq, uint64_t offset, uint64_t length) {
    return below().discard(rq, offset, length);
}

Task<Result<>> Filter::do_flush(Request& rq) { return below().flush(rq); }

Task<Result<>> Filter::do_preload(Request& rq, uint64_t offset, uint64_t length) {
    return below().preload(rq, offset, length);
}

Task<Result<BlockStatus>> Filter::do_block_status(Request& rq, uint64_t offset, uint64_t length) {
    return below().block_status(rq, offset, length);
}

int Filter::do_try_read(Request& rq, uint64_t offset, const IoVec& iov) { return below().try_read(rq, offset, iov); }

int Filter::do_try_write(Request& rq, uint64_t offset, const IoVec& iov, WriteFlags flags) {
    return below().try_write(rq, offset, iov, flags);
}

Task<Result<>> Filter::do_resize(uint64_t new_size) {
    CO_CHECK(co_await below().do_resize(new_size));
    set_size(below().size());
    co_return Result<>();
}

Result<Node::Passthrough> Filter::passthrough() {
    // A filter is there because it does something with the requests; those which do nothing say so themselves.
    return fail(ErrorKind::kUnsupported, "filter node '{}' ({}) must see every request", name(), driver());
}

}  // namespace gantry::block
