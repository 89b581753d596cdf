#include "tests/support/vduse_kernel.h"

#include <fcntl.h>
#include <linux/virtio_ids.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>

#include "exports/virtio/shared_eventfd.h"

namespace gantry::test {

namespace {

constexpr uint64_t bit(unsigned n) { return uint64_t{1} << n; }
constexpr uint64_t kConfigWce = bit(11), kAccessPlatform = bit(33), kPacked = bit(34);
constexpr uint8_t kDriverOk = 4;
constexpr uint32_t kPage = 4096;

template <class T>
bool all_zero(const T& what) {
    return std::ranges::all_of(what, [](auto v) { return v == 0; });
}

}  // namespace

VduseKernel::~VduseKernel() { kill(); }

int VduseKernel::fault(unsigned long what) {
    const auto it = faults_.find(what);
    if (it == faults_.end() || it->second.skip-- > 0) return 0;
    const int error = it->second.error;
    faults_.erase(it);
    return -error;
}

void VduseKernel::fail(unsigned long what, int error, unsigned skip) {
    const std::lock_guard lock(mutex_);
    faults_[what] = {skip, error};
}

int VduseKernel::open_control() {
    const std::lock_guard lock(mutex_);
    if (const int error = fault(kOpenControl)) return error;
    const int fd = ::open("/dev/null", O_RDWR | O_CLOEXEC);
    files_[fd] = {};
    return fd;
}

int VduseKernel::open_device(const std::string& name) {
    const std::lock_guard lock(mutex_);
    if (const int error = fault(kOpenDevice)) return error;
    const auto it = devices_.find(name);
    if (it == devices_.end()) return -ENOENT;
    Device& device = *it->second;
    if (device.connected) return -EBUSY;
    int ends[2];
    if (::pipe2(ends, O_CLOEXEC | O_NONBLOCK) != 0) return -errno;
    device.connected = true;
    device.wake.reset(ends[1]);
    files_[ends[0]] = {name};
    if (device.broken) device.wake.reset();
    wake(device);
    return ends[0];
}

void VduseKernel::wake(Device& device) {
    if (device.wake && !device.to_send.empty()) {
        const char byte = 1;
        [[maybe_unused]] const ssize_t n = ::write(device.wake.get(), &byte, 1);
    }
}

void VduseKernel::close(int fd) {
    const std::lock_guard lock(mutex_);
    close_locked(fd);
}

void VduseKernel::close_locked(int fd) {
    const auto it = files_.find(fd);
    if (it == files_.end()) throw std::logic_error("a descriptor is closed that is not open");
    if (const auto found = devices_.find(it->second.name); found != devices_.end()) {
        Device& device = *found->second;
        // Whoever opens it next reads again what was not answered.
        device.to_send.insert(device.to_send.begin(), device.received.begin(), device.received.end());
        device.received.clear();
        device.connected = false;
        device.wake.reset();
    }
    files_.erase(it);
    UniqueFd closing(fd);
}

void VduseKernel::kill() {
    const std::lock_guard lock(mutex_);
    while (!files_.empty()) close_locked(files_.begin()->first);
}

void VduseKernel::copy_to(VduseKernel& other, const std::vector<Map>& maps) {
    const std::scoped_lock lock(mutex_, other.mutex_);
    const Device& from = only();
    auto device = std::make_unique<Device>();
    device->shape = from.shape;
    device->config = from.config;
    device->queues = std::vector<Queue>(from.queues.size());
    for (size_t i = 0; i < from.queues.size(); ++i) {
        device->queues[i].most = from.queues[i].most;
        device->queues[i].info = from.queues[i].info;
    }
    device->features = from.features;
    device->status = from.status;
    device->attached = from.attached;
    device->maps = own(maps);
    other.checks_driver_ok = checks_driver_ok;
    other.devices_[devices_.begin()->first] = std::move(device);
}

int VduseKernel::ioctl(int fd, unsigned long request, void* argument) {
    const std::lock_guard lock(mutex_);
    const auto it = files_.find(fd);
    if (it == files_.end()) return -EBADF;
    if (const int error = fault(request)) return error;
    if (it->second.name.empty()) return control_ioctl(request, argument);
    Device& device = *devices_.at(it->second.name);
    return device.broken ? -EPERM : device_ioctl(device, request, argument);
}

int VduseKernel::control_ioctl(unsigned long request, void* argument) {
    switch (request) {
        case VDUSE_SET_API_VERSION:
            return *static_cast<const uint64_t*>(argument) > VDUSE_API_VERSION ? -EINVAL : 0;
        case VDUSE_CREATE_DEV:
            return create(argument);
        case VDUSE_DESTROY_DEV:
            return destroy(static_cast<const char*>(argument));
        default:
            return -EINVAL;
    }
}

int VduseKernel::create(const void* argument) {
    auto device = std::make_unique<Device>();
    vduse_dev_config& shape = device->shape;
    std::memcpy(&shape, argument, offsetof(vduse_dev_config, config));
    if (!all_zero(shape.reserved) || shape.vq_align > kPage || shape.config_size > kPage) return -EINVAL;
    if (shape.device_id != VIRTIO_ID_BLOCK || !shape.name[0]) return -EINVAL;
    if (!(shape.features & kAccessPlatform) || (shape.features & kConfigWce)) return -EINVAL;
    if (shape.vq_num == 0 || shape.vq_num > 0xffff) return -EINVAL;
    const auto* bytes = static_cast<const std::byte*>(argument) + offsetof(vduse_dev_config, config);
    device->config.assign(bytes, bytes + shape.config_size);
    device->queues = std::vector<Queue>(shape.vq_num);
    const std::string name(shape.name, ::strnlen(shape.name, VDUSE_NAME_MAX - 1));
    return devices_.emplace(name, std::move(device)).second ? 0 : -EEXIST;
}

int VduseKernel::destroy(const char* name) {
    const auto it = devices_.find(std::string(name, ::strnlen(name, VDUSE_NAME_MAX - 1)));
    if (it == devices_.end()) return -EINVAL;
    if (it->second->attached || it->second->connected) return -EBUSY;
    devices_.erase(it);
    return 0;
}

int VduseKernel::device_ioctl(Device& device, unsigned long request, void* argument) {
    const auto queue = [&device](uint32_t index) {
        return index < device.queues.size() ? &device.queues[index] : nullptr;
    };
    switch (request) {
        case VDUSE_IOTLB_GET_FD: {
            auto& entry = *static_cast<vduse_iotlb_entry*>(argument);
            if (entry.start > entry.last) return -EINVAL;
            for (const OwnMap& m : device.maps) {
                if (m.map.last < entry.start || m.map.start > entry.last) continue;
                entry.offset = m.map.offset;
                entry.start = m.map.start;
                entry.last = m.map.last;
                entry.perm = m.map.access;
                const int mode = m.map.access == VDUSE_ACCESS_RO   ? O_RDONLY
                                 : m.map.access == VDUSE_ACCESS_WO ? O_WRONLY
                                                                   : O_RDWR;
                const int fd = ::open(("/proc/self/fd/" + std::to_string(m.fd.get())).c_str(), mode | O_CLOEXEC);
                return fd < 0 ? -errno : fd;
            }
            return -EINVAL;
        }
        case VDUSE_DEV_GET_FEATURES:
            *static_cast<uint64_t*>(argument) = device.features;
            return 0;
        case VDUSE_DEV_SET_CONFIG: {
            vduse_config_data head;
            std::memcpy(&head, argument, sizeof head);
            if (head.offset > device.config.size() || head.length == 0 ||
                head.length > device.config.size() - head.offset) {
                return -EINVAL;
            }
            std::memcpy(device.config.data() + head.offset, static_cast<const std::byte*>(argument) + sizeof head,
                        head.length);
            return 0;
        }
        case VDUSE_DEV_INJECT_CONFIG_IRQ:
            if (checks_driver_ok && !(device.status & kDriverOk)) return -EINVAL;
            ++device.config_interrupts;
            return 0;
        case VDUSE_VQ_SETUP: {
            const auto& setup = *static_cast<const vduse_vq_config*>(argument);
            Queue* q = queue(setup.index);
            if (!q || !all_zero(setup.reserved)) return -EINVAL;
            q->most = setup.max_size;
            return 0;
        }
        case VDUSE_VQ_GET_INFO: {
            auto& info = *static_cast<vduse_vq_info*>(argument);
            const Queue* q = queue(info.index);
            if (!q) return -EINVAL;
            const uint32_t index = info.index;
            info = q->info;
            info.index = index;
            return 0;
        }
        case VDUSE_VQ_SETUP_KICKFD: {
            const auto& kick = *static_cast<const vduse_vq_eventfd*>(argument);
            Queue* q = queue(kick.index);
            if (!q) return -EINVAL;
            if (kick.fd >= 0 && !virtio::is_eventfd(kick.fd)) return -EINVAL;
            q->kick.reset(kick.fd < 0 ? -1 : ::fcntl(kick.fd, F_DUPFD_CLOEXEC, 3));
            if (q->kick && q->info.ready && q->kicked) {
                q->kicked = false;
                ::eventfd_write(q->kick.get(), 1);
            }
            return 0;
        }
        case VDUSE_VQ_INJECT_IRQ: {
            Queue* q = queue(*static_cast<const uint32_t*>(argument));
            if (q && checks_driver_ok && !(device.status & kDriverOk)) {
                ++device.refused_interrupts;
                refused_.notify_all();
                return -EINVAL;
            }
            if (!q) return -EINVAL;
            ++q->interrupts;
            return 0;
        }
        default:
            return -ENOTTY;
    }
}

ssize_t VduseKernel::read(int fd, void* data, size_t size) {
    const std::lock_guard lock(mutex_);
    const auto it = files_.find(fd);
    if (it == files_.end()) return -EBADF;
    if (const int error = fault(kRead)) return error;
    if (size < sizeof(vduse_dev_request)) return -EINVAL;
    Device& device = *devices_.at(it->second.name);
    if (device.to_send.empty()) return -EAGAIN;
    Message* message = device.to_send.front();
    device.to_send.pop_front();
    device.received.push_back(message);
    std::memcpy(data, &message->request, sizeof message->request);
    if (device.to_send.empty()) {
        char bytes[64];
        while (::read(fd, bytes, sizeof bytes) > 0) continue;
    }
    return sizeof message->request;
}

ssize_t VduseKernel::write(int fd, const void* data, size_t size) {
    const std::lock_guard lock(mutex_);
    const auto it = files_.find(fd);
    if (it == files_.end()) return -EBADF;
    if (const int error = fault(kWrite)) return error;
    vduse_dev_response response;
    if (size != sizeof response) return -EINVAL;
    std::memcpy(&response, data, sizeof response);
    if (!all_zero(response.reserved)) return -EINVAL;
    Device& device = *devices_.at(it->second.name);
    const auto found = std::ranges::find(device.received, response.request_id, number_of);
    if (found == device.received.end()) return -ENOENT;
    const vduse_dev_request& request = (*found)->request;
    if (delays_driver_ok && request.type == VDUSE_SET_STATUS && (request.s.status & kDriverOk)) {
        delayed_ = response;
    } else {
        deliver(device, response);
    }
    return sizeof response;
}

void VduseKernel::deliver(Device& device, const vduse_dev_response& response) {
    const auto found = std::ranges::find(device.received, response.request_id, number_of);
    if (found == device.received.end()) throw std::logic_error("an answer that nobody waits for");
    (*found)->response = response;
    (*found)->completed = true;
    device.received.erase(found);
    answered_.notify_all();
}

void VduseKernel::release_answer() {
    const std::lock_guard lock(mutex_);
    if (!delayed_) throw std::logic_error("no answer was delayed");
    deliver(only(), *delayed_);
    delayed_.reset();
}

void VduseKernel::give_up(Device& device) {
    device.broken = true;
    for (auto* list : {&device.to_send, &device.received}) {
        for (Message* message : *list) {
            message->response.result = VDUSE_REQ_RESULT_FAILED;
            message->completed = true;
        }
        list->clear();
    }
    device.wake.reset();
}

int VduseKernel::send(std::unique_lock<std::mutex>& lock, const std::string& name, Message& message) {
    Device* device = devices_.at(name).get();
    if (device->broken) return -EIO;
    message.request.request_id = device->next_id++;
    device->to_send.push_back(&message);
    wake(*device);
    const auto patience = patience_.load();
    const auto completed = [&message] { return message.completed; };
    if (!answered_.wait_for(lock, patience, completed)) {
        give_up(*device);
        answered_.notify_all();
    }
    return message.response.result == VDUSE_REQ_RESULT_OK ? 0 : -EIO;
}

int VduseKernel::send_to(vduse_dev_request request, vduse_dev_response* response) {
    std::unique_lock lock(mutex_);
    if (devices_.size() != 1) throw std::logic_error("there is not one device");
    Message message;
    message.request = request;
    const int result = send(lock, devices_.begin()->first, message);
    if (response) *response = message.response;
    return result;
}

VduseKernel::Device& VduseKernel::only() {
    if (devices_.size() != 1) throw std::logic_error("there is not one device");
    return *devices_.begin()->second;
}

bool VduseKernel::attached(const std::string& name) {
    const std::lock_guard lock(mutex_);
    const auto it = devices_.find(name);
    return it != devices_.end() && it->second->attached;
}

bool VduseKernel::any_left() {
    const std::lock_guard lock(mutex_);
    return std::ranges::any_of(devices_, [](const auto& d) { return d.second->attached && !d.second->connected; });
}

int VduseKernel::attach(const std::string& name) {
    {
        const std::lock_guard lock(mutex_);
        const auto it = devices_.find(name);
        if (it == devices_.end()) return -EINVAL;
        if (std::ranges::any_of(it->second->queues, [](const Queue& q) { return q.most == 0; })) return -EINVAL;
        if (it->second->attached) return -EEXIST;
        it->second->attached = true;
    }
    return reset();
}

void VduseKernel::detach(const std::string& name) {
    (void)reset();
    const std::lock_guard lock(mutex_);
    reset_state(*devices_.at(name));
    devices_.at(name)->attached = false;
    devices_.at(name)->maps.clear();
}

int VduseKernel::set_status(uint8_t status) {
    vduse_dev_request request{};
    request.type = VDUSE_SET_STATUS;
    request.s.status = status;
    const int result = send_to(request);
    std::unique_lock lock(mutex_);
    if (notes_late && result == 0 && (status & kDriverOk)) {
        refused_.wait_for(lock, std::chrono::seconds(5), [this] { return only().refused_interrupts > 0; });
    }
    if (result == 0) only().status = status;
    return result;
}

void VduseKernel::reset_state(Device& device) {
    device.status = 0;
    device.features = 0;
    for (Queue& q : device.queues) {
        q.info = {};
        q.kicked = false;
        q.kick.reset();
    }
}

int VduseKernel::reset() {
    vduse_dev_request request{};
    request.type = VDUSE_SET_STATUS;
    const int result = send_to(request);
    const std::lock_guard lock(mutex_);
    if (result == 0 || checks_driver_ok) reset_state(only());
    return result;
}

uint8_t VduseKernel::status() {
    const std::lock_guard lock(mutex_);
    return only().status;
}

uint64_t VduseKernel::offered() {
    const std::lock_guard lock(mutex_);
    return only().shape.features;
}

void VduseKernel::choose(uint64_t features) {
    const std::lock_guard lock(mutex_);
    only().features = features;
}

void VduseKernel::set_queue(uint32_t index, uint32_t size, uint64_t descriptors, uint64_t driver, uint64_t device,
                            uint32_t base, bool ready) {
    const std::lock_guard lock(mutex_);
    vduse_vq_info& info = only().queues.at(index).info;
    info.num = size;
    info.desc_addr = descriptors;
    info.driver_addr = driver;
    info.device_addr = device;
    info.ready = ready;
    if (only().features & kPacked) {
        info.packed.last_avail_idx = base & 0x7fff;
        info.packed.last_avail_counter = base >> 15 & 1;
        info.packed.last_used_idx = base >> 16 & 0x7fff;
        info.packed.last_used_counter = base >> 31;
    } else {
        info.split.avail_index = static_cast<uint16_t>(base);
    }
}

void VduseKernel::kick(uint32_t index) {
    const std::lock_guard lock(mutex_);
    Queue& q = only().queues.at(index);
    if (!q.info.ready) return;
    if (q.kick) {
        ::eventfd_write(q.kick.get(), 1);
    } else {
        q.kicked = true;
    }
}

std::optional<vduse_vq_state> VduseKernel::queue_state(uint32_t index) {
    vduse_dev_request request{};
    request.type = VDUSE_GET_VQ_STATE;
    request.vq_state.index = index;
    vduse_dev_response response{};
    if (send_to(request, &response) != 0) return std::nullopt;
    return response.vq_state;
}

std::vector<VduseKernel::OwnMap> VduseKernel::own(const std::vector<Map>& maps) {
    std::vector<OwnMap> all;
    for (const Map& map : maps) all.push_back({map, UniqueFd(::fcntl(map.fd, F_DUPFD_CLOEXEC, 3))});
    return all;
}

void VduseKernel::map(std::vector<Map> maps) {
    const std::lock_guard lock(mutex_);
    only().maps = own(maps);
}

int VduseKernel::update(std::vector<Map> maps) {
    map(maps);
    vduse_dev_request request{};
    request.type = VDUSE_UPDATE_IOTLB;
    request.iova.last = UINT64_MAX;
    const int result = send_to(request);
    if (result != 0) map({});
    return result;
}

int VduseKernel::send_unknown() {
    vduse_dev_request request{};
    request.type = 77;
    return send_to(request);
}

size_t VduseKernel::devices() {
    const std::lock_guard lock(mutex_);
    return devices_.size();
}

bool VduseKernel::exists(const std::string& name) {
    const std::lock_guard lock(mutex_);
    return devices_.contains(name);
}

uint64_t VduseKernel::interrupts(uint32_t index) {
    const std::lock_guard lock(mutex_);
    return only().queues.at(index).interrupts;
}

uint64_t VduseKernel::config_interrupts() {
    const std::lock_guard lock(mutex_);
    return only().config_interrupts;
}

uint64_t VduseKernel::refused_interrupts() {
    const std::lock_guard lock(mutex_);
    return only().refused_interrupts;
}

bool VduseKernel::has_kick(uint32_t index) {
    const std::lock_guard lock(mutex_);
    return static_cast<bool>(only().queues.at(index).kick);
}

bool VduseKernel::broken() {
    const std::lock_guard lock(mutex_);
    return only().broken;
}

std::vector<std::byte> VduseKernel::config() {
    const std::lock_guard lock(mutex_);
    return only().config;
}

vduse_dev_config VduseKernel::shape() {
    const std::lock_guard lock(mutex_);
    return only().shape;
}

size_t VduseKernel::open_files() {
    const std::lock_guard lock(mutex_);
    return files_.size();
}

}  // namespace gantry::test
