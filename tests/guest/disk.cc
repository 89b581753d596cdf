// What tests do with a disk inside a guest and a shell cannot: everything goes around the page cache, and what is read
// is compared. Sector n at version v holds the two 64-bit words n and v, over and over; version 0 is zeroes.

#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr size_t kSector = 512;
constexpr size_t kPage = 4096;
constexpr size_t kPiece = 256 << 10;  // of a long range
constexpr uint64_t kBlock = kPage;    // what `random` remembers a version of

[[noreturn]] void fail(const std::string& what) {
    std::printf("FAILED: %s\n", what.c_str());
    std::fflush(stdout);
    std::_Exit(1);
}

[[noreturn]] void fail_at(const char* verb, uint64_t offset, size_t bytes, ssize_t got) {
    const std::string why = got < 0 ? std::strerror(errno) : "returned " + std::to_string(got);
    fail(std::string(verb) + " of " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + ": " + why);
}

struct Free {
    void operator()(void* memory) const { std::free(memory); }
};
using Buffer = std::unique_ptr<uint8_t[], Free>;

Buffer make_buffer(size_t bytes) { return Buffer(static_cast<uint8_t*>(std::aligned_alloc(kPage, bytes))); }

void fill(uint8_t* to, uint64_t offset, size_t bytes, uint64_t version) {
    for (size_t at = 0; at < bytes; at += 16) {
        const uint64_t words[2] = {version ? (offset + at) / kSector : 0, version};
        std::memcpy(to + at, words, sizeof words);
    }
}

void compare(const uint8_t* found, uint64_t offset, size_t bytes, uint64_t version) {
    for (size_t at = 0; at < bytes; at += 16) {
        const uint64_t expected[2] = {version ? (offset + at) / kSector : 0, version};
        if (std::memcmp(found + at, expected, sizeof expected) == 0) continue;
        uint64_t words[2];
        std::memcpy(words, found + at, sizeof words);
        fail("wrong data at " + std::to_string(offset + at) + ": sector " + std::to_string(words[0]) + " version " +
             std::to_string(words[1]) + ", expected version " + std::to_string(version));
    }
}

class Disk {
  public:
    Disk(const char* path, int flags) : fd_(::open(path, flags | O_DIRECT | O_CLOEXEC)) {
        if (fd_ < 0) fail(std::string("opening ") + path + ": " + std::strerror(errno));
    }
    ~Disk() { ::close(fd_); }
    Disk(const Disk&) = delete;
    Disk& operator=(const Disk&) = delete;

    int fd() const { return fd_; }
    void read(uint8_t* to, uint64_t offset, size_t bytes) const {
        const ssize_t got = ::pread(fd_, to, bytes, static_cast<off_t>(offset));
        if (got != static_cast<ssize_t>(bytes)) fail_at("reading", offset, bytes, got);
    }
    void write(const uint8_t* from, uint64_t offset, size_t bytes) const {
        const ssize_t got = ::pwrite(fd_, from, bytes, static_cast<off_t>(offset));
        if (got != static_cast<ssize_t>(bytes)) fail_at("writing", offset, bytes, got);
    }
    void flush() const {
        if (::fdatasync(fd_) < 0) fail(std::string("flushing: ") + std::strerror(errno));
    }
    void zero(uint64_t offset, uint64_t bytes) const {
        uint64_t range[2] = {offset, bytes};
        if (::ioctl(fd_, BLKZEROOUT, range) < 0) fail_at("zeroing", offset, bytes, -1);
    }
    void discard(uint64_t offset, uint64_t bytes) const {
        uint64_t range[2] = {offset, bytes};
        if (::ioctl(fd_, BLKDISCARD, range) < 0) fail_at("discarding", offset, bytes, -1);
    }
    void punch(uint64_t offset, uint64_t bytes) const {
        const int done = ::fallocate(fd_, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, static_cast<off_t>(offset),
                                     static_cast<off_t>(bytes));
        if (done < 0) fail_at("punching", offset, bytes, -1);
    }

