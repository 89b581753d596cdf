#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/stat.h>

#include <catch2/catch.hpp>
#include <cstring>

#include "runtime/buffer.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

namespace gantry {
namespace {

using test::TempDir;
using test::TestRuntime;

UniqueFd open_new(const std::string& path) {
    return UniqueFd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600));
}

// One awaited operation each, because a test body is no coroutine.
Task<int> readv(int fd, IoVec iov, uint64_t offset, int flags = 0) {
    const int n = co_await io_readv(fd, iov, offset, flags);
    co_return n;
}
Task<int> writev(int fd, IoVec iov, uint64_t offset) {
    const int n = co_await io_writev(fd, iov, offset);
    co_return n;
}
Task<int> poll(int fd, uint32_t events) {
    const int n = co_await io_poll(fd, events);
    co_return n;
}

TEST_CASE("file io: what is written is read, at the end a read is short", "[runtime][io]") {
    TestRuntime rt;
    TempDir dir;
    const UniqueFd fd = open_new(dir.file("a"));
    std::string text = "a crane lifts blocks";
    const iovec out{text.data(), text.size()};
    CHECK(rt.run(writev(fd.get(), IoVec(out), 100)) == 20);
    char back[64] = {};
    const iovec in{back, sizeof back};
    CHECK(rt.run(readv(fd.get(), IoVec(in), 102)) == 18);
    CHECK(std::string(back) == "crane lifts blocks");
    CHECK(rt.run(readv(fd.get(), IoVec(in), 120)) == 0);
    CHECK(rt.run(readv(fd.get(), IoVec(in), 1 << 20)) == 0);
}

TEST_CASE("file io: many ranges in one call, more than the kernel takes make a short transfer", "[runtime][io]") {
    TestRuntime rt;
    TempDir dir;
    const UniqueFd fd = open_new(dir.file("a"));
    std::vector<uint8_t> memory(3000);
    for (size_t i = 0; i < memory.size(); ++i) memory[i] = static_cast<uint8_t>(i % 251);
    std::vector<iovec> pieces;
    for (uint8_t& byte : memory) pieces.push_back({&byte, 1});
    CHECK(rt.run(writev(fd.get(), IoVec(pieces.data(), 1000, 1000), 0)) == 1000);
    CHECK(rt.run(writev(fd.get(), IoVec(pieces.data(), 3000, 3000), 0)) == 1024);
    std::vector<uint8_t> back(1024);
    const iovec in{back.data(), back.size()};
    CHECK(rt.run(readv(fd.get(), IoVec(in), 0)) == 1024);
    CHECK(std::memcmp(back.data(), memory.data(), 1024) == 0);
}

