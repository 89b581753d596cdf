#include "exports/vduse/device.h"

#include <linux/virtio_ids.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "runtime/log.h"

namespace gantry::vduse {

namespace {

/// What messages begin with where the reference says no more than this.
constexpr std::string_view kNotCreated = "failed to create vduse device";
/// Of rings that drivers in the kernel make; the kernel takes no more than a page.
constexpr uint32_t kRingAlign = 4096;
/// "Gtry": who made it, for people who list PCI-like identities.
constexpr uint32_t kVendor = 0x79727447;

void copy_name(char (&to)[VDUSE_NAME_MAX], const std::string& name) {
    std::memset(to, 0, sizeof to);
    std::memcpy(to, name.data(), std::min(name.size(), sizeof to - 1));
}

}  // namespace

uint32_t base_of(const vduse_vq_state_split& state) { return state.avail_index; }

uint32_t base_of(const vduse_vq_state_packed& state) {
    return (state.last_avail_idx & 0x7fffu) | (state.last_avail_counter & 1u) << 15 |
           (state.last_used_idx & 0x7fffu) << 16 | (state.last_used_counter & 1u) << 31;
}

vduse_vq_state_packed packed_state(uint32_t base) {
    vduse_vq_state_packed state{};
    state.last_avail_idx = base & 0x7fff;
    state.last_avail_counter = base >> 15 & 1;
    state.last_used_idx = base >> 16 & 0x7fff;
    state.last_used_counter = base >> 31;
    return state;
}

Result<> Device::check_name(const std::string& name) {
    // As a file below /dev/vduse, beside "control", and in sysfs.
    const bool plain = name.find_first_of("/!") == std::string::npos &&
                       std::ranges::none_of(name, [](unsigned char c) { return c <= ' ' || c == 127; });
    if (name.empty() || name == "." || name == ".." || name == "control" || !plain || name.size() >= VDUSE_NAME_MAX) {
        return fail(ErrorKind::kInvalid,
                    "{}; '{}' cannot be the name of one: 1 to {} bytes without blanks, '/' and '!', and not 'control'",
                    kNotCreated, name, VDUSE_NAME_MAX - 1);
    }
    return {};
}

Result<KernelFile> Device::open_control(Kernel& kernel) {
    const int fd = kernel.open_control();
    if (fd >= 0) return KernelFile(kernel, fd);
    const std::string what = fmt::format("{}; '/dev/vduse/control': {}", kNotCreated, errno_text(-fd));
    if (fd == -ENOENT || fd == -ENODEV || fd == -ENXIO) {
        return fail(ErrorKind::kUnsupported,
                    "{}; the running kernel has no VDUSE: load its module (modprobe vduse), or take a kernel built "
                    "with CONFIG_VDPA_USER; vhost-user-blk and nbd need neither",
                    what);
    }
    if (fd == -EACCES || fd == -EPERM) {
        return fail(ErrorKind::kPermission,
                    "{}; run as root, or let a udev rule for the subsystem vduse give this user the devices in "
                    "/dev/vduse",
                    what);
    }
    return std::unexpected(Error::from_errno(-fd, fmt::format("{}; '/dev/vduse/control'", kNotCreated)));
}

Error Device::in_use() const {
    const std::string holder = kernel_.holder(name_);
    return Error(ErrorKind::kBusy,
                 fmt::format("{}; device '{}' is there already, and {} serves it; end that, or choose another name",
                             kNotCreated, name_, holder.empty() ? "another process" : holder),
                 EBUSY);
}

Result<> Device::destroy_by(const KernelFile& control) const {
    char name[VDUSE_NAME_MAX];
    copy_name(name, name_);
    if (const int result = control.ioctl(VDUSE_DESTROY_DEV, name); result < 0)
        return fail_errno(-result, "VDUSE device '{}' cannot be destroyed", name_);
    return {};
}

Result<> Device::reopen() {
    const int fd = kernel_.open_device(name_);
    if (fd < 0) return fail_errno(-fd, "VDUSE device '{}': '/dev/vduse/{}'", name_, name_);
    file_ = KernelFile(kernel_, fd);
    return {};
}

Result<> Device::destroy() {
    TRY(const KernelFile control, open_control(kernel_));
    return destroy_by(control);
}

Result<std::unique_ptr<Device>> Device::create(Kernel& kernel, const DeviceShape& shape) {
    CHECK_OK(check_name(shape.name));
    auto device = std::make_unique<Device>(kernel, shape.name);
    CHECK_OK(device->make(shape));
    if (device->taken_over_) return device;
    if (Result<> described = device->set_up_queues(shape); !described) {
        device->close();
        if (const Result<> gone = device->destroy(); !gone) log::warn("{}", gone.error().message());
        return std::unexpected(std::move(described).error());
    }
    return device;
}

Result<> Device::set_up_queues(const DeviceShape& shape) const {
    for (uint32_t i = 0; i < shape.queues; ++i) {
        vduse_vq_config queue{};
        queue.index = i;
        queue.max_size = shape.queue_size;
        if (const int result = file_.ioctl(VDUSE_VQ_SETUP, &queue); result < 0)
            return fail_errno(-result, "{}; queue {} of device '{}' cannot be set up", kNotCreated, i, name_);
    }
    return {};
}

Result<> Device::describe(const DeviceShape& shape) const {
    CHECK_OK(set_up_queues(shape));
    if (Result<> set = set_config(0, shape.config); !set)
        return fail(set.error().kind(), "{}; {}", kNotCreated, set.error().message());
    return {};
}

Result<> Device::make(const DeviceShape& shape) {
    TRY(const KernelFile control, open_control(kernel_));
    uint64_t version = 0;
    if (const int result = control.ioctl(VDUSE_SET_API_VERSION, &version); result < 0)
        return fail_errno(-result, "{}; the kernel's VDUSE does not speak version 0 of its interface", kNotCreated);

    std::vector<std::byte> memory(offsetof(vduse_dev_config, config) + shape.config.size());
    vduse_dev_config head{};
    copy_name(head.name, name_);
    head.vendor_id = kVendor;
    head.device_id = VIRTIO_ID_BLOCK;
    head.features = shape.features;
    head.vq_num = shape.queues;
    head.vq_align = kRingAlign;
    head.config_size = static_cast<uint32_t>(shape.config.size());
    std::memcpy(memory.data(), &head, offsetof(vduse_dev_config, config));
    std::memcpy(memory.data() + offsetof(vduse_dev_config, config), shape.config.data(), shape.config.size());

    int result = control.ioctl(VDUSE_CREATE_DEV, memory.data());
    if (result == -EEXIST) {
        const Result<> destroyed = destroy_by(control);
        if (!destroyed) return adopt(shape);
        log::info("VDUSE device '{}' was left by a process before this one, not attached: made anew", name_);
        result = control.ioctl(VDUSE_CREATE_DEV, memory.data());
    }
    if (result < 0) {
        return fail_errno(-result, "{}; the kernel refuses device '{}' with {} queue(s) and features {:#x}",
                          kNotCreated, name_, shape.queues, shape.features);
    }
    const int fd = kernel_.open_device(name_);
    if (fd >= 0) {
        file_ = KernelFile(kernel_, fd);
        return {};
    }
    if (const Result<> gone = destroy_by(control); !gone) log::warn("{}", gone.error().message());
    return fail_errno(-fd, "{}; '/dev/vduse/{}'", kNotCreated, name_);
}

/// It is attached, or somebody else serves it.
Result<> Device::adopt(const DeviceShape& shape) {
    const int fd = kernel_.open_device(name_);
    if (fd == -EBUSY) return std::unexpected(in_use());
    if (fd < 0) return fail_errno(-fd, "{}; it is there already: '/dev/vduse/{}'", kNotCreated, name_);
    file_ = KernelFile(kernel_, fd);
    taken_over_ = true;
    Result<> fits = check_queue_count(shape.queues);
    if (fits) fits = check_config_size(shape);
    if (fits) return {};
    close();
    return fail(fits.error().kind(),
                "{}; device '{}' is attached to the vDPA bus since before this process, and is not what this export "
                "describes: {}; remove it with 'vdpa dev del {}'",
                kNotCreated, name_, fits.error().message(), name_);
}

Result<> Device::check_queue_count(uint32_t queues) const {
    vduse_vq_info last{}, beyond{};
    last.index = queues - 1;
    beyond.index = queues;
    if (const int result = file_.ioctl(VDUSE_VQ_GET_INFO, &last); result < 0 && result != -EINVAL)
        return fail_errno(-result, "VDUSE device '{}': looking at its queues", name_);
    else if (result < 0)
        return fail(ErrorKind::kInvalid, "it has less than {} queue(s)", queues);
    if (file_.ioctl(VDUSE_VQ_GET_INFO, &beyond) >= 0)
        return fail(ErrorKind::kInvalid, "it has more than {} queue(s)", queues);
    return {};
}

/// The kernel tells by refusing more than there is. What is said here says nothing: the last field of the configuration
/// is for devices with zones, which none of ours is.
Result<> Device::check_config_size(const DeviceShape& shape) const {
    const size_t last = shape.config.size() - 1;
    return set_config(static_cast<uint32_t>(last), shape.config.subspan(last));
}

Result<uint64_t> Device::features() const {
    uint64_t features = 0;
    if (const int result = file_.ioctl(VDUSE_DEV_GET_FEATURES, &features); result < 0)
        return fail_errno(-result, "VDUSE device '{}': asking for the driver's features", name_);
    return features;
}

Result<> Device::set_config(uint32_t offset, std::span<const std::byte> data) const {
    std::vector<std::byte> memory(sizeof(vduse_config_data) + data.size());
    vduse_config_data head{};
    head.offset = offset;
    head.length = static_cast<uint32_t>(data.size());
    std::memcpy(memory.data(), &head, sizeof head);
    std::memcpy(memory.data() + sizeof head, data.data(), data.size());
    if (const int result = file_.ioctl(VDUSE_DEV_SET_CONFIG, memory.data()); result < 0)
        return fail_errno(-result, "VDUSE device '{}': setting its configuration", name_);
    return {};
}

Result<bool> Device::inject_config_irq() const {
    const int result = file_.ioctl(VDUSE_DEV_INJECT_CONFIG_IRQ, nullptr);
    if (result == -EINVAL) return false;
    if (result < 0) return fail_errno(-result, "VDUSE device '{}': telling the driver of its configuration", name_);
    return true;
}

Result<QueueInfo> Device::queue(uint32_t index, bool packed) const {
    vduse_vq_info info{};
    info.index = index;
    if (const int result = file_.ioctl(VDUSE_VQ_GET_INFO, &info); result < 0)
        return fail_errno(-result, "VDUSE device '{}': asking about queue {}", name_, index);
    return QueueInfo{.ready = info.ready != 0,
                     .size = info.num,
                     .descriptors = info.desc_addr,
                     .driver = info.driver_addr,
                     .device = info.device_addr,
                     .base = packed ? base_of(info.packed) : base_of(info.split)};
}

Result<> Device::set_kick(uint32_t index, int fd) const {
    vduse_vq_eventfd kick{};
    kick.index = index;
    kick.fd = fd < 0 ? VDUSE_EVENTFD_DEASSIGN : fd;
    if (const int result = file_.ioctl(VDUSE_VQ_SETUP_KICKFD, &kick); result < 0)
        return fail_errno(-result, "VDUSE device '{}': setting the kick of queue {}", name_, index);
    return {};
}

int Device::inject_irq(uint32_t index) const {
    const int result = file_.ioctl(VDUSE_VQ_INJECT_IRQ, &index);
    return std::min(result, 0);
}

Result<Window> Device::window(uint64_t address) const {
    vduse_iotlb_entry entry{};
    entry.start = entry.last = address;
    const int fd = file_.ioctl(VDUSE_IOTLB_GET_FD, &entry);
    if (fd < 0) return fail_errno(-fd, "VDUSE device '{}': memory at {:#x}", name_, address);
    return Window{
        .start = entry.start, .last = entry.last, .offset = entry.offset, .access = entry.perm, .fd = UniqueFd(fd)};
}

Result<std::optional<vduse_dev_request>> Device::next_message() const {
    vduse_dev_request message{};
    const ssize_t length = file_.read(&message, sizeof message);
    if (length == -EAGAIN || length == -EINTR) return std::nullopt;
    if (length < 0) return fail_errno(static_cast<int>(-length), "VDUSE device '{}': reading a message", name_);
    if (length != sizeof message) return fail(ErrorKind::kIo, "VDUSE device '{}': half a message", name_);
    return message;
}

Result<> Device::answer(const vduse_dev_response& response) const {
    const ssize_t length = file_.write(&response, sizeof response);
    // Nobody waits for it any more.
    if (length == -ENOENT) return {};
    if (length < 0) return fail_errno(static_cast<int>(-length), "VDUSE device '{}': answering a message", name_);
    return {};
}

}  // namespace gantry::vduse
