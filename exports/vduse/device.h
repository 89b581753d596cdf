// Device: a VDUSE device, from its making to its end; each ioctl with its types and its error.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "exports/vduse/kernel.h"
#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::vduse {

struct DeviceShape {
    std::string name;  // in /dev/vduse and on the vDPA bus
    uint64_t features = 0;
    uint32_t queues = 1;
    uint16_t queue_size = 256;
    std::span<const std::byte> config;
};

/// What the driver has said about a queue.
struct QueueInfo {
    bool ready = false;
    uint32_t size = 0;
    uint64_t descriptors = 0, driver = 0, device = 0;  // addresses of its areas
    uint32_t base = 0;                                 // as in Ring::create
};

/// A piece of the driver's memory.
struct Window {
    uint64_t start = 0, last = 0;  // addresses
    uint64_t offset = 0;           // of `start` in the file
    uint8_t access = 0;            // VDUSE_ACCESS_*
    UniqueFd fd;
};

/// Main loop only, unless said otherwise. Errors name the device.
class Device {
  public:
    /// kInvalid for a name that cannot be one.
    static Result<> check_name(const std::string& name);
    /// Makes it. One of that name that nobody serves is taken over when it is attached to the vDPA bus, and made anew
    /// when it is not. kUnsupported without VDUSE, kPermission, kBusy when somebody else serves it. On failure nothing
    /// is left that was not there before. One that is taken over is as it was: describe() changes it.
    static Result<std::unique_ptr<Device>> create(Kernel& kernel, const DeviceShape& shape);
    Device(Kernel& kernel, std::string name) : kernel_(kernel), name_(std::move(name)) {}

    const std::string& name() const { return name_; }
    Kernel& kernel() const { return kernel_; }
    /// It was there before.
    bool taken_over() const { return taken_over_; }
    /// Tells the kernel the size of the queues and the configuration. Drivers read the latter when they are told to.
    Result<> describe(const DeviceShape& shape) const;
    /// For polling; -1 when it is closed.
    int fd() const { return file_.fd(); }
    /// Messages that were read and not answered go to whoever opens it next.
    void close() { file_.close(); }
    Result<> reopen();
    bool attached() const { return kernel_.attached(name_); }
    /// It is closed. kBusy while it is attached, or somebody else serves it.
    Result<> destroy();

    /// What the driver has chosen.
    Result<uint64_t> features() const;
    Result<> set_config(uint32_t offset, std::span<const std::byte> data) const;
    /// False: no driver has set DRIVER_OK (not every kernel knows).
    Result<bool> inject_config_irq() const;
    Result<QueueInfo> queue(uint32_t index, bool packed) const;
    /// -1: none.
    Result<> set_kick(uint32_t index, int fd) const;
    /// 0 or -errno; -EINVAL: the kernel has not noted DRIVER_OK yet. Any thread.
    int inject_irq(uint32_t index) const;
    /// Any thread. The errno of kernels for "nothing is mapped there" is EINVAL.
    Result<Window> window(uint64_t address) const;

    /// Nothing: none waits.
    Result<std::optional<vduse_dev_request>> next_message() const;
    Result<> answer(const vduse_dev_response& response) const;

  private:
    static Result<KernelFile> open_control(Kernel& kernel);
    Result<> make(const DeviceShape& shape);
    Result<> adopt(const DeviceShape& shape);
    Result<> set_up_queues(const DeviceShape& shape) const;
    Result<> check_queue_count(uint32_t queues) const;
    Result<> check_config_size(const DeviceShape& shape) const;
    Result<> destroy_by(const KernelFile& control) const;
    Error in_use() const;

    Kernel& kernel_;
    const std::string name_;
    KernelFile file_;
    bool taken_over_ = false;
};

/// The two forms of a ring's place.
uint32_t base_of(const vduse_vq_state_split& state);
uint32_t base_of(const vduse_vq_state_packed& state);
vduse_vq_state_packed packed_state(uint32_t base);

}  // namespace gantry::vduse
