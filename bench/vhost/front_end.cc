#include "bench/vhost/front_end.h"

#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace gantry::bench::vhost {

namespace {

std::string error_text(int error) { return std::strerror(error); }

std::string number(Request request) { return std::to_string(static_cast<uint32_t>(request)); }

Outcome<Socket> connect_to(const Options& options) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (options.socket_path.size() >= sizeof address.sun_path) return failure("--socket: the path is too long");
    std::memcpy(address.sun_path, options.socket_path.c_str(), options.socket_path.size());
    Socket socket(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (socket.fd() < 0 || ::connect(socket.fd(), reinterpret_cast<sockaddr*>(&address), sizeof address) < 0) {
        return failure("connecting to " + options.socket_path + ": " + error_text(errno));
    }
    const timeval limit = {options.stall_ns / 1'000'000'000, options.stall_ns / 1000 % 1'000'000};
    ::setsockopt(socket.fd(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    return socket;
}

}  // namespace

Outcome<SharedMemory> SharedMemory::create(size_t bytes) {
    Socket fd(::memfd_create("gantry-bench-vhost", MFD_CLOEXEC));
    if (fd.fd() < 0 || ::ftruncate(fd.fd(), static_cast<off_t>(bytes)) < 0) {
        return failure("making " + std::to_string(bytes) + " bytes of shared memory: " + error_text(errno));
    }
    void* data = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd.fd(), 0);
    if (data == MAP_FAILED) return failure("mapping shared memory: " + error_text(errno));
    return SharedMemory(std::move(fd), static_cast<std::byte*>(data), bytes);
}

SharedMemory::~SharedMemory() {
    if (data_) ::munmap(data_, bytes_);
}

Outcome<FrontEnd> FrontEnd::connect(const Options& options) {
    auto socket = connect_to(options);
    if (!socket) return failure(std::move(socket.error()));
    FrontEnd front_end(std::move(*socket));
    BENCH_CHECK(front_end.negotiate(options));
    return front_end;
}

Outcome<> FrontEnd::negotiate(const Options& options) {
    const auto offered = ask(Request::kGetFeatures);
    if (!offered) return failure(offered.error());
    uint64_t wanted = kFeatureVersion1 | kFeatureProtocol;
    if (options.packed) wanted |= kFeaturePacked;
    if (options.event_idx) wanted |= kFeatureEventIdx;
    if (options.indirect) wanted |= kFeatureIndirect;
    if (options.queues > 1) wanted |= kFeatureMq;
    if (const uint64_t missing = wanted & ~*offered) {
        return failure("the server does not offer feature bit " + std::to_string(std::countr_zero(missing)) +
                       ", which the options ask for");
    }
    if (options.writes() && (*offered & kFeatureReadOnly)) return failure("the disk is read-only");

    const auto protocol = ask(Request::kGetProtocolFeatures);
    if (!protocol) return failure(protocol.error());
    if (!(*protocol & kProtocolConfig)) return failure("the server has no configuration space (protocol feature 9)");
    BENCH_CHECK(tell(Request::kSetProtocolFeatures, *protocol & (kProtocolMq | kProtocolConfig)));
    BENCH_CHECK(send(Request::kSetOwner, {}));
    if (options.queues > 1) {
        const auto queues = ask(Request::kGetQueueNum);
        if (!queues) return failure(queues.error());
        if (options.queues > *queues) return failure("the server has " + std::to_string(*queues) + " queues at most");
    }
    BENCH_CHECK(read_config());
    // Who cannot flush gets every write flushed.
    disk_.features = wanted | (*offered & (kFeatureReadOnly | kFeatureFlush));
    return tell(Request::kSetFeatures, disk_.features);
}

Outcome<> FrontEnd::read_config() {
    Config config{};
    config.size = sizeof config.data;
    BENCH_CHECK(tell(Request::kGetConfig, config));
    BENCH_CHECK(receive(Request::kGetConfig, std::as_writable_bytes(std::span(&config, 1))));
    uint64_t sectors;
    std::memcpy(&sectors, config.data + kConfigCapacity, sizeof sectors);
    std::memcpy(&disk_.block_bytes, config.data + kConfigBlockSize, sizeof disk_.block_bytes);
    if (sectors > UINT64_MAX / 512) return failure("the disk has " + std::to_string(sectors) + " sectors");
    disk_.bytes = sectors * 512;
    return {};
}

Outcome<> FrontEnd::share(const SharedMemory& memory) {
    const MemoryTable table = {
        1, 0, SharedMemory::kGuestBase, memory.bytes(), reinterpret_cast<uint64_t>(memory.data()), 0};
    return tell(Request::kSetMemTable, table, memory.fd());
}

Outcome<> FrontEnd::start_queue(uint32_t index, const QueueWiring& wiring) {
    BENCH_CHECK(tell(Request::kSetVringNum, VringState{index, wiring.size}));
    BENCH_CHECK(tell(Request::kSetVringBase, VringState{index, wiring.base}));
    const auto user = [](const std::byte* at) { return reinterpret_cast<uint64_t>(at); };
    const VringAddress address = {index, 0, user(wiring.descriptors), user(wiring.used), user(wiring.available), 0};
    BENCH_CHECK(tell(Request::kSetVringAddr, address));
    BENCH_CHECK(tell(Request::kSetVringCall, uint64_t{index}, wiring.call_fd));
    BENCH_CHECK(tell(Request::kSetVringKick, uint64_t{index}, wiring.kick_fd));
    return tell(Request::kSetVringEnable, VringState{index, 1});
}

Outcome<> FrontEnd::stop_queue(uint32_t index) {
    BENCH_CHECK(tell(Request::kSetVringEnable, VringState{index, 0}));
    VringState state = {index, 0};
    BENCH_CHECK(tell(Request::kGetVringBase, state));
    return receive(Request::kGetVringBase, std::as_writable_bytes(std::span(&state, 1)));
}

Outcome<> FrontEnd::send(Request request, std::span<const std::byte> payload, int fd) {
    Header header = {static_cast<uint32_t>(request), kVersion, static_cast<uint32_t>(payload.size())};
    iovec parts[2] = {{&header, sizeof header}, {const_cast<std::byte*>(payload.data()), payload.size()}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    union {
        cmsghdr alignment;
        char bytes[CMSG_SPACE(sizeof(int))];
    } control{};
    if (fd >= 0) {
        message.msg_control = control.bytes;
        message.msg_controllen = sizeof control.bytes;
        cmsghdr* rights = CMSG_FIRSTHDR(&message);
        rights->cmsg_level = SOL_SOCKET;
        rights->cmsg_type = SCM_RIGHTS;
        rights->cmsg_len = CMSG_LEN(sizeof(int));
        std::memcpy(CMSG_DATA(rights), &fd, sizeof fd);
    }
    const auto expected = static_cast<ssize_t>(sizeof header + payload.size());
    const ssize_t sent = ::sendmsg(socket_.fd(), &message, MSG_NOSIGNAL);
    if (sent == expected) return {};
    return failure("sending message " + number(request) + ": " + (sent < 0 ? error_text(errno) : "sent in part"));
}

Outcome<> FrontEnd::receive(Request request, std::span<std::byte> payload) {
    Header header;
    BENCH_CHECK(receive_bytes(std::as_writable_bytes(std::span(&header, 1))));
    if (header.request != static_cast<uint32_t>(request) || (header.flags & (kVersionMask | kReply)) != (1 | kReply) ||
        header.size != payload.size()) {
        return failure("message " + number(request) + " was answered with message " + std::to_string(header.request) +
                       " of " + std::to_string(header.size) + " bytes, expected " + std::to_string(payload.size()));
    }
    return receive_bytes(payload);
}

Outcome<> FrontEnd::receive_bytes(std::span<std::byte> to) {
    while (!to.empty()) {
        const ssize_t got = ::recv(socket_.fd(), to.data(), to.size(), 0);
        if (got == 0) return failure("the server closed the connection");
        if (got < 0 && errno == EINTR) continue;
        if (got < 0) {
            return failure(errno == EAGAIN ? "the server does not answer" : "receiving: " + error_text(errno));
        }
        to = to.subspan(static_cast<size_t>(got));
    }
    return {};
}

Outcome<uint64_t> FrontEnd::ask(Request request) {
    BENCH_CHECK(send(request, {}));
    uint64_t value = 0;
    BENCH_CHECK(receive(request, std::as_writable_bytes(std::span(&value, 1))));
    return value;
}

}  // namespace gantry::bench::vhost
