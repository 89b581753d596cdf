// Guest memory: translation, and files that are cut short under us.

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <cstring>
#include <thread>

#include "exports/virtio/call.h"
#include "exports/virtio/dirty_log.h"
#include "exports/virtio/guest_memory.h"
#include "tests/support/virtio_driver.h"

using namespace gantry;
using namespace gantry::virtio;
using gantry::test::Guest;

namespace {

UniqueFd file_of(off_t size) {
    UniqueFd fd(::memfd_create("memory", MFD_CLOEXEC));
    REQUIRE(::ftruncate(fd.get(), size) == 0);
    return fd;
}

/// A region at the beginning of a mapping of its own.
Region region(uint64_t guest, uint64_t size, uint64_t user = 0) {
    const UniqueFd fd = file_of(static_cast<off_t>(size));
    auto mapping = Mapping::create(fd.get(), 0, size);
    REQUIRE(mapping.has_value());
    return {guest, size, user, *mapping, (*mapping)->data()};
}

std::string refused(std::vector<Region> regions) {
    auto memory = GuestMemory::create(std::move(regions));
    return memory ? "" : memory.error().message();
}

/// How a process ends that runs `fn`.
template <class Fn>
int end_of(Fn fn) {
    const pid_t child = ::fork();
    if (child == 0) {
        const rlimit no_core{0, 0};
        ::setrlimit(RLIMIT_CORE, &no_core);
        fn();
        ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, 0);
    return WIFSIGNALED(status) ? WTERMSIG(status) : -WEXITSTATUS(status);
}

}  // namespace

TEST_CASE("guest memory: what can be mapped", "[virtio][memory][once]") {
    const UniqueFd fd = file_of(3 * 4096);
    REQUIRE(::pwrite(fd.get(), "here", 4, 5000) == 4);
    const auto why = [&](uint64_t offset, uint64_t size) {
        auto mapping = Mapping::create(fd.get(), offset, size);
        return mapping ? "" : mapping.error().message();
    };
    CHECK(why(0, 3 * 4096) == "");
    CHECK(why(4096, 2 * 4096) == "");
    CHECK(why(0, 0) == "shared memory of 0 bytes cannot be mapped");
    CHECK(why(1, 3 * 4096) ==
          "the file of shared memory has 12288 bytes, but 12288 at offset 1 were to be mapped; it must be as long as "
          "the memory that it is said to hold");
    CHECK(why(UINT64_MAX - 100, 4096).find("end beyond what a file can have") != std::string::npos);
    CHECK(why(INT64_MAX, 1).find("end beyond what a file can have") != std::string::npos);
    CHECK(why(4096, UINT64_MAX).find("end beyond what a file can have") != std::string::npos);
    auto mapping = Mapping::create(fd.get(), 5000, 4);
    REQUIRE(mapping.has_value());
    CHECK((*mapping)->size() == 4);
    CHECK(std::memcmp((*mapping)->data(), "here", 4) == 0);
    CHECK_FALSE((*mapping)->broken());
    int pipes[2];
    REQUIRE(::pipe2(pipes, O_CLOEXEC) == 0);
    const UniqueFd in(pipes[0]), out(pipes[1]);
    CHECK_FALSE(Mapping::create(in.get(), 0, 4096).has_value());
    CHECK_FALSE(Mapping::create(-1, 0, 4096).has_value());
    // The page size of the file counts: mapped whole.
    const int huge = ::memfd_create("huge", MFD_CLOEXEC | MFD_HUGETLB);
    if (huge >= 0) {
        const UniqueFd owner(huge);
        if (::ftruncate(huge, 4 << 20) == 0) {
            auto part = Mapping::create(huge, (2 << 20) + 4096, 4096);
            // Without huge pages in this machine: mapped (nothing is reserved), but never touched.
            CHECK(part.has_value());
        }
    }
}

TEST_CASE("guest memory: regions that make no sense are refused", "[virtio][memory][once]") {
    CHECK(refused({}) == "");
    CHECK(refused({region(0, 4096), region(4096, 4096)}) == "");
    Region r = region(0x1000, 4096);
    r.size = 0;
    CHECK(refused({r}) == "the memory region at guest address 0x1000 has no bytes");
    r.size = 4097;
    CHECK(refused({r}) == "the memory region at guest address 0x1000 lies outside of what is mapped");
    r.size = 4096;
    r.host += 16;
    CHECK(refused({r}) == "the memory region at guest address 0x1000 lies outside of what is mapped");
    r.host -= 32;
    CHECK(refused({r}) == "the memory region at guest address 0x1000 lies outside of what is mapped");
    CHECK(refused({region(UINT64_MAX - 4095, 4096)}).find("ends beyond 2^64") != std::string::npos);
    CHECK(refused({region(0, 4096, UINT64_MAX - 4095)}).find("ends beyond 2^64") != std::string::npos);
    CHECK(refused({region(0x1008, 4096)}).find("not aligned") != std::string::npos);
    CHECK(refused({region(0x1000, 4096, 0x7f0000000008)}).find("not aligned") != std::string::npos);
    CHECK(refused({region(0x2000, 4096), region(0, 0x2010)}) ==
          "the memory regions at guest addresses 0x0 and 0x2000 overlap");
    CHECK(refused({region(0x1000, 4096), region(0x1000, 4096)}) ==
          "the memory regions at guest addresses 0x1000 and 0x1000 overlap");
    CHECK(refused({region(0, 4096, 0x10000), region(0x5000, 4096, 0x10ff0)}) ==
          "the memory regions at user addresses 0x10000 and 0x10ff0 overlap");
}

