// Fuzz target: a front end of a vhost-user disk that sends what it likes, and a guest beside it. The input is a list of
// actions: messages as they are or nearly right ones, with descriptors of all kinds; writes to the guest's memory;
// kicks. Whatever they are, the session ends when the front end goes, and every reply belongs to a request.

#include <fcntl.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <unistd.h>

#include <boost/json/parse.hpp>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <set>
#include <vector>

#include "block/graph.h"
#include "block/protocols/null.h"
#include "exports/vhost_user/session.h"
#include "runtime/log.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"
#include "tests/fuzz/input.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::vhost_user;
using gantry::fuzz::Input;

namespace {

constexpr uint64_t kMemory = 1 << 16;
constexpr uint64_t kGuest = 0x10000, kUser = 0x7f0000000000;
constexpr unsigned kMostActions = 200;

struct World {
    World() {
        log::set_level(log::Level::kOff);
        runtime.run(open());
    }
    Task<void> open() {
        auto added = co_await graph.add(
            json::parse(R"({"driver":"null-co","node-name":"n","size":1048576,"read-zeroes":true})").as_object());
        EXPECT(added.has_value());
        block::RootOptions options;
        options.perms.need = block::Perm::kConsistentRead | block::Perm::kWrite;
        options.user = "the fuzzer";
        auto attached = co_await graph.attach(**added, std::move(options));
        EXPECT(attached.has_value());
        root = std::move(*attached);
    }

    test::TestRuntime runtime{RuntimeOptions{IoBackendKind::kEpoll, 0, 2}};
    std::vector<block::Driver> drivers{block::kNullCoDriver};
    // Never closed: the process ends with it.
    block::Graph& graph = *new block::Graph(*runtime.runtime, drivers, nullptr);
    std::unique_ptr<block::Root> root;
};

/// The front end's side: descriptors that it passes, replies that it has got.
struct Front {
    Front() {
        int fds[2];
        EXPECT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
        socket = UniqueFd(fds[0]);
        device = UniqueFd(fds[1]);
        EXPECT(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0, fds) == 0);
        channel = UniqueFd(fds[0]);
        channel_end = UniqueFd(fds[1]);
        memory = UniqueFd(::memfd_create("fuzz", MFD_CLOEXEC));
        EXPECT(::ftruncate(memory.get(), kMemory) == 0);
        kick = UniqueFd(::eventfd(0, EFD_CLOEXEC));
        call = UniqueFd(::eventfd(0, EFD_CLOEXEC));
        null = UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC));
        empty = UniqueFd(::memfd_create("empty", MFD_CLOEXEC));
    }
    int descriptor(uint8_t choice) const {
        const int all[] = {memory.get(),
                           kick.get(),
                           call.get(),
                           null.get(),
                           empty.get(),
                           channel_end.get(),
                           inflight ? inflight.get() : memory.get(),
                           memory.get()};
        return all[choice % 8];
    }
    void send(const Header& header, const std::vector<uint8_t>& payload, const std::vector<int>& fds) {
        std::vector<uint8_t> bytes(sizeof header + payload.size());
        std::memcpy(bytes.data(), &header, sizeof header);
        if (!payload.empty()) std::memcpy(bytes.data() + sizeof header, payload.data(), payload.size());
        alignas(cmsghdr) char control[CMSG_SPACE(16 * sizeof(int))] = {};
        iovec part{bytes.data(), bytes.size()};
        msghdr message{};
        message.msg_iov = &part;
        message.msg_iovlen = 1;
        if (!fds.empty()) {
            message.msg_control = control;
            message.msg_controllen = CMSG_SPACE(fds.size() * sizeof(int));
            cmsghdr* c = CMSG_FIRSTHDR(&message);
            c->cmsg_level = SOL_SOCKET;
            c->cmsg_type = SCM_RIGHTS;
            c->cmsg_len = CMSG_LEN(fds.size() * sizeof(int));
            std::memcpy(CMSG_DATA(c), fds.data(), fds.size() * sizeof(int));
        }
        (void)::sendmsg(socket.get(), &message, MSG_NOSIGNAL);
    }
    /// Replies that are there, each of something that was asked.
    void take_replies() {
        for (;;) {
            Header header;
            alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
            iovec part{&header, sizeof header};
            msghdr message{};
            message.msg_iov = &part;
            message.msg_iovlen = 1;
            message.msg_control = control;
            message.msg_controllen = sizeof control;
            const ssize_t got = ::recvmsg(socket.get(), &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
            if (got <= 0) return;
            EXPECT(got == sizeof header);
            EXPECT(header.flags == (kVersion | kReplyFlag) && header.size <= kMaxPayload);
            EXPECT(misframed || asked.contains(header.request));
            for (cmsghdr* c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
                int fd;
                std::memcpy(&fd, CMSG_DATA(c), sizeof fd);
                inflight = UniqueFd(fd);
                EXPECT(header.request == static_cast<uint32_t>(Request::kGetInflightFd));
            }
            std::vector<uint8_t> payload(header.size);
            if (!payload.empty()) {
                EXPECT(::recv(socket.get(), payload.data(), payload.size(), MSG_DONTWAIT) ==
                       static_cast<ssize_t>(payload.size()));
            }
        }
    }

    UniqueFd socket, device, memory, kick, call, null, empty, channel, channel_end, inflight;
    std::set<uint32_t> asked;
    bool misframed = false;  // what follows may be taken for any message
};

