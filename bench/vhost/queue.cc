#include "bench/vhost/queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>

namespace gantry::bench::vhost {

namespace {

constexpr size_t kPage = 4096;

size_t pages(size_t bytes) { return (bytes + kPage - 1) & ~(kPage - 1); }

RingShape shape_of(const Options& options) {
    return {options.ring_size, options.packed, options.event_idx, options.indirect};
}

size_t tables_bytes(const Options& options) {
    return options.indirect ? size_t{options.depth} * options.chain_length() * sizeof(SplitDescriptor) : 0;
}

}  // namespace

size_t Queue::memory_bytes(const Options& options) {
    return 3 * ring_area_bytes(shape_of(options)) + pages(tables_bytes(options)) +
           pages(options.depth * sizeof(BlockRequest)) + pages(options.depth) +
           pages(size_t{options.depth} * options.block_bytes);
}

Outcome<std::unique_ptr<Queue>> Queue::create(const Options& options, const SharedMemory& memory, std::byte* at,
                                              const BlockRange& blocks, uint64_t seed) {
    std::unique_ptr<Queue> queue(new Queue(options, blocks, seed));
    queue->kick_ = Socket(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    queue->call_ = Socket(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (queue->kick_.fd() < 0 || queue->call_.fd() < 0) {
        return failure(std::string("making an eventfd: ") + std::strerror(errno));
    }
    queue->lay_out(memory, at);
    queue->ring_->want_call(false);
    return queue;
}

void Queue::lay_out(const SharedMemory& memory, std::byte* at) {
    const size_t area = ring_area_bytes(shape_of(options_));
    std::byte* tables = at + 3 * area;
    place_ = {at, at + area, at + 2 * area, tables, memory.guest_address(tables)};
    std::byte* headers = tables + pages(tables_bytes(options_));
    std::byte* statuses = headers + pages(options_.depth * sizeof(BlockRequest));
    data_ = statuses + pages(options_.depth);
    headers_ = reinterpret_cast<BlockRequest*>(headers);
    statuses_ = reinterpret_cast<uint8_t*>(statuses);
    ring_ = Ring::create(shape_of(options_), place_);
    define_slots(memory, statuses);
}

void Queue::define_slots(const SharedMemory& memory, std::byte* statuses) {
    slots_.resize(options_.depth);
    free_.reserve(options_.depth);
    const uint32_t piece = options_.block_bytes / options_.segments;
    std::vector<Piece> pieces;
    for (uint32_t slot = 0; slot < options_.depth; slot++) {
        std::byte* data = data_ + size_t{slot} * options_.block_bytes;
        std::memset(data, static_cast<int>(slot + 1), options_.block_bytes);
        headers_[slot] = {options_.writes() ? kTypeWrite : kTypeRead, 0, 0};
        const auto* header = reinterpret_cast<std::byte*>(headers_ + slot);
        pieces.assign(1, {memory.guest_address(header), sizeof(BlockRequest), false});
        for (uint32_t i = 0; i < options_.segments; i++) {
            pieces.push_back({memory.guest_address(data + size_t{i} * piece), piece, !options_.writes()});
        }
        pieces.push_back({memory.guest_address(statuses + slot), 1, true});
        ring_->define(slot, pieces);
        free_.push_back(slot);
    }
}

QueueWiring Queue::wiring() const {
    return {options_.ring_size, ring_->first_base(), place_.descriptors, place_.available,
            place_.used,        kick_.fd(),          call_.fd()};
}

Outcome<> Queue::start(int64_t now) { return submit(now); }

Outcome<> Queue::submit(int64_t now) {
    for (const uint32_t slot : free_) {
        const auto work = workload_.next(blocks_);
        if (!work) return failure("the part of the disk is too small");
        headers_[slot].sector = blocks_.offset_of(work->block) / 512;
        statuses_[slot] = 0xff;
        slots_[slot] = {now, true};
        ring_->add(slot);
    }
    in_flight_ += static_cast<uint32_t>(free_.size());
    free_.clear();
    if (!ring_->publish()) return {};
    const uint64_t one = 1;
    totals_.kicks++;
    if (::write(kick_.fd(), &one, sizeof one) != sizeof one && errno != EAGAIN) {
        return failure(std::string("kicking a queue: ") + std::strerror(errno));
    }
    return {};
}

Outcome<bool> Queue::turn(int64_t deadline) {
    if (!ring_->has_done()) return false;
    const int64_t now = now_ns();
    do {
        BENCH_CHECK(finish(ring_->reap(), now));
    } while (ring_->has_done());
    totals_.last_reply_ns = now;
    if (now < deadline) BENCH_CHECK(submit(now));
    return true;
}

Outcome<> Queue::finish(Ring::Done done, int64_t now) {
    if (done.slot >= slots_.size() || !slots_[done.slot].busy) {
        return failure("the server completed a request that is not outstanding");
    }
    Slot& slot = slots_[done.slot];
    if (const uint8_t status = statuses_[done.slot]; status != 0) {
        return failure("the request at sector " + std::to_string(headers_[done.slot].sector) +
                       " was answered with status " + std::to_string(status));
    }
    if (!options_.writes() && done.length != options_.block_bytes + 1) {
        return failure("a read of " + std::to_string(options_.block_bytes) + " bytes and a status wrote " +
                       std::to_string(done.length));
    }
    slot.busy = false;
    in_flight_--;
    free_.push_back(done.slot);
    totals_.requests++;
    totals_.bytes += options_.block_bytes;
    totals_.latency.record(static_cast<uint64_t>(now - slot.sent_ns));
    return {};
}

void Queue::drain_calls() {
    uint64_t calls = 0;
    if (::read(call_.fd(), &calls, sizeof calls) == sizeof calls) totals_.signals += calls;
}

}  // namespace gantry::bench::vhost