  private:
    int fd_;
};

/// Requests of this thread go to the queue of this CPU.
void stay_on_cpu(unsigned number) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(number % static_cast<unsigned>(::sysconf(_SC_NPROCESSORS_ONLN)), &set);
    ::sched_setaffinity(0, sizeof set, &set);
}

using Step = void (*)(const Disk& disk, uint8_t* buffer, uint64_t offset, size_t bytes, uint64_t version);

void in_pieces(const char* path, int flags, uint64_t offset, uint64_t bytes, uint64_t version, Step step) {
    const Disk disk(path, flags);
    const Buffer buffer = make_buffer(kPiece);
    for (uint64_t at = 0; at < bytes; at += kPiece) {
        step(disk, buffer.get(), offset + at, std::min<uint64_t>(kPiece, bytes - at), version);
    }
}

/// 64 pages from all over memory in one request, in the wrong order.
void vector(const char* path, uint64_t offset, uint64_t version) {
    constexpr size_t kPages = 64;
    const Disk disk(path, O_RDWR);
    const Buffer memory = make_buffer(2 * kPages * kPage);
    std::vector<iovec> parts;
    for (size_t i = 0; i < kPages; i++) {
        uint8_t* page = memory.get() + (kPages - 1 - i) * 2 * kPage;
        fill(page, offset + i * kPage, kPage, version);
        parts.push_back({page, kPage});
    }
    const auto at = static_cast<off_t>(offset);
    ssize_t done = ::pwritev(disk.fd(), parts.data(), kPages, at);
    if (done != kPages * kPage) fail_at("writing a vector", offset, kPages * kPage, done);
    std::memset(memory.get(), 0, 2 * kPages * kPage);
    done = ::preadv(disk.fd(), parts.data(), kPages, at);
    if (done != kPages * kPage) fail_at("reading a vector", offset, kPages * kPage, done);
    for (size_t i = 0; i < kPages; i++) {
        compare(static_cast<uint8_t*>(parts[i].iov_base), offset + i * kPage, kPage, version);
    }
}

/// One thread's share of `random`.
struct Share {
    const char* path;
    unsigned number;
    uint64_t offset;
    uint64_t seed;
    std::chrono::steady_clock::time_point end;
    std::vector<uint8_t> versions;  // of each block
    uint64_t requests = 0;
};

void check_blocks(const Disk& disk, uint8_t* buffer, const Share& share, size_t first, size_t count) {
    disk.read(buffer, share.offset + first * kBlock, count * kBlock);
    for (size_t i = 0; i < count; i++) {
        compare(buffer + i * kBlock, share.offset + (first + i) * kBlock, kBlock, share.versions[first + i]);
    }
}

void write_blocks(const Disk& disk, uint8_t* buffer, Share& share, size_t first, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint8_t& version = share.versions[first + i];
        version = version == 255 ? 1 : version + 1;
        fill(buffer + i * kBlock, share.offset + (first + i) * kBlock, kBlock, version);
    }
    disk.write(buffer, share.offset + first * kBlock, count * kBlock);
}

void work(Share& share) {
    stay_on_cpu(share.number);
    const Disk disk(share.path, O_RDWR);
    const Buffer buffer = make_buffer(kPiece);
    std::mt19937_64 random(share.seed);
    while (std::chrono::steady_clock::now() < share.end) {
        const size_t first = random() % share.versions.size();
        const size_t longest = std::min(kPiece / kBlock, share.versions.size() - first);
        const size_t count = random() % 4 ? 1 + random() % std::min<size_t>(longest, 4) : 1 + random() % longest;
        const unsigned verb = random() % 32;
        if (verb == 0) {
            disk.flush();
        } else if (verb == 1) {
            disk.zero(share.offset + first * kBlock, count * kBlock);
            std::fill_n(share.versions.begin() + static_cast<ptrdiff_t>(first), count, 0);
        } else if (verb % 2) {
            check_blocks(disk, buffer.get(), share, first, count);
        } else {
            write_blocks(disk, buffer.get(), share, first, count);
        }
        share.requests++;
    }
    for (size_t first = 0; first < share.versions.size(); first += kPiece / kBlock) {
        check_blocks(disk, buffer.get(), share, first, std::min(kPiece / kBlock, share.versions.size() - first));
    }
}

