// VduseKernel: the kernel's side of VDUSE in this process, with its administrator and its drivers: as the kernel
// behaves towards a device's process (drivers/vdpa/vdpa_user of Linux), and what it lets drivers do.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "exports/vduse/kernel.h"
#include "runtime/unique_fd.h"

namespace gantry::test {

/// Any thread. Functions for drivers that send a message block until it is answered: not on the main loop.
class VduseKernel final : public vduse::Kernel {
  public:
    /// Places of faults besides the ioctls, which are named by their numbers.
    static constexpr unsigned long kOpenControl = 1, kOpenDevice = 2, kRead = 3, kWrite = 4;
    struct Map {
        uint64_t start, last, offset;
        int fd;  // stays the caller's
        uint8_t access = VDUSE_ACCESS_RW;
    };

    VduseKernel() = default;
    ~VduseKernel() override;

    int open_control() override;
    int open_device(const std::string& name) override;
    void close(int fd) override;
    int ioctl(int fd, unsigned long request, void* argument) override;
    ssize_t read(int fd, void* data, size_t size) override;
    ssize_t write(int fd, const void* data, size_t size) override;
    bool attached(const std::string& name) override;
    std::chrono::milliseconds patience(const std::string&) override { return patience_; }
    std::string holder(const std::string&) override { return "process 4711 (somebody)"; }
    bool any_left() override;

    /// The call of that kind after `skip` more fails with `error`, once.
    void fail(unsigned long what, int error, unsigned skip = 0);
    void set_patience(std::chrono::milliseconds patience) { patience_ = patience; }
    /// Interrupts are refused before DRIVER_OK (newer kernels); a failed reset resets all the same (newer ones).
    bool checks_driver_ok = true;
    /// The kernel notes DRIVER_OK only after it has refused an interrupt (or some seconds).
    bool notes_late = false;
    /// The answer to DRIVER_OK is on its way until release_answer().
    std::atomic<bool> delays_driver_ok = false;
    void release_answer();

    // The administrator. `vdpa dev add`: -EINVAL unless every queue is set up. `vdpa dev del`: the driver resets it.
    int attach(const std::string& name);
    void detach(const std::string& name);

    // Drivers, of the one device that there is; 0 or -errno.
    int set_status(uint8_t status);
    int reset();
    uint8_t status();
    uint64_t offered();
    void choose(uint64_t features);
    void set_queue(uint32_t index, uint32_t size, uint64_t descriptors, uint64_t driver, uint64_t device, uint32_t base,
                   bool ready = true);
    void kick(uint32_t index);
    std::optional<vduse_vq_state> queue_state(uint32_t index);
    /// The memory, without a message (as for drivers in the kernel), or with one.
    void map(std::vector<Map> maps);
    int update(std::vector<Map> maps);
    /// A message that no kernel knows of.
    int send_unknown();

    // What the device did.
    size_t devices();
    bool exists(const std::string& name);
    uint64_t interrupts(uint32_t index);
    uint64_t config_interrupts();
    uint64_t refused_interrupts();
    bool has_kick(uint32_t index);
    bool broken();
    std::vector<std::byte> config();
    vduse_dev_config shape();
    /// Descriptors that the process under test has open.
    size_t open_files();
    /// The process is dead: its descriptors are closed.
    void kill();
    /// The device as it would be found by a process after a kill now, in another kernel, with the memory `maps`.
    void copy_to(VduseKernel& other, const std::vector<Map>& maps);

  private:
    struct Message {
        vduse_dev_request request{};
        vduse_dev_response response{};
        bool completed = false;
    };
    struct Queue {
        uint16_t most = 0;
        vduse_vq_info info{};
        UniqueFd kick;
        bool kicked = false;
        uint64_t interrupts = 0;
    };
    struct OwnMap {
        Map map;
        UniqueFd fd;
    };
    struct Device {
        std::vector<std::byte> config;
        std::vector<Queue> queues;
        uint64_t features = 0;
        uint8_t status = 0;
        bool attached = false, broken = false, connected = false;
        std::vector<OwnMap> maps;
        std::deque<Message*> to_send, received;
        uint32_t next_id = 0;
        uint64_t config_interrupts = 0, refused_interrupts = 0;
        UniqueFd wake;  // its other end is the process's descriptor
        vduse_dev_config shape{};
    };
    struct File {
        std::string name;  // empty: control
    };
    int send(std::unique_lock<std::mutex>& lock, const std::string& name, Message& message);
    int send_to(vduse_dev_request request, vduse_dev_response* response = nullptr);
    int control_ioctl(unsigned long request, void* argument);
    int device_ioctl(Device& device, unsigned long request, void* argument);
    int create(const void* argument);
    int destroy(const char* name);
    int fault(unsigned long what);
    void close_locked(int fd);
    void wake(Device& device);
    void deliver(Device& device, const vduse_dev_response& response);
    static uint32_t number_of(const Message* message) { return message->request.request_id; }
    static void give_up(Device& device);
    static void reset_state(Device& device);
    Device& only();
    static std::vector<OwnMap> own(const std::vector<Map>& maps);

    std::mutex mutex_;
    std::condition_variable answered_, refused_;
    std::map<std::string, std::unique_ptr<Device>> devices_;
    std::map<int, File> files_;
    struct Fault {
        unsigned skip;
        int error;
    };
    std::map<unsigned long, Fault> faults_;
    std::optional<vduse_dev_response> delayed_;
    std::atomic<std::chrono::milliseconds> patience_{std::chrono::milliseconds(30'000)};
};

}  // namespace gantry::test
