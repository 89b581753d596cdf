// VduseDisk: a driver on the vDPA bus and its disk. VduseFixture: exports of type vduse-blk over a VduseKernel. Header
// only.

#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "exports/export.h"
#include "exports/vduse/export.h"
#include "exports/virtio/blk_request.h"
#include "runtime/blocking_pool.h"
#include "tests/support/export_disk.h"
#include "tests/support/test_runtime.h"
#include "tests/support/vduse_kernel.h"
#include "tests/support/virtio_driver.h"

namespace gantry::test {

struct DiskShape {
    bool packed = false, event_idx = false, indirect = true;
    uint32_t queues = 1, size = 64;
};

/// One thread at a time. Functions that send messages (bring_up) are not for the main loop.
class VduseDisk {
  public:
    static constexpr uint32_t kData = 4096;
    static constexpr uint64_t kFirst = 0x1000'0000, kSecond = uint64_t{1} << 32, kBytes = 8 << 20;

    VduseDisk(VduseKernel& kernel, DiskShape shape)
        : kernel_(&kernel), shape_(shape), guest_(std::make_unique<Guest>(parts())) {
        for (uint32_t q = 0; q < shape.queues; ++q) {
            drivers_.push_back(Driver::create(*guest_, {.size = shape.size,
                                                        .packed = shape.packed,
                                                        .event_idx = shape.event_idx,
                                                        .indirect = shape.indirect}));
            slots_.emplace_back();
            for (uint32_t i = 0; i < shape.size / 4; ++i) {
                slots_[q].push_back({.header = guest_->alloc(16),
                                     .data = guest_->alloc(kData, 512),
                                     .status = guest_->alloc(1),
                                     .id = {}});
            }
        }
    }
    /// The same driver with a copy of its memory, on another kernel.
    VduseDisk(const VduseDisk& o, VduseKernel& kernel)
        : kernel_(&kernel), shape_(o.shape_), guest_(std::make_unique<Guest>(*o.guest_)), slots_(o.slots_) {
        for (const auto& driver : o.drivers_) drivers_.push_back(driver->clone(*guest_));
    }

    static std::vector<Guest::Part> parts() { return {{kFirst, kBytes}, {kSecond, kBytes}}; }
    std::vector<VduseKernel::Map> maps() const {
        std::vector<VduseKernel::Map> all;
        for (size_t i = 0; i < guest_->parts().size(); ++i) {
            const Guest::Part& part = guest_->parts()[i];
            all.push_back({part.guest, part.guest + part.size - 1, 0, guest_->fd(i), VDUSE_ACCESS_RW});
        }
        return all;
    }
    uint64_t features() const {
        using namespace virtio;
        uint64_t all = kernel_->offered();
        if (!shape_.packed) all &= ~kRingPacked;
        if (!shape_.event_idx) all &= ~kRingEventIdx;
        if (!shape_.indirect) all &= ~kRingIndirect;
        return all;
    }
    void tell_queues() {
        for (uint32_t q = 0; q < drivers_.size(); ++q) {
            const Driver& d = *drivers_[q];
            kernel_->set_queue(q, shape_.size, d.descriptors(), d.driver_area(), d.device_area(), d.first_base());
        }
    }
    /// As drivers do it; 0 or -errno of what the device refuses.
    int bring_up(std::optional<uint64_t> features = std::nullopt) {
        for (const uint8_t status : {1, 3}) {
            if (const int error = kernel_->set_status(status)) return error;
        }
        kernel_->choose(features.value_or(this->features()));
        if (const int error = kernel_->set_status(11)) return error;
        kernel_->map(maps());
        tell_queues();
        return kernel_->set_status(15);
    }
    /// Rings that begin anew, after a reset.
    void forget_rings() {
        const auto old = std::move(drivers_);
        drivers_.clear();
        for (size_t q = 0; q < old.size(); ++q) {
            drivers_.push_back(Driver::create(*guest_, old[q]->shape()));
            for (Slot& slot : slots_[q]) slot.busy = false;
        }
    }

    struct Slot {
        uint64_t header, data, status;
        std::optional<uint16_t> id;
        bool busy = false;
        virtio::BlkType type{};
        uint64_t sector = 0;
    };
    struct Done {
        size_t slot;
        uint8_t status;
        uint32_t length;
    };

