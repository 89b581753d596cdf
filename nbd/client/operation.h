// Operation: one request of the client node, from the layer above to its answer.

#pragma once

#include <array>
#include <coroutine>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "nbd/client/coverage.h"
#include "nbd/protocol.h"
#include "runtime/error.h"
#include "runtime/iovec.h"

namespace gantry::nbd::client {

/// Lives in the frame of whoever asks, until Link::execute() returns. The memory of `data` is used in place.
struct Operation {
    Command command = kCmdRead;
    uint16_t flags = 0;
    uint64_t offset = 0;
    uint64_t length = 0;  // of the range; of READ and WRITE: data.bytes
    IoVec data;           // READ: where to; WRITE: what

    /// Of BLOCK_STATUS: the first extents as the server said them, no more than max_extents.
    struct Extent {
        uint64_t length, flags;
    };
    std::vector<Extent> extents;
    size_t max_extents = 1;

    // ---- For Link alone ----
    Operation* next = nullptr;
    uint64_t sequence = 0;  // order of arrival
    uint64_t cookie = 0;
    std::coroutine_handle<> waiter;
    std::array<uint8_t, kExtendedRequestSize> header;
    uint32_t header_size = 0;
    uint64_t sent_bytes = 0;  // of header and payload
    bool answered = false;    // completely; stays true after execute() if the server has said what became of it
    uint32_t wire_error = 0;  // the first one of the answer
    std::string error_text;
    Coverage coverage;
    Result<> result;

    /// How much of a connection it takes; small requests count alike.
    uint32_t cost() const { return 1 + static_cast<uint32_t>(data.bytes >> 14); }
    uint64_t bytes_to_send() const { return header_size + (command == kCmdWrite ? data.bytes : 0); }
    bool sent() const { return sent_bytes == bytes_to_send(); }
    /// As if it had never been sent.
    void forget_answer() {
        cookie = header_size = sent_bytes = 0;
        answered = false;
        wire_error = 0;
        error_text.clear();
        extents.clear();
        coverage.clear();
    }
};

/// FIFO of operations through their `next`.
class OperationQueue {
  public:
    bool empty() const { return !head_; }
    Operation* front() const { return head_; }
    void push(Operation& op) {
        op.next = nullptr;
        (head_ ? tail_->next : head_) = &op;
        tail_ = &op;
    }
    void push_front(Operation& op) {
        op.next = head_;
        head_ = &op;
        if (!op.next) tail_ = &op;
    }
    Operation& pop() {
        Operation& op = *head_;
        head_ = op.next;
        return op;
    }

  private:
    Operation* head_ = nullptr;
    Operation* tail_ = nullptr;
};

/// "READ".
std::string_view command_name(uint16_t command);

}  // namespace gantry::nbd::client