TEST_CASE("guest memory: addresses of guest, client and ours", "[virtio][memory][once]") {
    const Guest guest;
    const GuestMemory& memory = *guest.memory();
    const std::byte* const first = memory.regions()[0].host;
    CHECK(memory.at_guest(0x100000, 1) == first);
    CHECK(memory.at_guest(0x100010, (1 << 20) - 16) == first + 16);
    CHECK(memory.at_guest(0x100010, (1 << 20) - 15) == nullptr);
    CHECK(memory.at_guest(0xfffff, 1) == nullptr);
    CHECK(memory.at_guest(0x100000, UINT64_MAX) == nullptr);
    CHECK(memory.at_user(Guest::kUser + 0x100010, 16) == first + 16);
    CHECK(memory.at_user(Guest::kUser + 0x1ffff8, 16) == nullptr);
    CHECK(memory.at_user(0x100000, 16) == nullptr);
    uint64_t address = 0;
    REQUIRE(memory.guest_address(guest.at(0x2fffff), address));
    CHECK(address == 0x2fffff);
    CHECK_FALSE(memory.guest_address(&address, address));

    std::vector<iovec> parts;
    CHECK(memory.translate(Guest::kBorder - 1, 2, parts, 2));
    CHECK_FALSE(memory.translate(Guest::kBorder - 1, 2, parts, 3));
    CHECK_FALSE(memory.translate(0x300000 - 1, 2, parts, 8));
}

TEST_CASE("guest memory: what a table lacks is asked for", "[virtio][memory][once]") {
    struct Source final : MemorySource {
        explicit Source(std::vector<Region> all) : all(std::move(all)) {}
        std::shared_ptr<const GuestMemory> extend(const GuestMemory& known, uint64_t address) override {
            ++asked;
            std::vector<Region> regions(known.regions().begin(), known.regions().end());
            for (const Region& r : all) {
                if (address - r.guest >= r.size) continue;
                regions.push_back(r);
                auto memory = GuestMemory::create(std::move(regions));
                REQUIRE(memory.has_value());
                return *memory;
            }
            return nullptr;
        }
        std::vector<Region> all;
        int asked = 0;
    };
    Source source({region(0x1000, 4096), region(0x2000, 4096), region(0x4000, 4096)});
    auto none = GuestMemory::create({});
    REQUIRE(none.has_value());
    AddressSpace space(*none, &source);
    std::vector<iovec> parts;
    CHECK(space.translate(0x1ff0, 0x20, parts, 8));
    CHECK(source.asked == 2);
    REQUIRE(parts.size() == 2);
    CHECK(parts[0].iov_base == source.all[0].host + 0xff0);
    CHECK(parts[1].iov_base == source.all[1].host);
    CHECK(space.translate(0x1000, 0x2000, parts, 8));
    CHECK(source.asked == 2);
    CHECK_FALSE(space.translate(0x2000, 0x1001, parts, 8));
    CHECK(source.asked == 3);
    parts.clear();
    CHECK(space.translate(0x4000, 0x1000, parts, 8));
    CHECK(space.memory().regions().size() == 3);
    // What no table has.
    AddressSpace alone(*none, nullptr);
    CHECK_FALSE(alone.translate(0x1000, 1, parts, 8));
}

