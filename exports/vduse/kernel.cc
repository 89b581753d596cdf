#include "exports/vduse/kernel.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <fstream>
#include <memory>

#include "runtime/unique_fd.h"

namespace gantry::vduse {

// The kernel's side of these can never change.
static_assert(sizeof(vduse_dev_config) == 336 && offsetof(vduse_dev_config, config) == 336);
static_assert(sizeof(vduse_iotlb_entry) == 32 && sizeof(vduse_config_data) == 8);
static_assert(sizeof(vduse_vq_config) == 32 && sizeof(vduse_vq_info) == 48 && sizeof(vduse_vq_eventfd) == 8);
static_assert(offsetof(vduse_vq_info, split) == 32 && offsetof(vduse_vq_info, ready) == 40);
static_assert(sizeof(vduse_iova_umem) == 48 && sizeof(vduse_iova_info) == 48);
static_assert(sizeof(vduse_dev_request) == 152 && offsetof(vduse_dev_request, s) == 24);
static_assert(sizeof(vduse_dev_response) == 152 && offsetof(vduse_dev_response, vq_state) == 24);
static_assert(VDUSE_GET_API_VERSION == 0x80088100 && VDUSE_SET_API_VERSION == 0x40088101);
static_assert(VDUSE_CREATE_DEV == 0x41508102 && VDUSE_DESTROY_DEV == 0x41008103);
static_assert(VDUSE_IOTLB_GET_FD == 0xc0208110 && VDUSE_DEV_GET_FEATURES == 0x80088111);
static_assert(VDUSE_DEV_SET_CONFIG == 0x40088112 && VDUSE_DEV_INJECT_CONFIG_IRQ == 0x8113);
static_assert(VDUSE_VQ_SETUP == 0x40208114 && VDUSE_VQ_GET_INFO == 0xc0308115);
static_assert(VDUSE_VQ_SETUP_KICKFD == 0x40088116 && VDUSE_VQ_INJECT_IRQ == 0x40048117);
static_assert(VDUSE_IOTLB_REG_UMEM == 0x40308118 && VDUSE_IOTLB_DEREG_UMEM == 0x40308119);
static_assert(VDUSE_IOTLB_GET_INFO == 0xc030811a);

namespace {

std::string device_path(const std::string& name) { return "/dev/vduse/" + name; }

template <class T>
T or_errno(T result) {
    return result < 0 ? static_cast<T>(-errno) : result;
}

class RunningKernel final : public Kernel {
  public:
    int open_control() override { return or_errno(::open("/dev/vduse/control", O_RDWR | O_CLOEXEC)); }
    int open_device(const std::string& name) override {
        return or_errno(::open(device_path(name).c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK));
    }
    void close(int fd) override { UniqueFd closing(fd); }
    int ioctl(int fd, unsigned long request, void* argument) override {
        return or_errno(::ioctl(fd, request, argument));
    }
    ssize_t read(int fd, void* data, size_t size) override { return or_errno(::read(fd, data, size)); }
    ssize_t write(int fd, const void* data, size_t size) override { return or_errno(::write(fd, data, size)); }
    bool attached(const std::string& name) override {
        return ::access(("/sys/bus/vdpa/devices/" + name).c_str(), F_OK) == 0;
    }
    std::chrono::milliseconds patience(const std::string& name) override;
    std::string holder(const std::string& name) override;
    bool any_left() override;
};

/// What the kernel begins with.
constexpr std::chrono::seconds kUsualPatience{30};

std::chrono::milliseconds RunningKernel::patience(const std::string& name) {
    std::ifstream file("/sys/class/vduse/" + name + "/msg_timeout");
    unsigned seconds = 0;
    return file >> seconds ? std::chrono::seconds(seconds) : kUsualPatience;
}

using Directory = std::unique_ptr<DIR, int (*)(DIR*)>;

bool has_open(const std::string& pid, const std::string& path) {
    const std::string fds = "/proc/" + pid + "/fd";
    const Directory directory(::opendir(fds.c_str()), ::closedir);
    if (!directory) return false;
    while (const dirent* entry = ::readdir(directory.get())) {
        char target[300];
        const ssize_t length = ::readlinkat(::dirfd(directory.get()), entry->d_name, target, sizeof target);
        if (length > 0 && std::string_view(target, static_cast<size_t>(length)) == path) return true;
    }
    return false;
}

std::string RunningKernel::holder(const std::string& name) {
    const Directory processes(::opendir("/proc"), ::closedir);
    if (!processes) return {};
    while (const dirent* entry = ::readdir(processes.get())) {
        const std::string pid = entry->d_name;
        if (pid.find_first_not_of("0123456789") != std::string::npos || !has_open(pid, device_path(name))) continue;
        if (pid == std::to_string(::getpid())) return "this process";
        std::ifstream file("/proc/" + pid + "/comm");
        std::string comm;
        std::getline(file, comm);
        std::ranges::replace_if(comm, [](char c) { return static_cast<unsigned char>(c) < ' ' || c == 127; }, '?');
        return fmt::format("process {} ({})", pid, comm);
    }
    return {};
}

bool RunningKernel::any_left() {
    const Directory devices(::opendir("/dev/vduse"), ::closedir);
    if (!devices) return false;
    while (const dirent* entry = ::readdir(devices.get())) {
        const std::string name = entry->d_name;
        if (name == "." || name == ".." || name == "control") continue;
        if (attached(name) && holder(name).empty()) return true;
    }
    return false;
}

}  // namespace

Kernel& Kernel::running() {
    static RunningKernel kernel;
    return kernel;
}

}  // namespace gantry::vduse
