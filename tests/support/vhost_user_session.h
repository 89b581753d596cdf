// VhostSessionFixture: a vhost-user device over a node in memory, and a front end that talks to it. Header only.

#pragma once

#include <memory>
#include <string>
#include <vector>

#include "exports/vhost_user/session.h"
#include "runtime/task_scope.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/vhost_user_front.h"

namespace gantry::test {

struct VhostSessionFixture : GraphFixture {
    using Request = vhost_user::Request;
    static constexpr uint64_t kDisk = 1 << 20;

    explicit VhostSessionFixture(virtio::BlkShape shape = {.serial = "serial", .writable = true}) {
        const std::string error = add("{'driver': 'memory', 'node-name': 'n', 'discard': 'unmap', 'disk': 'vhost'}");
        if (!error.empty()) throw std::runtime_error(error);
        root = attach("n", shape.writable ? writer() : reader());
        run(make_device(std::move(shape)));
        connect();
    }
    ~VhostSessionFixture() {
        disk->open_gate();
        end();
        device.reset();
        detach(std::move(root));
        MemoryDisk::forget("vhost");
    }

    Task<void> make_device(virtio::BlkShape shape) {
        const auto loops = runtime.runtime->io_loops();
        device = std::make_unique<vhost_user::Device>("v", *root, std::vector<Loop*>(loops.begin(), loops.end()),
                                                      std::move(shape));
        device->on_fault = [this](size_t index, const std::string&) {
            if (session) session->queue_broke(index);
        };
        co_return;
    }
    /// A front end, instead of the one before.
    void connect() {
        end();
        auto [ours, theirs] = make_sockets();
        front = std::make_unique<VhostFront>(runtime, std::move(ours));
        violation.clear();
        run(begin(std::move(theirs)));
    }
    Task<void> begin(UniqueFd socket) {
        session = std::make_unique<vhost_user::Session>(*device, std::move(socket));
        scope.spawn(serve());
        co_return;
    }
    Task<void> serve() {
        co_await session->run();
        violation = session->violation();
        session.reset();
    }
    /// The front end goes; the session ends by that.
    void end() {
        if (front) front->close();
        run(scope.join());
    }
    /// The front end stays, and the device has nothing more to do with it: why?
    std::string cut_off() {
        if (!front->closed()) throw std::runtime_error("a reply instead of the end");
        run(scope.join());
        return violation;
    }
    bool eventually(std::function<bool()> condition) { return run(wait_until(std::move(condition))); }

    uint64_t features(bool packed) const {
        uint64_t all = device->blk().features() | vhost_user::kHasProtocolFeatures;
        return packed ? all : all & ~virtio::kRingPacked;
    }
    static virtio::RingShape shape(bool packed, uint32_t size = 64) {
        return {.size = size, .packed = packed, .event_idx = true, .indirect = true};
    }

    vhost_user::MemoryRegion region(const Guest& guest, size_t part) const {
        const Guest::Part& p = guest.parts()[part];
        return {p.guest, p.size, p.guest + Guest::kUser, 0};
    }
    std::optional<bool> set_memory(const Guest& guest, std::vector<size_t> parts = {0, 1, 2}) {
        Bytes payload = wire(vhost_user::MemoryTable{static_cast<uint32_t>(parts.size()), 0});
        std::vector<int> fds;
        for (const size_t part : parts) {
            const Bytes one = wire(region(guest, part));
            payload.insert(payload.end(), one.begin(), one.end());
            fds.push_back(guest.fd(part));
        }
        return front->tell(Request::kSetMemTable, payload, fds);
    }
    std::optional<bool> tell_state(Request request, uint32_t index, uint32_t num) {
        return front->tell(request, wire(vhost_user::VringState{index, num}));
    }
    std::optional<bool> tell_fd(Request request, uint64_t index, const UniqueFd& fd) {
        return front->tell(request, wire(index), {fd.get()});
    }
    /// Everything that a ring needs besides features and memory, SET_VRING_ENABLE the last; what was refused.
    std::string start(VhostRing& ring, uint32_t base) {
        const auto& driver = *ring.driver;
        if (tell_state(Request::kSetVringNum, ring.index, driver.shape().size) != true) return "SET_VRING_NUM";
        if (tell_state(Request::kSetVringBase, ring.index, base) != true) return "SET_VRING_BASE";
        if (front->tell(Request::kSetVringAddr, wire(ring.address())) != true) return "SET_VRING_ADDR";
        if (tell_fd(Request::kSetVringCall, ring.index, ring.call) != true) return "SET_VRING_CALL";
        if (tell_fd(Request::kSetVringErr, ring.index, ring.error) != true) return "SET_VRING_ERR";
        if (tell_fd(Request::kSetVringKick, ring.index, ring.kick) != true) return "SET_VRING_KICK";
        if (tell_state(Request::kSetVringEnable, ring.index, 1) != true) return "SET_VRING_ENABLE";
        return "";
    }
    std::string start(Guest& guest, VhostRing& ring) {
        if (front->tell(Request::kSetFeatures, wire(features(ring.driver->shape().packed))) != true)
            return "SET_FEATURES";
        if (set_memory(guest) != true) return "SET_MEM_TABLE";
        return start(ring, ring.driver->first_base());
    }
    /// GET_VRING_BASE.
    uint32_t stop(const VhostRing& ring) {
        return front->ask(Request::kGetVringBase, wire(vhost_user::VringState{ring.index, 0}))
            .as<vhost_user::VringState>()
            .num;
    }
    /// The status of a request that is answered next; 0xff: it is not.
    uint8_t status_of(Guest& guest, VhostRing& ring, const VhostRequest& request) {
        const bool used = eventually([&] {
            for (const virtio::Used& one : ring.driver->reap()) {
                if (one.id == request.id) return true;
            }
            return false;
        });
        return used ? static_cast<uint8_t>(guest.read(request.status, 1)[0]) : 0xff;
    }

    std::shared_ptr<MemoryDisk> disk = [] {
        auto made = MemoryDisk::named("vhost");
        made->resize(kDisk);
        return made;
    }();
    std::unique_ptr<block::Root> root;
    std::unique_ptr<vhost_user::Device> device;
    std::unique_ptr<vhost_user::Session> session;
    std::unique_ptr<VhostFront> front;
    std::string violation;
    TaskScope scope;
};

}  // namespace gantry::test
