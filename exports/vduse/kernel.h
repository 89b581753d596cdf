// Kernel: the system calls behind VDUSE (linux/vduse.h, "VDUSE - vDPA Device in Userspace" of the kernel's
// documentation), one by one, so that tests put a kernel of their own here.

#pragma once

#include <linux/vduse.h>
#include <sys/ioctl.h>
#include <sys/types.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

namespace gantry::vduse {

/// Any thread. Calls give >= 0 or -errno.
class Kernel {
  public:
    virtual ~Kernel() = default;
    /// The one that runs this process.
    static Kernel& running();

    /// A descriptor of /dev/vduse/control, of /dev/vduse/NAME (non-blocking; POLLIN: a message waits, POLLERR: the
    /// kernel has given the device up).
    virtual int open_control() = 0;
    virtual int open_device(const std::string& name) = 0;
    virtual void close(int fd) = 0;
    virtual int ioctl(int fd, unsigned long request, void* argument) = 0;
    virtual ssize_t read(int fd, void* data, size_t size) = 0;
    virtual ssize_t write(int fd, const void* data, size_t size) = 0;

    /// Whether the device is on the vDPA bus (`vdpa dev add`): it cannot be destroyed before it is not any more.
    virtual bool attached(const std::string& name) = 0;
    /// How long the kernel waits for the answer to a message before it gives the device up; 0: for ever.
    virtual std::chrono::milliseconds patience(const std::string& name) = 0;
    /// Who has the device open, as far as that shows: "process 4711 (name)"; else empty.
    virtual std::string holder(const std::string& name) = 0;
    /// Whether any device is attached that nobody has open, as far as that shows.
    virtual bool any_left() = 0;
};

/// A descriptor of it that is closed in the end.
class KernelFile {
  public:
    KernelFile() = default;
    KernelFile(Kernel& kernel, int fd) : kernel_(&kernel), fd_(fd) {}
    KernelFile(KernelFile&& o) noexcept : kernel_(o.kernel_), fd_(std::exchange(o.fd_, -1)) {}
    KernelFile& operator=(KernelFile&& o) noexcept {
        if (this != &o) {
            close();
            kernel_ = o.kernel_;
            fd_ = std::exchange(o.fd_, -1);
        }
        return *this;
    }
    ~KernelFile() { close(); }

    int fd() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    void close() {
        if (fd_ >= 0) kernel_->close(std::exchange(fd_, -1));
    }
    int ioctl(unsigned long request, void* argument) const { return kernel_->ioctl(fd_, request, argument); }
    ssize_t read(void* data, size_t size) const { return kernel_->read(fd_, data, size); }
    ssize_t write(const void* data, size_t size) const { return kernel_->write(fd_, data, size); }

  private:
    Kernel* kernel_ = nullptr;
    int fd_ = -1;
};

}  // namespace gantry::vduse