    /// The slot that it takes; nothing when there is none, or the ring is full. The data of a write is `fill`.
    std::optional<size_t> submit(uint32_t q, virtio::BlkType type, uint64_t sector, uint8_t fill = 0,
                                 bool kick = true) {
        const auto free = std::ranges::find(slots_[q], false, &Slot::busy);
        if (free == slots_[q].end()) return std::nullopt;
        Slot& slot = *free;
        struct {
            uint32_t type, priority;
            uint64_t sector;
        } const header{static_cast<uint32_t>(type), 0, sector};
        guest_->write(slot.header, std::as_bytes(std::span(&header, 1)));
        const std::string data(kData, static_cast<char>(type == virtio::BlkType::kOut ? fill : 0xee));
        guest_->write(slot.data, data);
        guest_->write(slot.status, "\xff");
        std::vector<Piece> chain{{slot.header, 16, false}};
        if (type == virtio::BlkType::kIn) chain.push_back({slot.data, kData, true});
        if (type == virtio::BlkType::kOut) chain.push_back({slot.data, kData, false});
        chain.push_back({slot.status, 1, true});
        slot.id = drivers_[q]->add(
            chain, shape_.indirect && sector % 16 == 0 ? Driver::Form::kIndirect : Driver::Form::kDirect);
        if (!slot.id) return std::nullopt;
        slot.busy = true;
        slot.type = type;
        slot.sector = sector;
        if (drivers_[q]->kick() && kick) kernel_->kick(q);
        return static_cast<size_t>(&slot - slots_[q].data());
    }
    std::vector<Done> reap(uint32_t q) {
        std::vector<Done> done;
        for (const virtio::Used& used : drivers_[q]->reap()) {
            const auto it = std::ranges::find_if(slots_[q], [&](const Slot& s) { return s.busy && s.id == used.id; });
            if (it == slots_[q].end()) throw std::runtime_error("an answer to no request");
            it->busy = false;
            done.push_back({static_cast<size_t>(it - slots_[q].begin()),
                            static_cast<uint8_t>(guest_->read(it->status, 1)[0]), used.length});
        }
        return done;
    }
    size_t outstanding() const {
        size_t all = 0;
        for (const auto& driver : drivers_) all += driver->outstanding();
        return all;
    }
    const Slot& slot(uint32_t q, size_t index) const { return slots_[q].at(index); }
    std::string data(uint32_t q, size_t index) const { return guest_->read(slots_[q].at(index).data, kData); }
    Driver& driver(uint32_t q) { return *drivers_.at(q); }
    Guest& guest() { return *guest_; }
    const DiskShape& shape() const { return shape_; }

  private:
    VduseKernel* kernel_;
    DiskShape shape_;
    std::unique_ptr<Guest> guest_;
    std::vector<std::unique_ptr<Driver>> drivers_;
    std::vector<std::vector<Slot>> slots_;
};

/// A service manager's descriptor store.
class HeldFiles final : public exports::Keeper {
  public:
    bool active() const override { return true; }
    std::string why_inactive() const override { return {}; }
    Result<> put(std::string_view name, std::span<const int> fds) override {
        for (const int fd : fds) held_[std::string(name)].emplace_back(::fcntl(fd, F_DUPFD_CLOEXEC, 3));
        return {};
    }
    void drop(std::string_view name) override { held_.erase(std::string(name)); }
    std::vector<UniqueFd> take(std::string_view name) override {
        std::vector<UniqueFd> fds;
        if (auto node = left_.extract(std::string(name))) {
            for (const UniqueFd& fd : node.mapped()) fds.emplace_back(::fcntl(fd.get(), F_DUPFD_CLOEXEC, 3));
        }
        return fds;
    }
    std::vector<int> look(std::string_view name) const override {
        std::vector<int> fds;
        if (const auto it = left_.find(std::string(name)); it != left_.end()) {
            for (const UniqueFd& fd : it->second) fds.push_back(fd.get());
        }
        return fds;
    }
    std::vector<std::string> waiting() const override {
        std::vector<std::string> names;
        for (const auto& [name, fds] : left_) names.push_back(name);
        return names;
    }
    Leave leave() const override { return leaving; }

    /// For a process after a kill now: copies, which nobody else writes to any more.
    void copy_to(HeldFiles& other) const {
        for (const auto& [name, fds] : held_) {
            for (const UniqueFd& fd : fds) {
                struct stat st{};
                ::fstat(fd.get(), &st);
                std::string bytes(static_cast<size_t>(st.st_size), '\0');
                if (::pread(fd.get(), bytes.data(), bytes.size(), 0) != st.st_size) throw std::runtime_error("pread");
                UniqueFd copy(::memfd_create("copy", MFD_CLOEXEC));
                if (::pwrite(copy.get(), bytes.data(), bytes.size(), 0) != st.st_size)
                    throw std::runtime_error("pwrite");
                other.held_[name].emplace_back(::fcntl(copy.get(), F_DUPFD_CLOEXEC, 3));
                other.left_[name].push_back(std::move(copy));
            }
        }
    }
    size_t held() const { return held_.size(); }
    Leave leaving = Leave::kNothing;

