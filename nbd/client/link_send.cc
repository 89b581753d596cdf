// Sending: requests of a turn are gathered into one sendmsg.

#include <algorithm>
#include <cerrno>

#include "nbd/client/link.h"

namespace gantry::nbd::client {

namespace {

constexpr size_t kMaxGather = 512;
/// READs from this size on are received with little read ahead, so that their data goes straight to where it belongs.
constexpr uint64_t kLargeRead = 16u << 10;

}  // namespace

std::string_view command_name(uint16_t command) {
    constexpr std::string_view kNames[] = {"READ", "WRITE", "DISC",         "FLUSH",
                                           "TRIM", "CACHE", "WRITE_ZEROES", "BLOCK_STATUS"};
    return command < std::size(kNames) ? kNames[command] : "a request";
}

void Link::encode(Operation& op) {
    RequestHeader header{};
    header.magic = now_.extended ? kExtendedRequestMagic : kRequestMagic;
    header.flags = op.flags;
    if (now_.extended && op.command == kCmdWrite) header.flags |= kCmdPayloadLen;
    header.command = op.command;
    header.cookie = op.cookie;
    header.offset = op.offset;
    header.length = op.length;
    encode_request(op.header.data(), header, now_.extended);
    op.header_size = now_.extended ? kExtendedRequestSize : kRequestSize;
    op.sent_bytes = 0;
}

void Link::begin_requests() {
    while (!leaving_ && !queued_.empty() && !free_slots_.empty()) {
        Operation& op = queued_.pop();
        const uint8_t slot = free_slots_.back();
        free_slots_.pop_back();
        slots_[slot] = &op;
        op.cookie = (++next_cookie_ << 8) | slot;
        if (op.command == kCmdRead && op.length >= kLargeRead) ++large_reads_;
        encode(op);
        unsent_.push(op);
    }
}

size_t Link::gather(std::vector<iovec>& list) const {
    list.clear();
    size_t bytes = 0;
    for (Operation* op = unsent_.front(); op && list.size() < kMaxGather; op = op->next) {
        uint64_t skip = op->sent_bytes;
        if (skip < op->header_size) {
            list.push_back({op->header.data() + skip, op->header_size - skip});
            bytes += op->header_size - skip;
            skip = 0;
        } else {
            skip -= op->header_size;
        }
        if (op->command != kCmdWrite) continue;
        for (uint32_t i = 0; i < op->data.count && list.size() < kMaxGather; ++i) {
            const iovec& part = op->data.data[i];
            if (skip >= part.iov_len) {
                skip -= part.iov_len;
                continue;
            }
            list.push_back({static_cast<uint8_t*>(part.iov_base) + skip, part.iov_len - skip});
            bytes += part.iov_len - skip;
            skip = 0;
        }
        if (bytes >= (1u << 20)) break;
    }
    return bytes;
}

void Link::note_sent(uint64_t bytes) {
    while (bytes > 0) {
        Operation& op = *unsent_.front();
        const uint64_t part = std::min(bytes, op.bytes_to_send() - op.sent_bytes);
        op.sent_bytes += part;
        bytes -= part;
        if (!op.sent()) return;
        unsent_.pop();
        // An answer that came before the payload had left; its memory was still in use.
        if (op.answered) answer_complete(op);
    }
}

void Link::wake_writer() { writer_wake_.notify_one(); }

Task<void> Link::write_requests() {
    std::vector<iovec> list;
    list.reserve(kMaxGather);
    while (!stop_writing_) {
        begin_requests();
        if (unsent_.empty()) {
            if (say_bye_) {
                co_await say_good_bye();
                co_return;
            }
            co_await writer_wake_.wait();
            continue;
        }
        gather(list);
        int n = transport_->try_send(list.data(), list.size());
        if (n == -EAGAIN) n = co_await transport_->send(list.data(), list.size());
        if (n < 0) {
            // The reader may still find what the server said last; it sees the end after that.
            if (loss_.empty()) loss_ = stream_error(n);
            transport_->shut_down();
            co_return;
        }
        note_sent(static_cast<uint64_t>(n));
    }
}

Task<void> Link::say_good_bye() {
    std::array<uint8_t, kExtendedRequestSize> bytes{};
    RequestHeader header{};
    header.magic = now_.extended ? kExtendedRequestMagic : kRequestMagic;
    header.command = kCmdDisc;
    encode_request(bytes.data(), header, now_.extended);
    const size_t size = now_.extended ? kExtendedRequestSize : kRequestSize;
    const Result<> sent = co_await transport_->send_all(std::span<const uint8_t>(bytes).first(size));
    if (sent) co_await transport_->bye();
    transport_->shut_down();
}

}  // namespace gantry::nbd::client
