// Receiving: every word of the server is checked before it is used.

#include <algorithm>
#include <cerrno>

#include "nbd/client/link.h"

namespace gantry::nbd::client {

namespace {

/// What an error of an unknown kind may have beside its code and its text.
constexpr size_t kUnknownPart = 64;
/// The longest part of an answer that must stand in one piece: an error with its text.
constexpr size_t kReplyRoom = kMaxString + 6 + kUnknownPart;
/// Received beyond what is known to come, while large reads are under way: their data is not to end up here.
constexpr size_t kSmallWindow = 512;
/// Answers before other coroutines of the loop get their turn.
constexpr unsigned kRepliesPerTurn = 64;
constexpr size_t kBytesPerTurn = 1u << 20;
constexpr uint64_t kLargeRead = 16u << 10;
constexpr size_t kMaxReceive = 64;  // iovecs

int errno_of_wire(uint32_t error) {
    switch (error) {
        case kWirePerm:
            return EPERM;
        case kWireIo:
            return EIO;
        case kWireNoMem:
            return ENOMEM;
        case kWireNoSpace:
            return ENOSPC;
        case kWireOverflow:
            return EOVERFLOW;
        case kWireNotSup:
            return ENOTSUP;
        case kWireShutdown:
            return ESHUTDOWN;
        default:
            return EINVAL;
    }
}

}  // namespace

template <class... Args>
bool Link::violation(fmt::format_string<Args...> format, Args&&... args) {
    loss_ = "the server breaks the NBD protocol: " + fmt::format(format, std::forward<Args>(args)...);
    broke_protocol_ = true;
    return false;
}

void Link::connection_ended(std::string why) {
    if (loss_.empty()) loss_ = std::move(why);
}

// ---- Bytes ----

size_t Link::window() const { return large_reads_ != 0 ? kSmallWindow : in_.size(); }

Task<bool> Link::receive_more() {
    if (begin_ == end_) begin_ = end_ = 0;
    if (in_.size() - end_ < kReplyRoom) {
        std::memmove(in_.data(), in_.data() + begin_, buffered());
        end_ -= begin_;
        begin_ = 0;
    }
    const iovec room{in_.data() + end_, std::min(window(), in_.size() - end_)};
    const int n = co_await transport_->receive(&room, 1);
    if (n <= 0) {
        connection_ended(stream_error(n));
        co_return false;
    }
    end_ += static_cast<size_t>(n);
    co_return true;
}

Task<bool> Link::need(size_t bytes) {
    CHECK(bytes <= kReplyRoom, "parts of answers that are parsed are short");
    while (buffered() < bytes) {
        const bool more = co_await receive_more();
        if (!more) co_return false;
    }
    co_return true;
}

Task<bool> Link::skip(uint64_t bytes) {
    while (bytes > 0) {
        const size_t part = static_cast<size_t>(std::min<uint64_t>(bytes, buffered()));
        begin_ += part;
        bytes -= part;
        if (bytes == 0) break;
        const bool more = co_await receive_more();
        if (!more) co_return false;
    }
    co_return true;
}

/// [at, at + length) of the memory of `op`: first what is buffered, the rest straight from the socket.
Task<bool> Link::read_data(Operation& op, uint64_t at, uint64_t length) {
    const size_t here = static_cast<size_t>(std::min<uint64_t>(length, buffered()));
    copy_to_iovec(op.data, at, in_.data() + begin_, here);
    begin_ += here;
    at += here;
    length -= here;
    while (length > 0) {
        begin_ = end_ = 0;
        iovec list[kMaxReceive + 1];
        size_t count = 0, asked = 0;
        uint64_t skip = at;
        for (uint32_t i = 0; i < op.data.count && count < kMaxReceive && asked < length; ++i) {
            const iovec& part = op.data.data[i];
            if (skip >= part.iov_len) {
                skip -= part.iov_len;
                continue;
            }
            const size_t size = static_cast<size_t>(std::min<uint64_t>(part.iov_len - skip, length - asked));
            list[count++] = {static_cast<uint8_t*>(part.iov_base) + skip, size};
            asked += size;
            skip = 0;
        }
        // The next answer's header comes along.
        if (asked == length) list[count++] = {in_.data(), window()};
        const int n = co_await transport_->receive(list, count);
        if (n <= 0) {
            connection_ended(stream_error(n));
            co_return false;
        }
        const size_t used = std::min<size_t>(static_cast<size_t>(n), asked);
        at += used;
        length -= used;
        end_ = static_cast<size_t>(n) - used;
        turn_bytes_ += used;
        if (turn_bytes_ >= kBytesPerTurn) {
            turn_bytes_ = 0;
            co_await yield_turn();
        }
    }
    co_return true;
}

// ---- Answers ----

Operation* Link::find(uint64_t cookie) const {
    const uint64_t slot = cookie & 0xff;
    if (slot >= kSlots || !slots_[slot] || slots_[slot]->cookie != cookie || slots_[slot]->answered) return nullptr;
    return slots_[slot];
}

/// The last word about an operation has come. False: the words do not make sense together.
bool Link::answer_complete(Operation& op) {
    if (op.wire_error == 0) {
        if (op.command == kCmdRead && !op.coverage.complete(op.length)) {
            return violation("its answer to a READ of {} bytes at {} lacks some of them", op.length, op.offset);
        }
        if (op.command == kCmdBlockStatus && op.extents.empty()) {
            return violation("its answer to BLOCK_STATUS lacks the context that was asked for");
        }
    }
    op.answered = true;
    if (!op.sent()) return true;  // note_sent() comes back here: the memory is still in use
    const uint8_t slot = static_cast<uint8_t>(op.cookie & 0xff);
    slots_[slot] = nullptr;
    free_slots_.push_back(slot);
    if (op.command == kCmdRead && op.length >= kLargeRead) --large_reads_;
    if (free_slots_.size() == 1 && !queued_.empty()) wake_writer();
    if (op.wire_error == kWireShutdown && !abandoned_) {
        // The server takes its leave: what it has begun it finishes.
        leaving_ = true;
        if (config_->reconnect_delay.count() > 0) {
            again_.push(op);
        } else {
            finish(op, fail(ErrorKind::kShutdown, "node '{}': NBD server '{}' is shutting down", config_->node_name,
                            config_->address.text()));
        }
        return true;
    }
    if (op.wire_error == 0) {
        good_ = true;
        finish(op, Result<>());
        return true;
    }
    good_ = true;
    const int e = errno_of_wire(op.wire_error);
    std::string text =
        fmt::format("node '{}': NBD server '{}' answers {} of {} bytes at {}: {}", config_->node_name,
                    config_->address.text(), command_name(op.command), op.length, op.offset, errno_text(e));
    if (!op.error_text.empty()) text += fmt::format(" (it says: {})", op.error_text);
    const ErrorKind kind = Error::from_errno(e, "").kind();
    finish(op, std::unexpected(Error(kind, std::move(text), e)));
    return true;
}

bool Link::cover(Operation& op, uint64_t at, uint64_t length) {
    if (length == 0) return violation("a chunk of an answer is empty");
    if (at < op.offset || at - op.offset > op.length || length > op.length - (at - op.offset)) {
        return violation("it answers {} bytes at {} to a READ of {} bytes at {}", length, at, op.length, op.offset);
    }
    const uint64_t begin = at - op.offset;
    switch (op.coverage.add(begin, begin + length)) {
        case Coverage::Added::kOk:
            return true;
        case Coverage::Added::kOverlap:
            return violation("it answers {} bytes at {} twice", length, at);
        case Coverage::Added::kShredded:
            break;
    }
    return violation("it answers a READ of {} bytes in more than {} separate pieces", op.length, Coverage::kMaxPieces);
}

Task<void> Link::read_replies() {
    for (unsigned replies = 1;; ++replies) {
        const bool more = co_await read_reply();
        if (!more) break;
        if (!abandoned_) group_->silence.answered();
        const bool idle = free_slots_.size() == kSlots;
        if (leaving_ && idle) {
            connection_ended("the server is shutting down");
            break;
        }
        if (replies % kRepliesPerTurn == 0) co_await yield_turn();
    }
}

Task<bool> Link::read_reply() {
    bool ok = buffered() >= 4;
    if (!ok) ok = co_await need(4);
    if (!ok) co_return false;
    const auto magic = load_big<uint32_t>(at());
    if (magic == kSimpleReplyMagic && !now_.extended) {
        ok = co_await read_simple();
    } else if (magic == kStructuredReplyMagic && now_.structured && !now_.extended) {
        ok = co_await read_chunk(kChunkHeaderSize);
    } else if (magic == kExtendedReplyMagic && now_.extended) {
        ok = co_await read_chunk(kExtendedChunkHeaderSize);
    } else {
        ok = violation("an answer begins with the magic number {:#010x}", magic);
    }
    co_return ok;
}

Task<bool> Link::read_simple() {
    bool ok = buffered() >= kSimpleReplySize;
    if (!ok) ok = co_await need(kSimpleReplySize);
    if (!ok) co_return false;
    const auto error = load_big<uint32_t>(at() + 4);
    const auto cookie = load_big<uint64_t>(at() + 8);
    begin_ += kSimpleReplySize;
    Operation* op = find(cookie);
    if (!op) co_return violation("it answers a request that was not sent (cookie {:#x})", cookie);
    if (op->coverage.touched() || !op->extents.empty() || op->wire_error != 0) {
        co_return violation("it mixes chunks and a simple reply in one answer");
    }
    op->wire_error = error;
    if (error == 0 && op->command == kCmdRead) {
        if (now_.structured) co_return violation("it answers a READ with a simple reply after STRUCTURED_REPLY");
        ok = cover(*op, op->offset, op->length);
        if (ok) ok = co_await read_data(*op, 0, op->length);
        if (!ok) co_return false;
    }
    co_return answer_complete(*op);
}

Task<bool> Link::read_chunk(size_t header_size) {
    bool ok = buffered() >= header_size;
    if (!ok) ok = co_await need(header_size);
    if (!ok) co_return false;
    const uint8_t* p = at();
    ReplyHeader header;
    header.flags = load_big<uint16_t>(p + 4);
    header.type = load_big<uint16_t>(p + 6);
    header.cookie = load_big<uint64_t>(p + 8);
    header.length = now_.extended ? load_big<uint64_t>(p + 24) : load_big<uint32_t>(p + 16);
    const uint64_t offset = now_.extended ? load_big<uint64_t>(p + 16) : 0;
    begin_ += header_size;
    Operation* op = find(header.cookie);
    if (!op) co_return violation("it answers a request that was not sent (cookie {:#x})", header.cookie);
    if (now_.extended && offset != op->offset) {
        co_return violation("it answers a request at {} with the offset {}", op->offset, offset);
    }
    if (header.flags & ~kChunkDone) co_return violation("a chunk has the flags {:#x}", header.flags);
    const bool read = op->command == kCmdRead, status = op->command == kCmdBlockStatus;
    const uint16_t status_type = now_.extended ? kChunkBlockStatusExt : kChunkBlockStatus;
    if (header.type == kChunkNone) {
        if (header.length != 0) co_return violation("an empty chunk has {} bytes", header.length);
        if (!(header.flags & kChunkDone)) co_return violation("an empty chunk is not the last one");
    } else if (header.type == kChunkOffsetData && read) {
        ok = co_await read_data_chunk(*op, header);
    } else if (header.type == kChunkOffsetHole && read) {
        ok = co_await read_hole_chunk(*op, header);
    } else if (header.type == status_type && status) {
        ok = co_await read_status_chunk(*op, header);
    } else if (header.type & 0x8000) {
        ok = co_await read_error_chunk(*op, header);
    } else {
        ok = violation("it answers {} with a chunk of type {}", command_name(op->command), header.type);
    }
    if (!ok) co_return false;
    if (header.flags & kChunkDone) co_return answer_complete(*op);
    co_return true;
}

Task<bool> Link::read_data_chunk(Operation& op, ReplyHeader header) {
    if (header.length <= 8 || header.length - 8 > op.length) {
        co_return violation("a chunk of {} bytes answers a READ of {}", header.length, op.length);
    }
    bool ok = buffered() >= 8;
    if (!ok) ok = co_await need(8);
    if (!ok) co_return false;
    const auto offset = load_big<uint64_t>(at());
    begin_ += 8;
    ok = cover(op, offset, header.length - 8);
    if (!ok) co_return false;
    ok = co_await read_data(op, offset - op.offset, header.length - 8);
    co_return ok;
}

Task<bool> Link::read_hole_chunk(Operation& op, ReplyHeader header) {
    if (header.length != 12) co_return violation("the description of a hole has {} bytes", header.length);
    bool ok = buffered() >= 12;
    if (!ok) ok = co_await need(12);
    if (!ok) co_return false;
    const auto offset = load_big<uint64_t>(at());
    const auto length = load_big<uint32_t>(at() + 8);
    begin_ += 12;
    ok = cover(op, offset, length);
    if (ok) fill_iovec(op.data, offset - op.offset, length);
    co_return ok;
}

Task<bool> Link::read_status_chunk(Operation& op, ReplyHeader header) {
    const size_t fixed = now_.extended ? 8 : 4, each = now_.extended ? 16 : 8;
    // 2^20 extents are the protocol's limit.
    const uint64_t longest = fixed + each * (uint64_t{1} << 20);
    if (header.length < fixed + each || header.length > longest || (header.length - fixed) % each != 0) {
        co_return violation("a block status of {} bytes", header.length);
    }
    bool ok = buffered() >= fixed;
    if (!ok) ok = co_await need(fixed);
    if (!ok) co_return false;
    const auto id = load_big<uint32_t>(at());
    if (!now_.context_id || id != *now_.context_id) co_return violation("a block status of the unknown context {}", id);
    if (!op.extents.empty()) co_return violation("two block statuses of one context in one answer");
    const uint64_t count = (header.length - fixed) / each;
    if (now_.extended) {
        const auto said = load_big<uint32_t>(at() + 4);
        if (said != count) co_return violation("a block status of {} extents in {} bytes", said, header.length);
    }
    begin_ += fixed;
    for (uint64_t i = 0; i < count; ++i) {
        if (op.extents.size() == op.max_extents) {
            // Older servers tell more than was asked for.
            ok = co_await skip((count - i) * each);
            co_return ok;
        }
        ok = buffered() >= each;
        if (!ok) ok = co_await need(each);
        if (!ok) co_return false;
        const uint8_t* p = at();
        const Operation::Extent extent = now_.extended
                                             ? Operation::Extent{load_big<uint64_t>(p), load_big<uint64_t>(p + 8)}
                                             : Operation::Extent{load_big<uint32_t>(p), load_big<uint32_t>(p + 4)};
        if (extent.length == 0) co_return violation("an extent of a block status is empty");
        op.extents.push_back(extent);
        begin_ += each;
    }
    co_return true;
}

Task<bool> Link::read_error_chunk(Operation& op, ReplyHeader header) {
    const bool with_offset = header.type == kChunkErrorOffset;
    const size_t fixed = with_offset ? 14 : 6;
    const bool known = header.type == kChunkError || with_offset;
    if (header.length < fixed || header.length > kMaxString + fixed + (known ? 0 : kUnknownPart)) {
        co_return violation("an error of {} bytes", header.length);
    }
    const auto length = static_cast<size_t>(header.length);
    bool ok = buffered() >= length;
    if (!ok) ok = co_await need(length);
    if (!ok) co_return false;
    const uint8_t* p = at();
    const auto error = load_big<uint32_t>(p);
    const size_t text = load_big<uint16_t>(p + 4);
    if (text > length - fixed || (known && text != length - fixed)) {
        co_return violation("an error of {} bytes has a text of {}", length, text);
    }
    if (error == 0) co_return violation("an error is none");
    if (with_offset) {
        const auto offset = load_big<uint64_t>(p + 6 + text);
        if (offset < op.offset || offset - op.offset > op.length) {
            co_return violation("an error at {} answers a request of {} bytes at {}", offset, op.length, op.offset);
        }
    }
    if (op.wire_error == 0) {
        op.wire_error = error;
        op.error_text = printable({reinterpret_cast<const char*>(p) + 6, text});
    }
    begin_ += length;
    co_return true;
}

}  // namespace gantry::nbd::client
