#include "fuse/classic.h"

#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "runtime/check.h"
#include "runtime/log.h"
#include "runtime/timer.h"

namespace gantry::fuse {

namespace {

/// Of a WRITE; its data then begins where the room does.
constexpr size_t kHeadSize = sizeof(InHeader) + sizeof(WriteIn);
/// What other requests bring besides their own struct is not looked at.
constexpr size_t kMaxArgs = 216;
/// Requests of one queue that are under way at a time, and idle slots that it keeps.
constexpr size_t kMaxSlots = 256;
constexpr size_t kKeptSlots = 32;
/// What a queue does without letting its loop reap.
constexpr uint32_t kTurnRequests = 64;
/// A queue with so much to do without a pause calls another one; a large read counts as several.
constexpr uint32_t kHandsFull = 16;
constexpr uint32_t kBytesThatCountAsOne = 64 << 10;
/// A queue that was called and wakes up so often for nothing, or for a single request, is not needed.
constexpr uint32_t kVainWakes = 8;
constexpr uint32_t kLoneWakes = 16;
/// How long the next request of a lone client may take while it is polled for.
constexpr std::chrono::nanoseconds kNextRequest{20'000};

}  // namespace

struct ClassicQueue::Slot {
    /// All of it is there before anything is read into it: when the process is killed while the kernel waits for a page
    /// of ours, the kernel answers the request with EIO instead of keeping it for the next process.
    Slot() { (void)::madvise(room.data(), room.size(), MADV_POPULATE_WRITE); }