TEST_CASE("file io: errors come back as -errno", "[runtime][io]") {
    TestRuntime rt;
    TempDir dir;
    {
        const UniqueFd fd = open_new(dir.file("a"));
    }
    char byte = 0;
    const iovec one{&byte, 1};
    const UniqueFd read_only(::open(dir.file("a").c_str(), O_RDONLY | O_CLOEXEC));
    CHECK(rt.run(writev(read_only.get(), IoVec(one), 0)) == -EBADF);
    CHECK(rt.run(readv(9999, IoVec(one), 0)) == -EBADF);
    const UniqueFd directory(::open(dir.path().c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    CHECK(rt.run(readv(directory.get(), IoVec(one), 0)) == -EISDIR);
}

Task<std::vector<int>> sync_and_allocate(int fd) {
    std::vector<int> results;
    results.push_back(co_await io_fallocate(fd, 0, 0, 1 << 20));
    results.push_back(co_await io_fsync(fd));
    results.push_back(co_await io_fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 4096, 8192));
    results.push_back(co_await io_fdatasync(fd));
    results.push_back(co_await io_fsync(9999));
    co_return results;
}

TEST_CASE("file io: allocation and flushes", "[runtime][io]") {
    TestRuntime rt;
    TempDir dir;
    const UniqueFd fd = open_new(dir.file("a"));
    CHECK(rt.run(sync_and_allocate(fd.get())) == std::vector<int>{0, 0, 0, 0, -EBADF});
    struct stat st;
    REQUIRE(::fstat(fd.get(), &st) == 0);
    CHECK(st.st_size == 1 << 20);
}

Task<void> write_block(int fd, uint64_t block, int* bad) {
    Buffer b = Buffer::alloc(4096);
    std::memset(b.data(), static_cast<int>(block % 255) + 1, b.size());
    const iovec v = b.iov();
    const int n = co_await io_writev(fd, IoVec(v), block * 4096);
    if (n != 4096) ++*bad;
}
Task<void> check_block(int fd, uint64_t block, int* bad) {
    Buffer b = Buffer::alloc(4096);
    const iovec v = b.iov();
    const int n = co_await io_readv(fd, IoVec(v), block * 4096);
    if (n != 4096 || b.data()[0] != block % 255 + 1 || b.data()[4095] != block % 255 + 1) ++*bad;
}
Task<int> write_and_check_all(int fd, uint64_t blocks) {
    int bad = 0;
    TaskScope scope;
    for (uint64_t i = 0; i < blocks; ++i) scope.spawn(write_block(fd, i, &bad));
    co_await scope.join();
    for (uint64_t i = 0; i < blocks; ++i) scope.spawn(check_block(fd, i, &bad));
    co_await scope.join();
    co_return bad;
}

TEST_CASE("file io: more operations at once than any queue holds", "[runtime][io][stress]") {
    TestRuntime rt;
    TempDir dir;
    const UniqueFd fd = open_new(dir.file("a"));
    CHECK(rt.run(write_and_check_all(fd.get(), 6000)) == 0);
    CHECK(rt.run_on_io(write_and_check_all(fd.get(), 500)) == 0);
}

TEST_CASE("poll: a regular file is always ready", "[runtime][io][poll]") {
    TestRuntime rt;
    TempDir dir;
    const UniqueFd fd = open_new(dir.file("a"));
    CHECK((rt.run(poll(fd.get(), POLLIN)) & POLLIN) != 0);
    CHECK((rt.run(poll(fd.get(), POLLOUT)) & POLLOUT) != 0);
    CHECK(rt.run(poll(9999, POLLIN)) == -EBADF);
}

Task<void> wait_for_event(int fd, int* result) {
    *result = co_await io_poll(fd, POLLIN);
    uint64_t n = 0;
    if (::read(fd, &n, sizeof n) != sizeof n) *result = -1000;
}
Task<int> eventfd_rounds(int fd, int rounds) {
    for (int i = 0; i < rounds; ++i) {
        int result = 0;
        TaskScope scope;
        scope.spawn(wait_for_event(fd, &result));
        co_await yield_turn();
        if (result != 0) co_return -1;
        const uint64_t one = 1;
        if (::write(fd, &one, sizeof one) != sizeof one) co_return -2;
        co_await scope.join();
        if (result != POLLIN) co_return -3;
    }
    co_return rounds;
}

TEST_CASE("poll: waits for an eventfd again and again", "[runtime][io][poll]") {
    TestRuntime rt;
    const UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    CHECK(rt.run(eventfd_rounds(fd.get(), 200)) == 200);
}

Task<int> poll_reused_number() {
    int number = -1;
    for (int i = 0; i < 50; ++i) {
        UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
        if (number >= 0 && fd.get() != number) co_return -1;  // the point is that the number comes back
        number = fd.get();
        const int r = co_await eventfd_rounds(fd.get(), 2);
        if (r != 2) co_return -2;
        if (i % 2) Loop::current().forget_fd(fd.get());  // told or not, the next descriptor of this number works
    }
    co_return 1;
}

TEST_CASE("poll: a descriptor number that is used again is a new descriptor", "[runtime][io][poll]") {
    TestRuntime rt;
    CHECK(rt.run(poll_reused_number()) == 1);
}

Task<void> cancelled_poll(int fd, CancellableIo** slot, int* result) {
    CancellableIo io(io_poll(fd, POLLIN));
    *slot = &io;
    *result = co_await io;
    io.cancel();  // after completion: nothing
}
Task<int> cancel_poll(int fd, int turns_between) {
    CancellableIo* io = nullptr;
    int result = 1;
    TaskScope scope;
    scope.spawn(cancelled_poll(fd, &io, &result));
    for (int i = 0; i < turns_between; ++i) co_await sleep_for(std::chrono::microseconds(50));
    io->cancel();
    io->cancel();
    co_await scope.join();
    co_return result;
}

TEST_CASE("poll: can be cancelled, before and after it reached the kernel", "[runtime][io][cancel]") {
    TestRuntime rt;
    const UniqueFd fd(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    for (const int turns : {0, 1, 3}) CHECK(rt.run(cancel_poll(fd.get(), turns)) == -ECANCELED);
    CHECK(rt.run(eventfd_rounds(fd.get(), 3)) == 3);
}

}  // namespace
}  // namespace gantry
