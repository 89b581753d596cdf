// The front end's memory: one table, or regions that come and go.

#include <algorithm>

#include "exports/vhost_user/session.h"
#include "runtime/cross_loop.h"

namespace gantry::vhost_user {

namespace {

Result<virtio::Region> map_region(const MemoryRegion& region, int fd) {
    virtio::Region out;
    out.guest = region.guest;
    out.size = region.size;
    out.user = region.user;
    auto mapping = virtio::Mapping::create(fd, region.offset, region.size);
    if (!mapping) {
        return fail(mapping.error().kind(), "region of {} bytes at {:#x}: {}", region.size, region.guest,
                    mapping.error().message());
    }
    out.mapping = std::move(*mapping);
    out.host = out.mapping->data();
    return out;
}

}  // namespace

std::vector<virtio::Region> Session::regions() const {
    if (!memory_) return {};
    const auto all = memory_->regions();
    return {all.begin(), all.end()};
}

Task<Result<>> Session::set_memory(Message message) {
    const std::vector<MemoryRegion> table = table_regions(message);
    std::vector<virtio::Region> regions;
    for (size_t i = 0; i < table.size(); ++i) {
        CO_TRY(virtio::Region region, map_region(table[i], message.fds[i].get()));
        regions.push_back(std::move(region));
    }
    co_return co_await change_memory(std::move(regions));
}

Task<Result<>> Session::add_region(Message message) {
    std::vector<virtio::Region> all = regions();
    if (all.size() >= kMaxMemorySlots) {
        co_return fail(ErrorKind::kTooLarge, "all {} memory slots are in use", kMaxMemorySlots);
    }
    CO_TRY(virtio::Region region, map_region(message.as<SingleRegion>().region, message.fds.front().get()));
    all.push_back(std::move(region));
    co_return co_await change_memory(std::move(all));
}

Task<Result<>> Session::remove_region(Message message) {
    const MemoryRegion wanted = message.as<SingleRegion>().region;
    std::vector<virtio::Region> all = regions();
    const auto same = [&](const virtio::Region& r) {
        return r.guest == wanted.guest && r.user == wanted.user && r.size == wanted.size;
    };
    if (std::erase_if(all, same) == 0) {
        co_return fail(ErrorKind::kNotFound, "there is no region of {} bytes at {:#x} (user address {:#x})",
                       wanted.size, wanted.guest, wanted.user);
    }
    co_return co_await change_memory(std::move(all));
}

/// Running rings stand still meanwhile, and go on where their memory is now. What was taken before is answered into
/// memory that is mapped still.
Task<Result<>> Session::change_memory(std::vector<virtio::Region> regions) {
    CO_TRY(const auto memory, virtio::GuestMemory::create(std::move(regions)));
    for (size_t i = 0; i < rings_.size(); ++i) {
        virtio::Virtqueue* queue = device_.made_queue(i);
        if (rings_[i].running) co_await run_on(queue->loop(), queue->pause());
    }
    memory_ = memory;
    for (size_t i = 0; i < rings_.size(); ++i) {
        if (!rings_[i].running) continue;
        virtio::Virtqueue* queue = device_.made_queue(i);
        const auto where = place(*rings_[i].address, shape(rings_[i]), *memory_);
        if (where) {
            co_await run_on(queue->loop(), queue->resume_in(memory_, *where));
            continue;
        }
        // The old memory stays until the ring is stopped, and is not looked at again.
        co_await run_on(queue->loop(), queue->break_off(where.error().message()));
        co_await run_on(queue->loop(), queue->resume());
    }
    // A ring that waits for its memory goes on waiting when the rest of it is still to come.
    for (size_t i = 0; i < rings_.size(); ++i) {
        if (rings_[i].address && rings_[i].size != 0 && place(*rings_[i].address, shape(rings_[i]), *memory_)) {
            CO_CHECK(co_await start_if_ready(i));
        }
    }
    co_return Result<>();
}

}  // namespace gantry::vhost_user