TEST_CASE("guest memory: a file that is cut short reads as zeroes from there on", "[virtio][memory][sigbus][once]") {
    const UniqueFd fd = file_of(16 * 4096), other_fd = file_of(4096);
    auto one = Mapping::create(fd.get(), 0, 16 * 4096);
    auto part = Mapping::create(fd.get(), 8 * 4096, 8 * 4096);
    auto other = Mapping::create(other_fd.get(), 0, 4096);
    REQUIRE((one.has_value() && part.has_value() && other.has_value()));
    std::memset((*one)->data(), 'x', 16 * 4096);
    std::memset((*other)->data(), 'y', 4096);
    REQUIRE(::ftruncate(fd.get(), 4 * 4096) == 0);
    volatile std::byte* const data = (*one)->data();
    CHECK(data[4 * 4096 - 1] == std::byte{'x'});
    CHECK_FALSE((*one)->broken());
    // In a thread that takes no signals but this.
    std::byte found[3];
    std::thread([&] {
        sigset_t all;
        sigfillset(&all);
        sigdelset(&all, SIGBUS);
        pthread_sigmask(SIG_SETMASK, &all, nullptr);
        found[0] = data[6 * 4096 + 77];
        data[7 * 4096] = std::byte{'z'};
        found[1] = data[7 * 4096];
        found[2] = data[15 * 4096 + 4095];
    }).join();
    CHECK(found[0] == std::byte{0});
    CHECK(found[1] == std::byte{'z'});
    CHECK(found[2] == std::byte{0});
    CHECK((*one)->broken());
    CHECK_FALSE((*part)->broken());
    CHECK(data[0] == std::byte{'x'});
    CHECK(data[5 * 4096] == std::byte{0});  // before the first fault
    volatile std::byte* const same = (*part)->data();
    CHECK(same[0] == std::byte{0});
    CHECK((*part)->broken());
    CHECK_FALSE((*other)->broken());
    CHECK((*other)->data()[4095] == std::byte{'y'});
    // The place in the table is used again and begins anew.
    one->reset();
    part->reset();
    auto next = Mapping::create(other_fd.get(), 0, 4096);
    REQUIRE(next.has_value());
    CHECK_FALSE((*next)->broken());
}

TEST_CASE("guest memory: many mappings are watched", "[virtio][memory][sigbus][once]") {
    const UniqueFd whole = file_of(4096), cut = file_of(4096);
    std::vector<std::shared_ptr<Mapping>> mappings;
    for (int i = 0; i < 700; i++) {
        auto mapping = Mapping::create(i % 2 ? whole.get() : cut.get(), 0, 4096);
        REQUIRE(mapping.has_value());
        mappings.push_back(std::move(*mapping));
    }
    for (int i = 0; i < 700; i += 3) mappings[i].reset();
    REQUIRE(::ftruncate(cut.get(), 0) == 0);
    for (int i = 0; i < 700; i++) {
        if (!mappings[i]) continue;
        CHECK(static_cast<volatile std::byte*>(mappings[i]->data())[9] == std::byte{0});
        CHECK(mappings[i]->broken() == (i % 2 == 0));
    }
}

TEST_CASE("guest memory: other faults end the process as before", "[virtio][memory][sigbus][once]") {
    const UniqueFd fd = file_of(4096);
    auto ours = Mapping::create(fd.get(), 0, 4096);  // the handler is installed
    REQUIRE(ours.has_value());
    CHECK(end_of([] {}) == 0);
#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define GANTRY_SANITIZED 1
#endif
#endif
#ifndef GANTRY_SANITIZED  // sanitizers end it in their own way
    CHECK(end_of([] {
              const int foreign = ::memfd_create("foreign", 0);
              void* const at = ::mmap(nullptr, 4096, PROT_READ, MAP_SHARED, foreign, 0);
              [[maybe_unused]] const char c = *static_cast<volatile char*>(at);
          }) == SIGBUS);
    CHECK(end_of([] { ::raise(SIGBUS); }) == SIGBUS);
#endif
}

TEST_CASE("virtio call: an eventfd, and nothing else, is signalled without waiting", "[virtio][call][once]") {
    const UniqueFd event(::eventfd(0, EFD_CLOEXEC)), file = file_of(4096);
    int pipes[2];
    REQUIRE(::pipe2(pipes, O_CLOEXEC) == 0);
    const UniqueFd in(pipes[0]), out(pipes[1]);
    CHECK(is_eventfd(event.get()));
    CHECK_FALSE(is_eventfd(file.get()));
    CHECK_FALSE(is_eventfd(in.get()));
    CHECK_FALSE(is_eventfd(-1));
    EventCall call(UniqueFd(::dup(event.get())));
    // None is lost, however many there are.
    constexpr unsigned kMany = 1000;
    for (unsigned i = 0; i < kMany; ++i) call.signal();
    eventfd_t count = 0;
    REQUIRE(::eventfd_read(event.get(), &count) == 0);
    CHECK(count == kMany);
    // A full one does not hold us up, nor an empty one, though the flags say that they would.
    for (int i = 0; i < 3; ++i) {
        REQUIRE(::fcntl(event.get(), F_SETFL, 0) == 0);
        REQUIRE(::eventfd_write(event.get(), UINT64_MAX - 1) == 0);
        call.signal();
        call.signal();
        REQUIRE(::eventfd_read(event.get(), &count) == 0);
        CHECK(count >= UINT64_MAX - 1);
        CHECK(take_eventfd(event.get()) == 0);
    }
    call.signal();
    CHECK(take_eventfd(event.get()) == 0);
    pollfd look{.fd = event.get(), .events = POLLIN, .revents = 0};
    CHECK(::poll(&look, 1, 0) == 0);
    CHECK(take_eventfd(-1) == -EBADF);
}