/// Makes of any bytes what the session mostly lets pass, so that what lies behind it is reached.
void mend(Request request, std::vector<uint8_t>& payload, Input& input) {
    const auto put = [&](size_t offset, auto value) {
        if (offset + sizeof value <= payload.size()) std::memcpy(payload.data() + offset, &value, sizeof value);
    };
    const uint32_t queue = input.byte() % 3;
    const MemoryRegion region{kGuest, kMemory, kUser, 0};
    switch (request) {
        case Request::kSetFeatures:
            put(0, (uint64_t{input.word()} << 20 & (uint64_t{0x74} << 24)) | uint64_t{1} << 32 |
                       (input.byte() & 1 ? uint64_t{1} << 34 : 0) | 0x7e44);
            break;
        case Request::kSetMemTable:
            payload.resize(sizeof(MemoryTable) + sizeof region);
            put(0, MemoryTable{1, 0});
            put(sizeof(MemoryTable), region);
            break;
        case Request::kAddMemReg:
        case Request::kRemMemReg:
            put(8, region);
            break;
        case Request::kSetVringNum:
            put(0, VringState{queue, 1U << (1 + input.byte() % 5)});
            break;
        case Request::kSetVringBase:
        case Request::kGetVringBase:
            put(0, VringState{queue, input.word()});
            break;
        case Request::kSetVringEnable:
            put(0, VringState{queue, uint32_t{input.byte()} & 1});
            break;
        case Request::kSetVringAddr: {
            const uint64_t base = kUser + (uint64_t{input.byte()} & 15) * 4096;
            put(0, VringAddress{queue, uint32_t{input.byte()} & 1, base, base + 2048, base + 1024, input.word()});
            break;
        }
        case Request::kSetVringKick:
        case Request::kSetVringCall:
        case Request::kSetVringErr:
            put(0, uint64_t{queue});
            break;
        case Request::kSetConfig:
            payload.resize(sizeof(ConfigRange) + 1);
            put(0, ConfigRange{32, 1, 0});
            break;
        case Request::kGetConfig:
            payload.resize(sizeof(ConfigRange) + 60);
            put(0, ConfigRange{input.byte(), 60, 0});
            break;
        case Request::kGetInflightFd:
        case Request::kSetInflightFd:
            put(0, InflightArea{kMemory / 2, 0, static_cast<uint16_t>(1 + queue), 32, 0});
            break;
        case Request::kSetLogBase:
            put(0, LogArea{4096, 0});
            break;
        default:
            break;
    }
}

size_t usual_descriptors(const RequestRule& rule) {
    switch (rule.request) {
        case Request::kSetMemTable:
        case Request::kSetVringKick:
        case Request::kSetVringCall:
        case Request::kSetVringErr:
            return 1;
        default:
            return rule.least_fds;
    }
}