/// Threads read, compare, write, zero and flush until the time is over. What the blocks hold is in `state` before and
/// after; without that file they are zeroes.
void random(const char* path, uint64_t offset, uint64_t bytes, double seconds, unsigned threads, uint64_t seed,
            const char* state) {
    const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(static_cast<int64_t>(seconds * 1000));
    const size_t each = bytes / kBlock / threads;
    std::vector<uint8_t> versions(each * threads);
    std::ifstream(state, std::ios::binary)
        .read(reinterpret_cast<char*>(versions.data()), static_cast<std::streamsize>(versions.size()));
    std::vector<Share> shares;
    for (unsigned i = 0; i < threads; i++) {
        const auto first = versions.begin() + static_cast<ptrdiff_t>(i * each);
        shares.push_back(
            {path, i, offset + i * each * kBlock, seed + i, end, {first, first + static_cast<ptrdiff_t>(each)}});
    }
    std::vector<std::thread> running;
    for (Share& share : shares) running.emplace_back(work, std::ref(share));
    for (auto& thread : running) thread.join();
    std::ofstream out(state, std::ios::binary);
    uint64_t requests = 0;
    for (const Share& share : shares) {
        out.write(reinterpret_cast<const char*>(share.versions.data()), static_cast<std::streamsize>(each));
        requests += share.requests;
    }
    std::printf("%llu requests\n", static_cast<unsigned long long>(requests));
}

int usage() {
    std::puts(
        "usage: disk fill|check DISK OFFSET BYTES VERSION [CPU]\n"
        "       disk zero|discard|punch DISK OFFSET BYTES\n"
        "       disk vector DISK OFFSET VERSION\n"
        "       disk flush DISK\n"
        "       disk random DISK OFFSET BYTES SECONDS THREADS SEED STATE");
    return 2;
}

}  // namespace

int main(int argc, char** argv) {
    const std::string verb = argc > 2 ? argv[1] : "";
    const char* path = argc > 2 ? argv[2] : "";
    const auto number = [&](int index) { return std::strtoull(argv[index], nullptr, 0); };
    if ((verb == "fill" || verb == "check") && argc >= 6) {
        if (argc > 6) stay_on_cpu(static_cast<unsigned>(number(6)));
        const auto fill_piece = [](const Disk& disk, uint8_t* buffer, uint64_t offset, size_t bytes, uint64_t version) {
            fill(buffer, offset, bytes, version);
            disk.write(buffer, offset, bytes);
        };
        const auto check_piece = [](const Disk& disk, uint8_t* buffer, uint64_t offset, size_t bytes,
                                    uint64_t version) {
            disk.read(buffer, offset, bytes);
            compare(buffer, offset, bytes, version);
        };
        const bool fills = verb == "fill";
        in_pieces(path, fills ? O_RDWR : O_RDONLY, number(3), number(4), number(5),
                  fills ? Step(fill_piece) : check_piece);
    } else if (verb == "zero" && argc == 5) {
        Disk(path, O_RDWR).zero(number(3), number(4));
    } else if (verb == "discard" && argc == 5) {
        Disk(path, O_RDWR).discard(number(3), number(4));
    } else if (verb == "punch" && argc == 5) {
        Disk(path, O_RDWR).punch(number(3), number(4));
    } else if (verb == "vector" && argc == 5) {
        vector(path, number(3), number(4));
    } else if (verb == "flush" && argc == 3) {
        Disk(path, O_RDWR).flush();
    } else if (verb == "random" && argc == 9) {
        random(path, number(3), number(4), std::strtod(argv[5], nullptr), static_cast<unsigned>(number(6)), number(7),
               argv[8]);
    } else {
        return usage();
    }
    return 0;
}
