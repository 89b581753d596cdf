#include "exports/vduse/refusal.h"

#include <poll.h>
#include <sys/eventfd.h>

#include "runtime/io.h"
#include "runtime/log.h"

namespace gantry::vduse {

struct Refusal::Line {
    uint32_t index = 0;
    std::unique_ptr<virtio::Ring> ring;
    virtio::AddressSpace space;
    UniqueFd kick;
    CancellableIo* polling = nullptr;
    virtio::BlkRequest request;
};

Refusal::Refusal(Device& device, const virtio::BlkService& service)
    : device_(device), service_(service), iotlb_(device) {}

Refusal::~Refusal() { CHECK(lines_.empty(), "a refusal is stopped before it is destroyed"); }

void Refusal::start(uint64_t features, Positions positions, const std::shared_ptr<virtio::InflightFile>& file) {
    stopping_ = false;
    positions_ = std::move(positions);
    for (uint32_t i = 0; i < positions_.size(); ++i) {
        if (!positions_[i]) continue;
        auto line = std::make_unique<Line>();
        line->index = i;
        auto found = find_ring(device_, iotlb_, i, features, service_.device().shape().queue_size);
        if (!found || !*found) continue;
        std::unique_ptr<virtio::Inflight> inflight;
        if (file) {
            inflight = std::make_unique<virtio::Inflight>();
            inflight->region = file->region(i);
            inflight->queue_size = file->queue_size();
            inflight->file = file;
        }
        auto ring = virtio::Ring::create((*found)->shape, (*found)->place, *positions_[i], std::move(inflight));
        if (!ring) continue;
        line->ring = std::move(*ring);
        line->space = virtio::AddressSpace(iotlb_.memory(), &iotlb_);
        line->kick.reset(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (!line->kick || !device_.set_kick(i, line->kick.get())) continue;
        lines_.push_back(std::move(line));
    }
    for (const auto& line : lines_) scope_.spawn(run(line.get()));
}

/// True: there may be more.
bool Refusal::refuse_all(Line& line) {
    constexpr unsigned kTurn = 64;
    for (unsigned i = 0; i < kTurn; ++i) {
        if (line.ring->take(line.request.chain, line.space) != virtio::Take::kChain) return false;
        if (service_.begin(line.request)) {
            line.ring->break_off("a request makes no sense");
            return false;
        }
        line.request.finish(virtio::BlkStatus::kIoError);
        virtio::BlkService::write_status(line.request);
        const virtio::Chain& chain = line.request.chain;
        const virtio::Used used{chain.id, chain.slots, line.request.written};
        ++refused_;
        if (line.ring->publish(std::span(&used, 1))) device_.inject_irq(line.index);
    }
    return true;
}

Task<void> Refusal::run(Line* line) {
    while (!stopping_ && !line->ring->is_broken()) {
        const bool more = refuse_all(*line);
        if (more || line->ring->listen()) {
            co_await yield_turn();
            continue;
        }
        CancellableIo poll(io_poll(line->kick.get(), POLLIN));
        line->polling = &poll;
        const int events = co_await poll;
        line->polling = nullptr;
        uint64_t count;
        if (events < 0 && events != -EINTR) break;
        [[maybe_unused]] const ssize_t n = ::read(line->kick.get(), &count, sizeof count);
    }
}

Task<Positions> Refusal::stop() {
    stopping_ = true;
    for (const auto& line : lines_) {
        if (line->polling) line->polling->cancel();
    }
    co_await scope_.join();
    for (const auto& line : lines_) {
        positions_[line->index] = line->ring->base();
        [[maybe_unused]] const Result<> unset = device_.set_kick(line->index, -1);
    }
    lines_.clear();
    iotlb_.drop();
    co_return positions_;
}

}  // namespace gantry::vduse
