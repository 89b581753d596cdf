#include "fuse/ring.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

#include "runtime/buffer.h"
#include "runtime/check.h"
#include "runtime/io.h"
#include "runtime/log.h"
#include "runtime/unique_fd.h"

namespace gantry::fuse {

namespace {

constexpr unsigned kAllEntries = 128;  // of all queues together, about
constexpr unsigned kMostEntries = 32;
constexpr unsigned kManyQueues = 16;  // from here on payloads are smaller
constexpr uint32_t kSmallWrite = 256 << 10;
constexpr unsigned kMaxQueues = 4096;

std::string read_line(const char* path) {
    const UniqueFd fd(::open(path, O_RDONLY | O_CLOEXEC));
    char text[256];
    const ssize_t n = fd ? ::read(fd.get(), text, sizeof text) : -1;
    std::string line(text, n > 0 ? static_cast<size_t>(n) : 0);
    while (line.ends_with('\n')) line.pop_back();
    return line;
}

}  // namespace

Result<unsigned> possible_cpus() {
    // "0-7", "0,2-5": the last number counts.
    const char* path = "/sys/devices/system/cpu/possible";
    const std::string line = read_line(path);
    const size_t begin = line.find_last_of(",-") + 1;
    unsigned last = 0;
    const auto [end, error] =
        std::from_chars(line.data() + std::min(begin, line.size()), line.data() + line.size(), last);
    if (error != std::errc() || end != line.data() + line.size() || last >= kMaxQueues) {
        return fail(ErrorKind::kUnsupported, "'{}' of {} is no list of CPUs", line, path);
    }
    return last + 1;
}

RingShape ring_shape(unsigned queues) {
    return {.entries = std::clamp(kAllEntries / std::max(queues, 1u), 1u, kMostEntries),
            .max_write = queues <= kManyQueues ? kMaxWrite : kSmallWrite};
}

std::string ring_offered() {
    const std::string value = read_line("/sys/module/fuse/parameters/enable_uring");
    if (value == "Y") return {};
    if (value.empty()) return "this kernel has no FUSE over io_uring (Linux 6.14 or later has it)";
    return "the kernel module has it switched off (echo Y > /sys/module/fuse/parameters/enable_uring allows it)";
}

struct RingQueue::Entry {
    Entry(uint16_t qid, uint32_t max_write)
        : head_page(Buffer::alloc(4096)), payload(Buffer::alloc(max_write)), command{.qid = qid} {
        memory[0] = {head_page.data(), sizeof(RingHeader)};
        memory[1] = {payload.data(), max_write};
    }
    RingHeader& head() { return *reinterpret_cast<RingHeader*>(head_page.data()); }

    Buffer head_page;
    Buffer payload;
    RingCommand command;
    iovec memory[2];
    Call call;
};

RingQueue::RingQueue(Loop& loop, int fd, std::vector<uint16_t> cpus, RingShape shape, FileService& service,
                     block::Channel& channel)
    : loop_(loop), fd_(fd), service_(service), channel_(channel), follower_(loop), max_write_(shape.max_write) {
    for (const uint16_t cpu : cpus) {
        for (unsigned i = 0; i < shape.entries; ++i) entries_.push_back(std::make_unique<Entry>(cpu, shape.max_write));
    }
}

RingQueue::~RingQueue() { CHECK(busy_ == 0, "a queue is destroyed when all its requests are answered"); }

Task<void> RingQueue::run() {
    for (const auto& entry : entries_) scope_.spawn(serve(entry.get()));
    co_await scope_.join();
    follower_.stop();
}

Task<void> RingQueue::stop() {
    stopping_ = true;
    while (busy_ > 0) co_await idle_.wait();
}

Task<void> RingQueue::serve(Entry* entry) {
    uint32_t operation = kRingRegister;
    for (;;) {
        const int result =
            co_await io_command(fd_, operation, &entry->command, sizeof entry->command, entry->memory, 2);
        if (result < 0) {
            if (operation == kRingRegister) {
                int none = 0;
                refused_.compare_exchange_strong(none, -result, std::memory_order_relaxed);
            } else if (result != -ENOTCONN && result != -ECONNABORTED && result != -ENODEV) {
                log::error("FUSE over io_uring: fetching a request: {}", errno_text(-result));
            }
            co_return;
        }
        operation = kRingCommitAndFetch;
        ++busy_;
        co_await answer(entry);
        if (--busy_ == 0 && stopping_) idle_.notify_all();
    }
}

Task<void> RingQueue::answer(Entry* entry) {
    RingHeader& head = entry->head();
    Call& call = entry->call;
    call.header = head.in;
    const uint64_t unique = call.header.unique;
    const auto given = std::min<uint32_t>(head.entry.payload_size, max_write_);
    entry->command.commit_id = head.entry.commit_id;
    call.room = entry->payload.data();
    call.room_size = max_write_;
    call.error = 0;
    call.reply_size = 0;
    call.in_room = call.silent = false;
    // Of the operation's own struct only what its length says is there; what follows lies in the payload.
    const uint64_t body = call.header.len - std::min<uint64_t>(call.header.len, sizeof(InHeader));
    const uint64_t args = body - std::min<uint64_t>(body, given);
    call.args = {head.op_in, std::min<size_t>(args, sizeof head.op_in)};
    call.data_size = given;
    const CallFault fault = check_call(call, sizeof(InHeader) + call.args.size() + given);
    const bool lone = busy_ == 1 && loop_.turns() != last_turn_;
    last_turn_ = loop_.turns();
    call.among_others = !lone;
    if (stopping_) {
        call.fail(ENOTCONN);
    } else if (fault != CallFault::kNone) {
        log::warn("FUSE over io_uring: a request with opcode {} does not fit together", call.header.opcode);
        call.fail(EIO);
    } else if (!service_.try_answer(call, channel_)) {
        co_await service_.answer(call, channel_);
    }
    counters_.count(call);
    if (!lone) {
        lone_.several();
        if (!lone_.likely()) follower_.stop();
    } else if (lone_.one(); lone_.sure()) {
        // Its CPU's queue is answered on that CPU.
        (void)follower_.follow(call.header.pid);
    }
    const uint32_t size = call.error == 0 ? call.reply_size : 0;
    if (size > 0 && !call.in_room) std::memcpy(call.room, &call.body, size);
    head.out = {static_cast<uint32_t>(sizeof head.out) + size, call.error, unique};
    head.entry.payload_size = size;
}

}  // namespace gantry::fuse