    Call call;
    Buffer room = Buffer::alloc(kMaxWrite);
    OutHeader out;
    alignas(8) uint8_t head[sizeof(InHeader) + kMaxArgs] = {};
};

void ClassicQueues::call_another() {
    for (const auto& queue : all) {
        if (queue->called_.load(std::memory_order_relaxed)) continue;
        if (queue->called_.exchange(true)) continue;
        queue->call_.set();
        return;
    }
}

uint64_t ClassicQueues::answered() const {
    uint64_t sum = 0;
    for (const auto& queue : all) sum += queue->counters().requests.load(std::memory_order_relaxed);
    return sum;
}

ClassicQueue::ClassicQueue(Loop& loop, int fd, size_t index, FileService& service, block::Channel& channel,
                           ClassicQueues& siblings)
    : loop_(loop),
      fd_(fd),
      index_(index),
      service_(service),
      channel_(channel),
      siblings_(siblings),
      follower_(loop),
      called_(index == 0) {}

ClassicQueue::~ClassicQueue() { CHECK(out_ == 0, "a queue is destroyed when all its requests are answered"); }

Task<QueueEnd> ClassicQueue::run() {
    uint32_t since_pause = 0;
    while (!stopping_) {
        if (channel_.quiesced()) {
            co_await channel_.resumed();
            continue;
        }
        if (!called_.load(std::memory_order_relaxed)) {
            co_await call_.wait();
            call_.reset();
            continue;
        }
        if (free_.empty() && slots_.size() == kMaxSlots) {
            co_await returned_.wait();
            continue;
        }
        const Step step = this->step();
        if (step == Step::kEnd) break;
        if (step == Step::kNothing) {
            since_pause = 0;
            if (worth_staying()) co_await wait_for_request();
            continue;
        }
        if (load_ >= kHandsFull * (calls_made_ + 1)) {
            ++calls_made_;
            siblings_.call_another();
        }
        // What was done beside this loop may wait for its reply.
        if (++since_pause >= kTurnRequests || large_) {
            large_ = false;
            since_pause = 0;
            co_await yield_turn();
        }
    }
    co_await scope_.join();
    follower_.stop();
    co_return end_;
}

Task<void> ClassicQueue::stop() {
    stopping_ = true;
    if (polling_) polling_->cancel();
    call_.set();
    returned_.notify_all();
    co_return;
}

/// Reads one request and answers it, or lets it be answered.
ClassicQueue::Step ClassicQueue::step() {
    Slot* slot = take_slot();
    const iovec parts[2] = {{slot->head, kHeadSize}, slot->room.iov()};
    const ssize_t n = ::readv(fd_, parts, 2);
    if (n < 0) {
        const int error = errno;
        give_back(slot);
        if (error == EAGAIN) return Step::kNothing;
        if (error == EINTR || error == ENOENT) return Step::kTaken;  // it vanished while it was read
        if (error != ENODEV && error != ECONNABORTED && error != ENOTCONN) {
            log::error("FUSE: reading a request: {}", errno_text(error));
            end_ = QueueEnd::kBroken;
        } else {
            end_ = QueueEnd::kUnmounted;
        }
        return Step::kEnd;
    }
    if (!accept(*slot, static_cast<size_t>(n))) return Step::kEnd;
    Call& call = slot->call;
    if (lone_.came_meanwhile() && in_a_row_ == 1) note_pause();
    last_pid_ = call.header.pid;
    ++in_a_row_;
    call.among_others = !lone_.likely();
    if (call.error != 0 || service_.try_answer(call, channel_)) {
        load_ += 1 + call.reply_size / kBytesThatCountAsOne;
        reply(*slot);
        give_back(slot);
    } else {
        large_ = call.data_size > kBytesThatCountAsOne;
        scope_.spawn(answer_later(slot));
    }
    return Step::kTaken;
}

/// Makes a Call of what was received; false when nothing that follows can be trusted.
bool ClassicQueue::accept(Slot& slot, size_t received) {
    Call& call = slot.call;
    call.room = slot.room.data();
    call.room_size = kMaxWrite;
    call.data_size = 0;
    call.error = 0;
    call.reply_size = 0;
    call.in_room = call.silent = false;
    std::memcpy(&call.header, slot.head, sizeof call.header);
    size_t args = std::min(received, kHeadSize);
    if (received > kHeadSize) {
        const size_t rest = received - kHeadSize;
        if (call.opcode() == Opcode::kWrite) {
            call.data_size = static_cast<uint32_t>(rest);
        } else {
            const size_t more = std::min(rest, sizeof slot.head - kHeadSize);
            std::memcpy(slot.head + kHeadSize, slot.room.data(), more);
            args += more;
            call.data_size = static_cast<uint32_t>(rest - more);
        }
    }
    call.args = {slot.head + sizeof(InHeader), args - std::min(args, sizeof(InHeader))};
    const CallFault fault = received < sizeof(InHeader) ? CallFault::kBroken : check_call(call, received);
    if (fault == CallFault::kBroken) [[unlikely]] {
        log::error("FUSE: {} bytes came that are no request (opcode {}, length {})", received, call.header.opcode,
                   call.header.len);
        end_ = QueueEnd::kBroken;
        give_back(&slot);
        return false;
    }
    if (fault == CallFault::kRefused) [[unlikely]] {
        log::warn("FUSE: a request with opcode {} does not fit together ({} bytes)", call.header.opcode, received);
        call.fail(EIO);
    }
    return true;
}

Task<void> ClassicQueue::answer_later(Slot* slot) {
    co_await service_.answer(slot->call, channel_);
    reply(*slot);
    give_back(slot);
}

void ClassicQueue::reply(Slot& slot) {
    Call& call = slot.call;
    counters_.count(call);
    if (call.silent) return;
    const uint32_t size = call.error == 0 ? call.reply_size : 0;
    slot.out = {static_cast<uint32_t>(sizeof slot.out) + size, call.error, call.header.unique};
    const void* body = call.in_room ? static_cast<const void*>(call.room) : &call.body;
    const iovec parts[2] = {{&slot.out, sizeof slot.out}, {const_cast<void*>(body), size}};
    while (::writev(fd_, parts, size > 0 ? 2 : 1) < 0) {
        if (errno == EINTR) continue;
        // ENOENT: nobody waits for it any more. The rest: the mount is gone, which the next read tells.
        if (errno != ENOENT && errno != ENODEV && errno != ECONNABORTED && errno != ENOTCONN) {
            log::error("FUSE: replying to a request with opcode {}: {}", call.header.opcode, errno_text(errno));
        }
        return;
    }
}

/// So many requests came without a pause.
uint32_t ClassicQueue::note_pause() {
    const uint32_t done = std::exchange(in_a_row_, 0);
    calls_made_ = load_ = 0;
    if (done == 1 && out_ <= 1) {
        ++lone_wakes_;
        note_lone();
    } else if (done > 0) {
        lone_wakes_ = 0;
        note_several();
    }
    return done;
}

void ClassicQueue::note_lone() {
    lone_.one();
    if (index_ != 0) return;
    if (siblings_.several_.load(std::memory_order_relaxed)) {
        siblings_.several_.store(false, std::memory_order_relaxed);
        note_several();
    }
    if (!lone_.sure()) return;
    Tactics& tactics = siblings_.tactics_;
    if (const uint64_t answered = siblings_.answered(); tactics.due(answered)) tactics.step(answered, Clock::now());
    const Tactic tactic = tactics.current();
    const bool pair = tactic == Tactic::kPair;
    if (pair != siblings_.paired_.load(std::memory_order_relaxed)) siblings_.paired_.store(pair);
    if (tactic != Tactic::kFollow) follower_.stop();
    switch (tactic) {
        case Tactic::kFollow:
            if (!follower_.follow(last_pid_)) tactics.forbid(tactic);
            break;
        case Tactic::kPair:
            if (siblings_.all.size() < 2) {
                tactics.forbid(tactic);
            } else if (!siblings_.all[1]->waits()) {
                siblings_.call_another();
            }
            break;
        case Tactic::kPoll:
            // Two loops are better than one that burns a CPU.
            if (siblings_.all.size() >= 2) {
                tactics.forbid(tactic);
            } else {
                loop_.expect_soon(kNextRequest);
            }
            break;
    }
}

void ClassicQueue::note_several() {
    lone_.several();
    if (lone_.likely()) return;
    if (index_ != 0) {
        siblings_.several_.store(true, std::memory_order_relaxed);
        return;
    }
    follower_.stop();
    siblings_.tactics_.reset();
    if (siblings_.paired_.load(std::memory_order_relaxed)) siblings_.paired_.store(false);
}

/// Nothing is there to be read: whether this queue is needed.
bool ClassicQueue::worth_staying() {
    vain_ = note_pause() == 0 ? vain_ + 1 : 0;
    if (index_ == 0) return true;
    if (index_ == 1 && siblings_.paired_.load(std::memory_order_relaxed)) return true;
    if (vain_ < kVainWakes && lone_wakes_ < kLoneWakes) return true;
    vain_ = lone_wakes_ = 0;
    called_.store(false);
    return false;
}

Task<void> ClassicQueue::wait_for_request() {
    // Each request wakes one queue, not all.
    const bool crowded = index_ == 0 && siblings_.crowded_until > Clock::now();
    CancellableIo poll(io_poll(fd_, EPOLLIN | (crowded ? 0u : EPOLLEXCLUSIVE)));
    polling_ = &poll;
    const int events = co_await poll;
    polling_ = nullptr;
    if (events < 0 && events != -ECANCELED && events != -EINTR) {
        log::error("FUSE: waiting for requests: {}", errno_text(-events));
        end_ = QueueEnd::kBroken;
        stopping_ = true;
    }
}

ClassicQueue::Slot* ClassicQueue::take_slot() {
    if (free_.empty()) {
        slots_.push_back(std::make_unique<Slot>());
        free_.push_back(slots_.back().get());
    }
    Slot* slot = free_.back();
    free_.pop_back();
    ++out_;
    return slot;
}

void ClassicQueue::give_back(Slot* slot) {
    --out_;
    if (free_.size() >= kKeptSlots) {
        std::erase_if(slots_, [slot](const auto& s) { return s.get() == slot; });
    } else {
        free_.push_back(slot);
    }
    if (!returned_.empty()) returned_.notify_all();
}

}  // namespace gantry::fuse
