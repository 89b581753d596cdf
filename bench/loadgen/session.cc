#include "bench/loadgen/session.h"

#include <algorithm>
#include <cerrno>
#include <climits>
#include <cstdio>
#include <cstring>
#include <string_view>

#include <sys/socket.h>

#include "bench/loadgen/pattern.h"
#include "bench/loadgen/wire.h"

namespace gantry::bench {

namespace {

/// Larger than what a unix socket holds, small enough to stay in the second level cache.
constexpr size_t kReceiveBytes = 256 << 10;
constexpr size_t kMaxParts = 1024;  // IOV_MAX of Linux

}  // namespace

Session::Session(Connection connection, const Options& options, BlockRange range, uint64_t seed)
    : connection_(std::move(connection)),
      range_(std::move(range)),
      workload_(options.mode, options.read_percent, false, seed),
      stall_ns_(options.stall_ns),
      verify_(options.verify),
      slots_(options.depth),
      headers_(size_t{options.depth} * kRequestBytes),
      buffer_(kReceiveBytes) {
    free_.reserve(options.depth);
    parts_.reserve(size_t{options.depth} * 2);
    if (options.writes()) {
        payload_.resize(size_t{options.block_bytes} * (verify_ || options.fill ? options.depth : 1));
        fill_pattern(payload_, seed << 32, 1);
    }
}

Outcome<> Session::start(Workload workload, int64_t deadline_ns) {
    workload_ = workload;
    deadline_ns_ = deadline_ns;
    totals_ = Totals{};
    free_.clear();
    for (uint32_t i = 0; i < slots_.size(); i++) free_.push_back(i);
    const int64_t now = now_ns();
    totals_.last_reply_ns = now;
    return issue(now);
}

Outcome<> Session::issue(int64_t now) {
    // Only behind a batch that is on its way completely: the socket is full anyway, and headers_ can be used again.
    if (wants_to_send()) return {};
    parts_.clear();
    next_part_ = 0;
    headers_used_ = 0;
    while (now < deadline_ns_ && !free_.empty()) {
        const auto work = workload_.next(range_);
        if (!work) break;
        issue_one(*work, now);
    }
    if (now >= deadline_ns_ && workload_.once() && !workload_.exhausted(range_)) {
        return failure("the pass over the whole export took longer than --limit allows");
    }
    return send_parts();
}

void Session::issue_one(const Work& work, int64_t now) {
    const uint32_t index = free_.back();
    free_.pop_back();
    outstanding_++;
    Slot& slot = slots_[index];
    slot.cookie = (slot.cookie & ~uint64_t{0xffff}) + 0x10000 + index;
    slot.block = work.block;
    slot.issued_ns = now;
    slot.received = 0;
    slot.write = work.write;
    slot.in_use = true;
    // --fill and the run after it write through the same code: a fill leaves version 0.
    slot.version = range_.version(work.block) + (work.write && !workload_.once() ? 1 : 0);
    range_.set_busy(work.block, true);

    uint8_t* header = headers_.data() + headers_used_;
    headers_used_ += kRequestBytes;
    encode_request(header, work.write ? kCommandWrite : kCommandRead, slot.cookie, range_.offset_of(work.block),
                   range_.block_bytes());
    append(header, kRequestBytes);
    if (!work.write) return;
    uint8_t* payload = payload_.data();
    if (payload_.size() > range_.block_bytes()) payload += size_t{index} * range_.block_bytes();
    if (verify_ || workload_.once()) {
        fill_pattern({payload, range_.block_bytes()}, range_.offset_of(work.block), slot.version);
    }
    append(payload, range_.block_bytes());
}

void Session::append(const uint8_t* bytes, size_t count) {
    if (!parts_.empty()) {
        iovec& last = parts_.back();
        if (static_cast<const uint8_t*>(last.iov_base) + last.iov_len == bytes &&
            bytes < headers_.data() + headers_used_ && bytes >= headers_.data()) {
            last.iov_len += count;
            return;
        }
    }
    parts_.push_back({const_cast<uint8_t*>(bytes), count});
}

Outcome<> Session::send_parts() {
    while (next_part_ < parts_.size()) {
        msghdr message{};
        message.msg_iov = parts_.data() + next_part_;
        message.msg_iovlen = std::min(parts_.size() - next_part_, kMaxParts);
        const ssize_t sent = ::sendmsg(fd(), &message, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (sent < 0) {
            if (errno == EINTR) continue;
            if (errno == EAGAIN) return {};
            return failure(std::string("sending requests: ") + std::strerror(errno));
        }
        auto left = static_cast<size_t>(sent);
        while (left > 0) {
            iovec& part = parts_[next_part_];
            const size_t step = std::min(left, part.iov_len);
            part.iov_base = static_cast<uint8_t*>(part.iov_base) + step;
            part.iov_len -= step;
            left -= step;
            if (part.iov_len == 0) next_part_++;
        }
    }
    return {};
}

Outcome<> Session::transmit() {
    BENCH_CHECK(send_parts());
    return issue(now_ns());
}

Outcome<> Session::receive(bool wait) {
    const ssize_t got = ::recv(fd(), buffer_.data() + received_, buffer_.size() - received_, wait ? 0 : MSG_DONTWAIT);
    const int64_t now = now_ns();
    if (got == 0) {
        return failure("the server closed the connection with " + std::to_string(outstanding_) +
                       " requests outstanding");
    }
    if (got < 0) {
        if (errno != EAGAIN && errno != EINTR) return failure(std::string("receiving: ") + std::strerror(errno));
        return check_silence(now);
    }
    received_ += static_cast<size_t>(got);
    totals_.receives++;
    BENCH_CHECK(parse(now));
    return issue(now);
}

Outcome<> Session::check_silence(int64_t now) const {
    if (now - totals_.last_reply_ns <= stall_ns_) return {};
    return failure("the server has not answered for " + std::to_string(stall_ns_ / 1'000'000) + " ms; " +
                   std::to_string(outstanding_) + " requests are outstanding");
}

Outcome<> Session::parse(int64_t now) {
    while (parsed_ < received_) {
        if (body_left_ > 0) {
            BENCH_CHECK(take_body(now));
            continue;
        }
        const auto complete_header = parse_header(now);
        if (!complete_header) return failure(complete_header.error());
        if (!*complete_header) break;
    }
    if (parsed_ > 0) {
        std::memmove(buffer_.data(), buffer_.data() + parsed_, received_ - parsed_);
        received_ -= parsed_;
        parsed_ = 0;
    }
    return {};
}

Outcome<bool> Session::parse_header(int64_t now) {
    const uint8_t* header = buffer_.data() + parsed_;
    if (received_ - parsed_ < kSimpleReplyBytes) return false;  // the shorter of the two
    const auto magic = load_be<uint32_t>(header);
    if (magic == kSimpleReplyMagic) return parse_simple(header, now);
    if (magic == kStructuredReplyMagic && info().structured) return parse_chunk(header, now);
    char text[16];
    std::snprintf(text, sizeof text, "%#x", magic);
    return failure(std::string("the server broke the protocol: a reply begins with ") + text);
}

Outcome<bool> Session::parse_simple(const uint8_t* header, int64_t now) {
    const auto error = load_be<uint32_t>(header + 4);
    const auto slot = find_slot(load_be<uint64_t>(header + 8));
    if (!slot) return failure(slot.error());
    if (error) return failure(refused(**slot, error, {}));
    parsed_ += kSimpleReplyBytes;
    if ((*slot)->write) {
        BENCH_CHECK(complete(**slot, now));
        return true;
    }
    // NBD proto.md "Structured reply chunk message": once negotiated, a read is never answered by a simple reply.
    if (info().structured) return failure("the server broke the protocol: a simple reply to " + describe(**slot));
    BENCH_CHECK(begin_body(**slot, range_.offset_of((*slot)->block), range_.block_bytes(), true));
    return true;
}

Outcome<bool> Session::parse_chunk(const uint8_t* header, int64_t now) {
    const size_t have = received_ - parsed_;
    if (have < kChunkHeaderBytes) return false;
    const auto flags = load_be<uint16_t>(header + 4);
    const auto type = load_be<uint16_t>(header + 6);
    const auto length = load_be<uint32_t>(header + 16);
    const auto found = find_slot(load_be<uint64_t>(header + 8));
    if (!found) return failure(found.error());
    Slot& slot = **found;
    const uint8_t* data = header + kChunkHeaderBytes;
    const bool done = flags & kChunkFlagDone;

    if (type & kChunkErrorBit) {
        if (length < 6 || length > kReceiveBytes / 2)
            return failure("the server broke the protocol: length of an error chunk");
        if (have < kChunkHeaderBytes + length) return false;
        const size_t text = std::min<size_t>(load_be<uint16_t>(data + 4), length - 6);
        return failure(refused(slot, load_be<uint32_t>(data), {reinterpret_cast<const char*>(data + 6), text}));
    }
    if (type == kChunkNone && length == 0 && done) {
        parsed_ += kChunkHeaderBytes;
        BENCH_CHECK(complete(slot, now));
        return true;
    }
    if (type == kChunkOffsetData && length > 8 && !slot.write) {
        if (have < kChunkHeaderBytes + 8) return false;
        parsed_ += kChunkHeaderBytes + 8;
        BENCH_CHECK(begin_body(slot, load_be<uint64_t>(data), length - 8, done));
        return true;
    }
    if (type == kChunkOffsetHole && length == 12 && !slot.write) {
        if (have < kChunkHeaderBytes + 12) return false;
        if (verify_) return failure("wrong data: a hole in " + describe(slot));
        parsed_ += kChunkHeaderBytes + 12;
        const auto hole_bytes = load_be<uint32_t>(data + 8);
        BENCH_CHECK(begin_body(slot, load_be<uint64_t>(data), hole_bytes, done));
        body_left_ = 0;  // a hole has no bytes on the wire
        body_slot_ = nullptr;
        if (done) BENCH_CHECK(complete(slot, now));
        return true;
    }
    return failure("the server broke the protocol: chunk of type " + std::to_string(type) + " for " + describe(slot));
}

Outcome<> Session::begin_body(Slot& slot, uint64_t offset, uint32_t length, bool last) {
    const uint64_t start = range_.offset_of(slot.block);
    const uint64_t end = start + range_.block_bytes();
    if (offset < start || offset > end || length > end - offset || length > range_.block_bytes() - slot.received) {
        return failure("the server broke the protocol: data outside of " + describe(slot));
    }
    slot.received += length;
    body_slot_ = &slot;
    body_offset_ = offset;
    body_left_ = length;
    body_last_ = last;
    return {};
}

Outcome<> Session::take_body(int64_t now) {
    const auto count = static_cast<uint32_t>(std::min<size_t>(body_left_, received_ - parsed_));
    if (verify_) BENCH_CHECK(check_body({buffer_.data() + parsed_, count}));
    parsed_ += count;
    body_offset_ += count;
    body_left_ -= count;
    if (body_left_ > 0 || !body_last_) return {};
    return complete(*body_slot_, now);
}

Outcome<> Session::check_body(std::span<const uint8_t> data) {
    const size_t wrong = find_mismatch(data, body_offset_, body_slot_->version);
    totals_.verified_bytes += data.size();
    if (wrong == data.size()) return {};
    return failure("wrong data: byte " + std::to_string(body_offset_ + wrong) + " of the export, in " +
                   describe(*body_slot_) + " (written " + std::to_string(body_slot_->version) + " times by this run)");
}

Outcome<> Session::complete(Slot& slot, int64_t now) {
    if (!slot.write && slot.received != range_.block_bytes()) {
        return failure("the server broke the protocol: an incomplete answer to " + describe(slot));
    }
    if (slot.write) range_.set_version(slot.block, slot.version);
    range_.set_busy(slot.block, false);
    slot.in_use = false;
    free_.push_back(static_cast<uint32_t>(&slot - slots_.data()));
    outstanding_--;
    totals_.requests++;
    totals_.bytes += range_.block_bytes();
    totals_.last_reply_ns = now;
    totals_.latency.record(static_cast<uint64_t>(now - slot.issued_ns));
    return {};
}

Outcome<Session::Slot*> Session::find_slot(uint64_t cookie) {
    const uint64_t index = cookie & 0xffff;
    if (index < slots_.size() && slots_[index].in_use && slots_[index].cookie == cookie) return &slots_[index];
    return failure("the server broke the protocol: a reply with a cookie that is not outstanding");
}

std::string Session::describe(const Slot& slot) const {
    return std::string(slot.write ? "a write" : "a read") + " of " + std::to_string(range_.block_bytes()) +
           " bytes at offset " + std::to_string(range_.offset_of(slot.block));
}

std::string Session::refused(const Slot& slot, uint32_t error, std::string_view text) const {
    // The error numbers of NBD are those of Linux.
    const char* name = strerrorname_np(static_cast<int>(error));
    std::string sentence =
        describe(slot) + " was answered with " + (name ? name : "error") + " (" + std::to_string(error) + ")";
    if (!text.empty()) sentence.append(": ").append(text);
    return sentence;
}

}  // namespace gantry::bench
