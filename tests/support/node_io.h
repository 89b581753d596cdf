// Requests of a test on a node, outside any channel. Header only.

#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "block/node.h"
#include "runtime/task_scope.h"

namespace gantry::test {

using Bytes = std::vector<uint8_t>;

inline Bytes pattern(size_t size, uint8_t seed) {
    Bytes data(size);
    for (size_t i = 0; i < size; i++) data[i] = static_cast<uint8_t>(seed + i * 7 + i / 251);
    return data;
}

inline Task<Result<>> node_write(block::Node* node, uint64_t offset, Bytes data,
                                 block::WriteFlags flags = block::WriteFlags::kNone) {
    block::Request rq = block::Request::internal();
    const iovec iov{data.data(), data.size()};
    co_return co_await node->write(rq, offset, IoVec(iov), flags);
}

inline Task<Result<Bytes>> node_read(block::Node* node, uint64_t offset, size_t length) {
    block::Request rq = block::Request::internal();
    Bytes data(length, 0xee);
    const iovec iov{data.data(), data.size()};
    CO_CHECK(co_await node->read(rq, offset, IoVec(iov)));
    co_return data;
}

inline Task<Result<>> node_zero(block::Node* node, uint64_t offset, uint64_t length,
                                block::WriteFlags flags = block::WriteFlags::kNone) {
    block::Request rq = block::Request::internal();
    co_return co_await node->write_zeroes(rq, offset, length, flags);
}

inline Task<Result<>> node_discard(block::Node* node, uint64_t offset, uint64_t length) {
    block::Request rq = block::Request::internal();
    co_return co_await node->discard(rq, offset, length);
}

inline Task<Result<>> node_flush(block::Node* node) {
    block::Request rq = block::Request::internal();
    co_return co_await node->flush(rq);
}

inline Task<Result<block::BlockStatus>> node_status(block::Node* node, uint64_t offset, uint64_t length) {
    block::Request rq = block::Request::internal();
    co_return co_await node->block_status(rq, offset, length);
}

/// For TaskScope::spawn: puts the outcome where the test looks.
template <class T>
Task<void> store(Task<Result<T>> task, std::vector<Result<T>>* results) {
    Result<T> result = co_await std::move(task);
    results->push_back(std::move(result));
}

inline std::string error_of(const Result<>& result) { return result ? std::string() : result.error().message(); }

}  // namespace gantry::test
