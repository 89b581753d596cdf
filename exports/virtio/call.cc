#include "exports/virtio/call.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>

#include <cstdint>
#include <cstring>

namespace gantry::virtio {

EventCall::EventCall(UniqueFd fd) : fd_(std::move(fd)) {
    const int flags = ::fcntl(fd_.get(), F_GETFL);
    if (flags >= 0) (void)::fcntl(fd_.get(), F_SETFL, flags | O_NONBLOCK);
}

void EventCall::signal() {
    const uint64_t one = 1;
    // EAGAIN: the counter is full, so that the driver has a signal to look at anyway.
    [[maybe_unused]] const ssize_t n = ::write(fd_.get(), &one, sizeof one);
}

bool is_eventfd(int fd) {
    constexpr char kName[] = "anon_inode:[eventfd]";
    char name[sizeof kName];
    const ssize_t n = ::readlink(fmt::format("/proc/self/fd/{}", fd).c_str(), name, sizeof name);
    return n == sizeof kName - 1 && std::memcmp(name, kName, sizeof kName - 1) == 0;
}

}  // namespace gantry::virtio