  private:
    std::map<std::string, std::vector<UniqueFd>> held_, left_;
};

/// A kernel, a keeper and a registry of exports: a process.
struct VduseProcess {
    VduseProcess(Runtime& runtime, block::Graph& graph, bool keeps)
        : main_loop(runtime.main_loop()),
          graph(graph),
          registry(runtime, graph, kTypes, [this](std::string_view) { ++deleted; }) {
        if (keeps) registry.set_keeper(&keeper);
    }
    ~VduseProcess() {
        if (auto* disk = dynamic_cast<ExportDisk*>(graph.find("disk"))) disk->hold = false;
        main_loop.run_until_complete(registry.remove_all());
    }
    static Result<std::unique_ptr<exports::Export>> create(exports::ExportContext context) {
        return vduse::VduseExport::create_over(*current, std::move(context));
    }
    static inline VduseKernel* current = nullptr;
    static constexpr exports::ExportType kTypes[] = {{"vduse-blk", &VduseProcess::create}};

    Loop& main_loop;
    block::Graph& graph;
    VduseKernel kernel;
    HeldFiles keeper;
    int deleted = 0;
    exports::Registry registry;
};

struct VduseFixture {
    explicit VduseFixture(bool keeps = true) : process(*runtime.runtime, graph, keeps) {
        auto added = runtime.run(graph.add(
            {{"driver", "memory"}, {"node-name", "disk"}, {"size", kBytes}, {"fast", true}, {"alignment", 512}}));
        if (!added) throw std::runtime_error(added.error().message());
        memory = dynamic_cast<ExportDisk*>(graph.find("disk"));
    }
    ~VduseFixture() {
        memory->hold = false;
        end(process);
        runtime.run(graph.close_all());
    }
    void end(VduseProcess& p) { runtime.run(p.registry.remove_all()); }
    std::string add(json::object more = {}) { return add(process, std::move(more)); }
    std::string add(VduseProcess& p, json::object more = {}) {
        json::object options{{"type", "vduse-blk"}, {"id", "e"},        {"node-name", "disk"},
                             {"name", "vd0"},       {"writable", true}, {"queue-size", 64}};
        for (const auto& [key, value] : more) options[key] = value;
        VduseProcess::current = &p.kernel;
        auto added = runtime.run(p.registry.add(std::move(options)));
        return added ? "" : added.error().message();
    }
    std::string remove(exports::RemoveMode mode = exports::RemoveMode::kSafe) {
        auto removed = runtime.run(process.registry.remove("e", mode));
        return removed ? "" : removed.error().message();
    }
    bool gone() {
        return eventually([this] { return process.registry.size() == 0; });
    }
    bool eventually(std::function<bool()> condition) { return runtime.run(wait_until(std::move(condition))); }
    /// What a driver or an administrator does, while the main loop serves.
    template <class Fn>
    auto drive(Fn fn) {
        return runtime.run([](Fn f) -> Task<decltype(fn())> { co_return co_await run_blocking(std::move(f)); }(fn));
    }
    /// An export, attached, with a driver that uses it.
    VduseDisk driven(json::object options = {}, DiskShape shape = {}) {
        if (const std::string error = add(std::move(options)); !error.empty()) throw std::runtime_error(error);
        if (drive([this] { return process.kernel.attach("vd0"); }) != 0) throw std::runtime_error("not attached");
        VduseDisk disk(process.kernel, shape);
        if (drive([&disk] { return disk.bring_up(); }) != 0) throw std::runtime_error("the driver was refused");
        return disk;
    }
    bool reaped(VduseDisk& disk, uint32_t q, size_t count, std::vector<VduseDisk::Done>* all = nullptr) {
        size_t have = 0;
        return eventually([&] {
            for (const auto& done : disk.reap(q)) {
                ++have;
                if (all) all->push_back(done);
            }
            return have >= count;
        });
    }

    /// One flush after the other, until the first that is refused: a removal takes effect while requests come.
    bool refused(VduseDisk& disk, uint32_t q, std::vector<VduseDisk::Done>& all) {
        const auto deadline = Clock::now() + std::chrono::seconds(30);
        while (disk.submit(q, virtio::BlkType::kFlush, 0) && reaped(disk, q, 1, &all)) {
            if (all.back().status != 0) return true;
            if (Clock::now() >= deadline) return false;
        }
        return false;
    }

    static constexpr uint64_t kBytes = 4 << 20;
    TestRuntime runtime;
    std::array<block::Driver, 1> drivers{kExportDiskDriver};
    block::Graph graph{*runtime.runtime, drivers, nullptr};
    ExportDisk* memory = nullptr;
    VduseProcess process;
};

}  // namespace gantry::test