uint8_t usual_descriptor(Request request) {
    switch (request) {
        case Request::kSetVringKick:
            return 1;
        case Request::kSetVringCall:
        case Request::kSetVringErr:
            return 2;
        case Request::kSetBackendReqFd:
            return 5;
        case Request::kSetInflightFd:
            return 6;
        default:
            return 0;
    }
}

void send_message(Front& front, Input& input, uint8_t choices) {
    Header header{input.byte() % 44U, kVersion, 0};
    if (choices & 8) header.flags |= kNeedReply;
    const RequestRule* rule = rule_of(header.request);
    std::vector<uint8_t> payload(rule ? rule->least : input.byte());
    if (!(choices & 16)) payload.resize(input.byte());
    std::vector<int> fds;
    input.fill(payload.data(), payload.size());
    if (choices & 32) {
        if (rule) mend(rule->request, payload, input);
        const size_t count = rule ? usual_descriptors(*rule) : 0;
        for (size_t i = 0; i < count; ++i) fds.push_back(front.descriptor(usual_descriptor(rule->request)));
    } else {
        for (uint8_t n = input.byte() % 11; n > 0; --n) fds.push_back(front.descriptor(input.byte()));
    }
    header.size = static_cast<uint32_t>(payload.size());
    if (choices & 64) header.flags = input.word();
    if (choices & 128) {
        header.size = input.word();
        front.misframed = true;
    }
    front.asked.insert(header.request);
    front.send(header, payload, fds);
}

Task<void> act(Front* front, Input* input) {
    for (unsigned n = 0; n < kMostActions && !input->empty(); ++n) {
        const uint8_t choices = input->byte();
        switch (choices & 7) {
            case 0: {  // the guest writes to its memory
                uint8_t bytes[64];
                const uint64_t at = input->word();
                const size_t size = 1 + input->byte() % sizeof bytes;
                input->fill(bytes, size);
                (void)::pwrite(front->memory.get(), bytes, std::min<uint64_t>(size, kMemory - at),
                               static_cast<off_t>(at));
                break;
            }
            case 1: {  // and kicks
                const uint64_t one = 1;
                (void)::write(front->kick.get(), &one, sizeof one);
                co_await sleep_for(std::chrono::nanoseconds(0));
                break;
            }
            case 2:  // bytes that are no message
                if (choices == 2) {
                    (void)::ftruncate(front->memory.get(), input->byte() * 256);
                } else {
                    uint8_t bytes[32];
                    const size_t size = input->byte() % sizeof bytes;
                    input->fill(bytes, size);
                    (void)::send(front->socket.get(), bytes, size, MSG_NOSIGNAL);
                    front->misframed = true;
                }
                break;
            default:
                send_message(*front, *input, choices);
        }
        co_await sleep_for(std::chrono::nanoseconds(0));
        front->take_replies();
    }
    ::shutdown(front->socket.get(), SHUT_WR);
}

Task<void> talk(World* world, Input input) {
    const uint8_t choice = input.byte();
    virtio::BlkShape shape;
    shape.serial = "fuzz";
    shape.writable = choice & 1;
    shape.block_size = choice & 2 ? 4096 : 512;
    Device device("fuzz", *world->root, {&Loop::current()}, std::move(shape));
    {
        Front front;
        Session session(device, std::move(front.device));
        device.on_fault = [&](size_t index, const std::string&) { session.queue_broke(index); };
        TaskScope scope;
        scope.spawn(session.run());
        co_await act(&front, &input);
        if (choice & 4) session.config_changed();
        EXPECT(!session.details().empty());
        co_await scope.join();
        front.take_replies();
        device.on_fault = nullptr;
    }
    for (size_t i = 0; i < device.queue_limit(); ++i) {
        EXPECT(!device.made_queue(i) || !device.made_queue(i)->started());
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    static World& world = *new World;
    world.runtime.run(talk(&world, Input(data, size)));
    return 0;
}
