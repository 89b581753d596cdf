// A front end's session: every group of requests, from features to the inflight region.

#include <sys/mman.h>

#include <catch2/catch.hpp>

#include "tests/support/vhost_user_session.h"

using namespace gantry;
using namespace gantry::vhost_user;
using namespace gantry::test;

using Fixture = VhostSessionFixture;

TEST_CASE("vhost-user session: what is offered", "[vhost-user]") {
    Fixture f;
    const auto number = [&](Request request) { return f.front->ask(request).as<uint64_t>(); };
    CHECK(number(Request::kGetFeatures) == (f.device->blk().features() | kLogAll | kHasProtocolFeatures));
    CHECK(number(Request::kGetProtocolFeatures) == kProtocolFeatures);
    CHECK(number(Request::kGetQueueNum) == 64);
    CHECK(number(Request::kGetMaxMemSlots) == 509);
    CHECK(number(Request::kGetStatus) == 0);
    CHECK(f.front->tell(Request::kSetOwner) == true);
}

TEST_CASE("vhost-user session: features that were not offered are refused", "[vhost-user]") {
    Fixture f;
    CHECK(f.front->tell(Request::kSetProtocolFeatures, wire(kProtocolFeatures)) == true);
    CHECK(f.front->tell(Request::kSetProtocolFeatures, wire(uint64_t{1} << 8)) == false);
    CHECK(f.front->tell(Request::kSetStatus, wire(uint64_t{8 | 3})) == true);
    CHECK(f.front->tell(Request::kSetFeatures, wire(f.features(true) | uint64_t{1} << 35)) == false);
    CHECK(f.front->ask(Request::kGetStatus).as<uint64_t>() == 3);
    CHECK(f.front->tell(Request::kSetFeatures, wire(uint64_t{0x244})) == false);  // no VERSION_1
    CHECK(f.front->tell(Request::kSetFeatures, wire(f.features(true) | kLogAll)) == true);
    CHECK(f.front->ask(Request::kGetStatus).as<uint64_t>() == 11);
    CHECK(f.front->tell(Request::kSetStatus, wire(uint64_t{256})) == false);
}

TEST_CASE("vhost-user session: requests that nobody knows", "[vhost-user]") {
    Fixture f;
    f.front->send_raw(VhostFront::message(41, {}, kVersion | kNeedReply));
    const auto answer = f.front->reply();
    REQUIRE(answer);
    CHECK(answer->header.request == 41);
    CHECK(answer->as<uint64_t>() != 0);
    CHECK(f.front->tell(Request::kSetOwner) == true);
    f.front->send_raw(VhostFront::message(41, {}));
    CHECK_THAT(f.cut_off(), Catch::Contains("request 41"));
}

TEST_CASE("vhost-user session: what is refused without a reply ends the connection", "[vhost-user]") {
    Fixture f;
    f.front->send(Request::kSetVringNum, wire(VringState{0, 3000}));
    CHECK(f.cut_off() == "SET_VRING_NUM: ring 0 has 3000 descriptors; from 2 to 1024 are served");
    f.connect();
    f.front->send_raw(wire(Header{1, 2, 0}));
    CHECK_THAT(f.cut_off(), Catch::Contains("version 2"));
    f.connect();
    CHECK(f.front->tell(Request::kSetOwner) == true);
}

TEST_CASE("vhost-user session: messages may be split and joined anywhere", "[vhost-user]") {
    Fixture f;
    Bytes two = VhostFront::message(1, {});
    const Bytes config = VhostFront::message(24, wire(ConfigRange{0, 8, 0}, uint64_t{0}));
    two.insert(two.end(), config.begin(), config.end());
    for (size_t cut = 1; cut < two.size(); ++cut) {
        INFO(cut);
        f.front->send_raw(std::span(two).first(cut));
        f.run(sleep_for(std::chrono::microseconds(50)));
        f.front->send_raw(std::span(two).subspan(cut));
        const auto first = f.front->reply();
        REQUIRE(first);
        CHECK(first->header.request == 1);
        const auto second = f.front->reply();
        REQUIRE(second);
        CHECK(second->as<uint64_t>(sizeof(ConfigRange)) == Fixture::kDisk / 512);
    }
}

TEST_CASE("vhost-user session: more descriptors than a message may have", "[vhost-user]") {
    Fixture f;
    std::vector<UniqueFd> fds;
    std::vector<int> numbers;
    for (int i = 0; i < 12; ++i) {
        fds.push_back(make_eventfd());
        numbers.push_back(fds.back().get());
    }
    f.front->send_raw(VhostFront::message(3, {}), numbers);
    CHECK_THAT(f.cut_off(), Catch::Contains("more than 8 descriptors"));
}

TEST_CASE("vhost-user session: a ring from its start to its end", "[vhost-user]") {
    const bool packed = GENERATE(false, true);
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(packed), 0);
    REQUIRE(f.start(guest, ring) == "");
    const VhostRequest write = submit_request(guest, ring, 1, 8, 4096, 'x');
    CHECK(f.status_of(guest, ring, write) == 0);
    CHECK(f.disk->bytes(4096, 1)[0] == 'x');
    CHECK(f.eventually([&] { return drain_eventfd(ring.call) > 0; }));
    const VhostRequest read = submit_request(guest, ring, 0, 8, 512);
    CHECK(f.status_of(guest, ring, read) == 0);
    CHECK(guest.read(read.data, 512) == std::string(512, 'x'));

    // Two chains of three descriptors: the next one available is the third, or the seventh descriptor.
    const uint32_t base = f.stop(ring);
    CHECK(base == (packed ? 0x80068006U : 2U));
    const VhostRequest late = submit_request(guest, ring, 0, 0, 512);
    CHECK(f.stop(ring) == base);
    CHECK(guest.read(late.status, 1) == "\xff");

    // It goes on where it was, and does what was asked meanwhile without a kick.
    drain_eventfd(ring.kick);
    REQUIRE(f.start(ring, base) == "");
    CHECK(f.status_of(guest, ring, late) == 0);
    CHECK(f.device->made_queue(0)->counters().requests == 3);
    CHECK_FALSE(f.device->made_queue(1));
}

TEST_CASE("vhost-user session: a ring starts whatever comes last", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 3);
    const VhostRequest read = submit_request(guest, ring, 0, 0, 512);
    std::vector<std::function<std::optional<bool>()>> steps{
        [&] { return f.front->tell(Request::kSetFeatures, wire(f.features(false))); },
        [&] { return f.set_memory(guest); },
        [&] { return f.tell_state(Request::kSetVringNum, 3, 64); },
        [&] { return f.front->tell(Request::kSetVringAddr, wire(ring.address())); },
        [&] { return f.tell_fd(Request::kSetVringKick, 3, ring.kick); },
        [&] { return f.tell_state(Request::kSetVringEnable, 3, 1); },
    };
    const size_t last = GENERATE(0, 1, 2, 3, 4, 5);
    for (size_t i = 0; i < steps.size(); ++i) {
        if (i != last) REQUIRE(steps[i]() == true);
    }
    CHECK(ring.driver->reap().empty());
    REQUIRE(steps[last]() == true);
    CHECK(f.status_of(guest, ring, read) == 0);
}

TEST_CASE("vhost-user session: rings are enabled at first without protocol features, and not with them",
          "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    const bool with = GENERATE(false, true);
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false) & ~(with ? 0 : kHasProtocolFeatures))) == true);
    REQUIRE(f.set_memory(guest) == true);
    const VhostRequest read = submit_request(guest, ring, 0, 0, 512);
    REQUIRE(f.tell_state(Request::kSetVringNum, 0, 64) == true);
    REQUIRE(f.front->tell(Request::kSetVringAddr, wire(ring.address())) == true);
    REQUIRE(f.tell_fd(Request::kSetVringKick, 0, ring.kick) == true);
    if (with) {
        CHECK(f.stop(ring) == 0);
        CHECK(ring.driver->reap().empty());
        REQUIRE(f.tell_state(Request::kSetVringEnable, 0, 1) == true);
        REQUIRE(f.tell_fd(Request::kSetVringKick, 0, ring.kick) == true);
    }
    CHECK(f.status_of(guest, ring, read) == 0);
    REQUIRE(f.tell_state(Request::kSetVringEnable, 0, 0) == true);
    submit_request(guest, ring, 0, 0, 512);
    CHECK(f.stop(ring) == 1);
    CHECK(f.tell_state(Request::kSetVringEnable, 0, 2) == false);
}

TEST_CASE("vhost-user session: a ring without a kick is looked at all the time", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    REQUIRE(f.front->tell(Request::kSetVringKick, wire(kNoDescriptor)) == true);
    ring.kick = make_eventfd();
    const VhostRequest read = submit_request(guest, ring, 0, 0, 512);
    CHECK(f.status_of(guest, ring, read) == 0);
}

TEST_CASE("vhost-user session: rings that make no sense are refused", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    REQUIRE(f.set_memory(guest) == true);
    CHECK(f.tell_state(Request::kSetVringNum, 64, 64) == false);
    CHECK(f.tell_state(Request::kSetVringNum, UINT32_MAX, 64) == false);
    CHECK(f.tell_state(Request::kSetVringNum, 0, 1) == false);
    CHECK(f.tell_state(Request::kSetVringNum, 0, 1025) == false);
    CHECK(f.tell_fd(Request::kSetVringKick, 64, ring.kick) == false);
    CHECK(f.front->tell(Request::kSetVringAddr, wire(VringAddress{.index = 99})) == false);
    const UniqueFd null(::open("/dev/null", O_RDWR | O_CLOEXEC));
    CHECK(f.tell_fd(Request::kSetVringKick, 0, null) == false);
    CHECK(f.tell_fd(Request::kSetVringCall, 0, null) == false);
    CHECK(f.tell_fd(Request::kSetVringErr, 0, null) == false);

    const auto starts = [&](VringAddress address, uint32_t size) {
        Fixture fresh;
        REQUIRE(fresh.front->tell(Request::kSetFeatures, wire(fresh.features(false))) == true);
        REQUIRE(fresh.set_memory(guest) == true);
        REQUIRE(fresh.tell_state(Request::kSetVringNum, 0, size) == true);
        REQUIRE(fresh.front->tell(Request::kSetVringAddr, wire(address)) == true);
        return fresh.tell_fd(Request::kSetVringKick, 0, ring.kick);
    };
    CHECK(starts(ring.address(), 64) == true);
    CHECK(starts(ring.address(), 63) == false);
    VringAddress address = ring.address();
    address.descriptors = 0;
    CHECK(starts(address, 64) == false);
    address = ring.address();
    address.used += 1;
    CHECK(starts(address, 64) == false);
    address = ring.address();
    address.available = UINT64_MAX - 1;
    CHECK(starts(address, 64) == false);
    address = ring.address();
    address.descriptors = guest.parts()[2].guest + guest.parts()[2].size - 16 + Guest::kUser;
    CHECK(starts(address, 64) == false);
}

TEST_CASE("vhost-user session: what cannot change while a ring runs", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    CHECK(f.tell_state(Request::kSetVringNum, 0, 32) == false);
    CHECK(f.tell_state(Request::kSetVringBase, 0, 5) == false);
    VringAddress elsewhere = ring.address();
    elsewhere.used += 64;
    CHECK(f.front->tell(Request::kSetVringAddr, wire(elsewhere)) == false);
    CHECK(f.front->tell(Request::kSetVringAddr, wire(ring.address())) == true);
    CHECK(f.front->tell(Request::kSetFeatures, wire(f.features(false) & ~virtio::kRingEventIdx)) == false);
    CHECK(f.front->tell(Request::kSetFeatures, wire(f.features(false) | kLogAll)) == true);
    // Another descriptor for calls is told at once: a signal may have been lost between the two.
    ring.call = make_eventfd();
    CHECK(f.tell_fd(Request::kSetVringCall, 0, ring.call) == true);
    CHECK(drain_eventfd(ring.call) > 0);
    CHECK(f.front->tell(Request::kSetVringCall, wire(kNoDescriptor)) == true);
    CHECK(f.status_of(guest, ring, submit_request(guest, ring, 0, 0, 512)) == 0);
}

TEST_CASE("vhost-user session: memory comes and goes while rings run", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(GENERATE(false, true)), 0);
    REQUIRE(f.start(guest, ring) == "");
    const auto works = [&] { return f.status_of(guest, ring, submit_request(guest, ring, 0, 0, 512)) == 0; };
    CHECK(works());
    REQUIRE(f.set_memory(guest, {2}) == true);
    CHECK(works());
    REQUIRE(f.front->tell(Request::kAddMemReg, wire(SingleRegion{0, f.region(guest, 0)}), {guest.fd(0)}) == true);
    CHECK(works());
    // The same once more overlaps.
    CHECK(f.front->tell(Request::kAddMemReg, wire(SingleRegion{0, f.region(guest, 0)}), {guest.fd(0)}) == false);
    CHECK(f.front->tell(Request::kRemMemReg, wire(SingleRegion{0, f.region(guest, 1)})) == false);
    CHECK(f.front->tell(Request::kRemMemReg, wire(SingleRegion{0, f.region(guest, 0)}), {guest.fd(0)}) == true);
    CHECK(works());
    // A file that is shorter than it is said to be.
    MemoryRegion longer = f.region(guest, 0);
    longer.size += 4096;
    CHECK(f.front->tell(Request::kAddMemReg, wire(SingleRegion{0, longer}), {guest.fd(0)}) == false);
    CHECK(works());

    // Where the ring was is nothing any more.
    REQUIRE(f.front->tell(Request::kRemMemReg, wire(SingleRegion{0, f.region(guest, 2)})) == true);
    CHECK(f.eventually([&] { return drain_eventfd(ring.error) > 0; }));
    CHECK_THAT(f.device->fault(0), Catch::Contains("in no memory region"));
    CHECK((f.front->ask(Request::kGetStatus).as<uint64_t>() & 64) != 0);
    f.stop(ring);
    CHECK((f.front->ask(Request::kGetStatus).as<uint64_t>() & 64) == 0);
    REQUIRE(f.set_memory(guest) == true);
}

TEST_CASE("vhost-user session: a hostile ring is reported, and the next front end has a new one", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    const uint16_t far = 900;
    guest.write(ring.driver->driver_area() + 2, wire(far));
    kick_eventfd(ring.kick);
    CHECK(f.eventually([&] { return drain_eventfd(ring.error) > 0; }));
    CHECK(f.device->fault(0) != "");
    const json::object details = f.session->details();
    CHECK(details.at("queues").as_array().at(0).as_object().contains("broken"));

    f.connect();
    Guest other;
    VhostRing good(other, Fixture::shape(false), 0);
    REQUIRE(f.start(other, good) == "");
    CHECK(f.status_of(other, good, submit_request(other, good, 0, 0, 512)) == 0);
    CHECK(f.device->fault(0) == "");
}

TEST_CASE("vhost-user session: the configuration space", "[vhost-user]") {
    Fixture f;
    const auto get = [&](uint32_t offset, uint32_t size) {
        Bytes payload = wire(ConfigRange{offset, size, 0});
        payload.resize(payload.size() + size);
        return f.front->ask(Request::kGetConfig, payload).payload;
    };
    const Bytes all = get(0, 256);
    REQUIRE(all.size() == sizeof(ConfigRange) + 256);
    const auto config = f.device->blk().config();
    CHECK(std::memcmp(all.data() + sizeof(ConfigRange), config.data(), config.size()) == 0);
    CHECK(get(255, 1).size() == sizeof(ConfigRange) + 1);
    CHECK(get(200, 57).empty());
    f.front->send(Request::kGetConfig, wire(ConfigRange{UINT32_MAX, 60, 0}, uint64_t{0}));
    CHECK(f.front->reply()->payload.empty());
    f.front->send(Request::kGetConfig, wire(ConfigRange{0, 60, 0}));  // no room for it
    CHECK(f.front->reply()->payload.empty());

    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{0})) == true);
    CHECK_FALSE(f.device->blk().write_cache());
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{2})) == false);
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{0, 8, 0}, uint64_t{1})) == false);
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 7}, uint8_t{1})) == false);
}

TEST_CASE("vhost-user session: what was answered before the write cache is off is stable afterwards", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    const VhostRequest write = submit_request(guest, ring, 1, 8, 4096, 'x');
    CHECK(f.status_of(guest, ring, write) == 0);
    const auto flushes = [&] { return f.disk->count(test::MemoryDisk::Op::kFlush); };
    CHECK(flushes() == 0);
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{0})) == true);
    CHECK(flushes() == 1);
    // Off already, and on again.
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{0})) == true);
    CHECK(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{1})) == true);
    CHECK(flushes() == 1);
    const VhostRequest read = submit_request(guest, ring, 0, 8, 512);
    CHECK(f.status_of(guest, ring, read) == 0);
    f.stop(ring);
}

TEST_CASE("vhost-user session: a write cache that was switched off stays so until the driver begins anew",
          "[vhost-user]") {
    Fixture f;
    const auto switch_off = [&] {
        REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
        REQUIRE(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{0})) == true);
    };
    switch_off();
    f.connect();
    CHECK(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    CHECK_FALSE(f.device->blk().write_cache());
    // A machine that is paused, or a driver that looks at the configuration anyway.
    REQUIRE(f.front->tell(Request::kSetStatus, wire(uint64_t{0})) == true);
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    CHECK_FALSE(f.device->blk().write_cache());
    SECTION("a reset") { REQUIRE(f.front->tell(Request::kResetDevice) == true); }
    SECTION("a fresh inflight region") {
        CHECK(f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 1, 64, 0})).fd);
    }
    CHECK(f.device->blk().write_cache());
    switch_off();
    CHECK(f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 1, 64, 0})).fd);
    CHECK_FALSE(f.device->blk().write_cache());
}

TEST_CASE("vhost-user session: a write cache that was switched off stays so over a restart", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    const auto region = f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 1, 64, 0}));
    const auto area = region.as<InflightArea>();
    const auto restart = [&] {
        f.end();
        f.run(f.make_device({.serial = "serial", .writable = true}));
        f.connect();
        CHECK(f.device->blk().write_cache());
    };
    const bool off = GENERATE(false, true);
    REQUIRE(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{0})) == true);
    if (!off) REQUIRE(f.front->tell(Request::kSetConfig, wire(ConfigRange{32, 1, 0}, uint8_t{1})) == true);
    restart();
    // In either order.
    const bool features_first = GENERATE(false, true);
    if (features_first) REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    REQUIRE(f.front->tell(Request::kSetInflightFd, wire(area), {region.fd.get()}) == true);
    if (!features_first) REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    CHECK(f.device->blk().write_cache() == !off);
    REQUIRE(f.front->tell(Request::kResetDevice) == true);
    CHECK(f.device->blk().write_cache());
    restart();
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    REQUIRE(f.front->tell(Request::kSetInflightFd, wire(area), {region.fd.get()}) == true);
    CHECK(f.device->blk().write_cache());
}

TEST_CASE("vhost-user session: the front end is told of a new size", "[vhost-user]") {
    Fixture f;
    auto [ours, theirs] = make_sockets();
    const UniqueFd file(::open("/dev/null", O_RDWR | O_CLOEXEC));
    CHECK(f.front->tell(Request::kSetBackendReqFd, {}, {file.get()}) == false);
    REQUIRE(f.front->tell(Request::kSetBackendReqFd, {}, {theirs.get()}) == true);
    theirs.reset();
    f.device->blk().set_size(2 * Fixture::kDisk);
    f.session->config_changed();
    Header notice;
    REQUIRE(::read(ours.get(), &notice, sizeof notice) == sizeof notice);
    CHECK(notice.request == kConfigChange);
    CHECK(notice.flags == kVersion);
    CHECK(notice.size == 0);
    // One that reads nothing is not waited for, and one that has closed it is not asked again.
    for (int i = 0; i < 5000; ++i) f.session->config_changed();
    ours.reset();
    f.session->config_changed();
    f.session->config_changed();
    CHECK(f.front->tell(Request::kSetOwner) == true);
}

TEST_CASE("vhost-user session: a reset stops rings and forgets them, not the memory", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    CHECK(f.status_of(guest, ring, submit_request(guest, ring, 0, 0, 512)) == 0);
    SECTION("RESET_DEVICE") { REQUIRE(f.front->tell(Request::kResetDevice) == true); }
    SECTION("SET_STATUS") { REQUIRE(f.front->tell(Request::kSetStatus, wire(uint64_t{0})) == true); }
    CHECK_FALSE(f.device->made_queue(0)->started());
    CHECK(f.stop(ring) == 1);  // qemu asks afterwards
    VhostRing fresh(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(fresh, 0) == "");
    CHECK(f.status_of(guest, fresh, submit_request(guest, fresh, 0, 0, 512)) == 0);
}

TEST_CASE("vhost-user session: a ring that begins anew after a reset does not go on where its inflight region says",
          "[vhost-user]") {
    const bool packed = GENERATE(false, true);
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(packed), 0);
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(packed))) == true);
    const auto region = f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 1, 64, 0}));
    const auto area = region.as<InflightArea>();
    REQUIRE(f.set_memory(guest) == true);
    REQUIRE(f.start(ring, ring.driver->first_base()) == "");
    CHECK(f.status_of(guest, ring, submit_request(guest, ring, 0, 0, 512)) == 0);
    SECTION("RESET_DEVICE") { REQUIRE(f.front->tell(Request::kResetDevice) == true); }
    SECTION("SET_STATUS") { REQUIRE(f.front->tell(Request::kSetStatus, wire(uint64_t{0})) == true); }
    SECTION("RESET_DEVICE in the middle of a request") {
        // Without a place for its status: taken, and never answered.
        const uint64_t header = guest.alloc(16);
        const Piece lone{header, 16, false};
        REQUIRE(ring.driver->add(std::span(&lone, 1)));
        ring.driver->kick();
        kick_eventfd(ring.kick);
        REQUIRE(f.eventually([&] { return !f.device->fault(0).empty(); }));
        REQUIRE(f.front->tell(Request::kResetDevice) == true);
    }
    REQUIRE(f.front->tell(Request::kSetInflightFd, wire(area), {region.fd.get()}) == true);
    VhostRing fresh(guest, Fixture::shape(packed), 0);
    REQUIRE(f.start(fresh, fresh.driver->first_base()) == "");
    CHECK(f.status_of(guest, fresh, submit_request(guest, fresh, 0, 0, 512)) == 0);
}

TEST_CASE("vhost-user session: the driver is told when a ring starts, lest it waits for a process that was killed",
          "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    const uint32_t base = f.stop(ring);
    REQUIRE(f.front->tell(Request::kSetVringCall, wire(uint64_t{0}), {ring.call.get()}) == true);
    drain_eventfd(ring.call);
    REQUIRE(f.tell_state(Request::kSetVringBase, 0, base) == true);
    REQUIRE(f.front->tell(Request::kSetVringKick, wire(uint64_t{0}), {ring.kick.get()}) == true);
    CHECK(f.device->made_queue(0)->started());
    CHECK(drain_eventfd(ring.call) > 0);
}

TEST_CASE("vhost-user session: the deprecated reset of the owner disables rings", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    REQUIRE(f.front->tell(Request::kResetOwner) == true);
    submit_request(guest, ring, 0, 0, 512);
    CHECK(f.stop(ring) == 0);
}

TEST_CASE("vhost-user session: requests of a front end that goes away are finished first", "[vhost-user]") {
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(false), 0);
    REQUIRE(f.start(guest, ring) == "");
    f.disk->close_gate();
    const VhostRequest write = submit_request(guest, ring, 1, 0, 512, 'y');
    REQUIRE(f.eventually([&] { return f.disk->at_gate() == 1; }));
    f.front->close();
    REQUIRE(f.eventually([&] { return f.session->leaving(); }));
    CHECK(f.session);
    f.disk->open_gate();
    f.run(f.scope.join());
    CHECK_FALSE(f.session);
    CHECK(f.violation == "");
    CHECK(guest.read(write.status, 1) == std::string(1, '\0'));
    CHECK(f.disk->bytes(0, 1)[0] == 'y');
}

TEST_CASE("vhost-user session: the inflight region", "[vhost-user]") {
    Fixture f;
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(false))) == true);
    const auto made = f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 2, 64, 0}));
    REQUIRE(made.payload.size() == 24);
    const auto area = made.as<InflightArea>();
    CHECK(area.size > 0);
    CHECK(area.offset == 0);
    CHECK(area.queues == 2);
    CHECK(area.queue_size == 64);
    REQUIRE(made.fd);
    // As long as the request was.
    const auto short_one =
        f.front->ask(Request::kGetInflightFd, wire(uint64_t{0}, uint64_t{0}, uint16_t{1}, uint16_t{64}));
    CHECK(short_one.payload.size() == 20);
    CHECK(f.front->tell(Request::kSetInflightFd, wire(area), {made.fd.get()}) == true);

    // No region is a size of 0.
    CHECK(f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 65, 64, 0})).as<InflightArea>().size == 0);
    CHECK(f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 0, 64, 0})).as<InflightArea>().size == 0);
    CHECK(f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 1, 9999, 0})).as<InflightArea>().size == 0);
    InflightArea wrong = area;
    wrong.queues = 63;
    CHECK(f.front->tell(Request::kSetInflightFd, wire(wrong), {made.fd.get()}) == false);
    wrong = area;
    wrong.offset = UINT64_MAX - 7;
    CHECK(f.front->tell(Request::kSetInflightFd, wire(wrong), {made.fd.get()}) == false);
}

namespace {

/// Another file with the same bytes.
UniqueFd copy_of(int fd, uint64_t size) {
    UniqueFd copy(::memfd_create("copy", MFD_CLOEXEC));
    std::vector<char> bytes(size);
    if (::pread(fd, bytes.data(), size, 0) != static_cast<ssize_t>(size) ||
        ::pwrite(copy.get(), bytes.data(), size, 0) != static_cast<ssize_t>(size))
        throw std::runtime_error("cannot copy a memory file");
    return copy;
}

}  // namespace

TEST_CASE("vhost-user session: what a killed process has not answered, the next one does", "[vhost-user]") {
    const bool packed = GENERATE(false, true);
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(packed), 0);
    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(packed))) == true);
    auto region = f.front->ask(Request::kGetInflightFd, wire(InflightArea{0, 0, 1, 64, 0}));
    const auto area = region.as<InflightArea>();
    REQUIRE(f.front->tell(Request::kSetInflightFd, wire(area), {region.fd.get()}) == true);
    REQUIRE(f.set_memory(guest) == true);
    REQUIRE(f.start(ring, ring.driver->first_base()) == "");
    CHECK(f.status_of(guest, ring, submit_request(guest, ring, 1, 0, 512, 'a')) == 0);
    f.disk->close_gate();
    const VhostRequest one = submit_request(guest, ring, 1, 1, 512, 'b');
    const VhostRequest two = submit_request(guest, ring, 1, 2, 512, 'c');
    REQUIRE(f.eventually([&] { return f.disk->at_gate() == 2; }));

    // As it would be found after kill -9: memory and region of this moment.
    Guest left(guest);
    VhostRing again(left, Fixture::shape(packed), 0);
    again.driver = ring.driver->clone(left);
    region.fd = copy_of(region.fd.get(), area.size);
    f.disk->open_gate();
    f.connect();
    f.disk->write(512, std::string(1024, '?').data(), 1024);
    const uint64_t before = f.disk->count(MemoryDisk::Op::kWrite);

    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(packed))) == true);
    REQUIRE(f.front->tell(Request::kSetInflightFd, wire(area), {region.fd.get()}) == true);
    REQUIRE(f.set_memory(left) == true);
    // What a front end says that has heard nothing of the end is not what holds.
    REQUIRE(f.start(again, again.driver->first_base()) == "");
    CHECK(f.eventually([&] {
        again.driver->reap();
        return again.driver->outstanding() == 0;
    }));
    CHECK(left.read(one.status, 1) == std::string(1, '\0'));
    CHECK(left.read(two.status, 1) == std::string(1, '\0'));
    CHECK(f.disk->bytes(512, 1)[0] == 'b');
    CHECK(f.disk->bytes(1024, 1)[0] == 'c');
    CHECK(f.disk->count(MemoryDisk::Op::kWrite) == before + 2);
    CHECK(f.status_of(left, again, submit_request(left, again, 1, 3, 512, 'd')) == 0);
    CHECK(f.tell_state(Request::kSetVringEnable, 0, 1) == true);
    CHECK(f.front->tell(Request::kSetInflightFd, wire(area), {region.fd.get()}) == false);  // it runs
}

TEST_CASE("vhost-user session: written pages are marked while that is asked for", "[vhost-user]") {
    const bool packed = GENERATE(false, true);
    Fixture f;
    Guest guest;
    VhostRing ring(guest, Fixture::shape(packed), 0);
    guest.alloc(4096, 4096);  // what comes afterwards is on other pages
    REQUIRE(f.start(guest, ring) == "");
    const uint64_t size = ((uint64_t{1} << 32) + (1 << 20)) / 4096 / 8;
    const UniqueFd log(::memfd_create("log", MFD_CLOEXEC));
    REQUIRE(::ftruncate(log.get(), static_cast<off_t>(size)) == 0);
    const auto marked = [&](uint64_t address) {
        const uint64_t page = address / 4096;
        uint8_t byte = 0;
        REQUIRE(::pread(log.get(), &byte, 1, static_cast<off_t>(page / 8)) == 1);
        return (byte >> page % 8 & 1) != 0;
    };
    CHECK(f.front->tell(Request::kSetLogBase, wire(LogArea{size + 1, 0}), {log.get()}) == false);
    REQUIRE(f.front->tell(Request::kSetLogBase, wire(LogArea{size, 0}), {log.get()}) == true);
    guest.alloc(4096, 4096);
    const VhostRequest unseen = submit_request(guest, ring, 0, 0, 512);
    CHECK(f.status_of(guest, ring, unseen) == 0);
    CHECK_FALSE(marked(unseen.data));

    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(packed) | kLogAll)) == true);
    REQUIRE(f.front->tell(Request::kSetVringAddr, wire(ring.address(kLogRing, ring.driver->device_area()))) == true);
    guest.alloc(4096, 4096);
    const VhostRequest read = submit_request(guest, ring, 0, 0, 512);
    CHECK(f.status_of(guest, ring, read) == 0);
    CHECK(marked(read.data));
    // Of a packed ring the descriptors are written, whatever the front end names (qemu: the device area).
    CHECK(marked(packed ? ring.driver->descriptors() : ring.driver->device_area()));

    REQUIRE(f.front->tell(Request::kSetFeatures, wire(f.features(packed))) == true);
    guest.alloc(4096, 4096);
    const VhostRequest after = submit_request(guest, ring, 0, 0, 512);
    CHECK(f.status_of(guest, ring, after) == 0);
    CHECK_FALSE(marked(after.data));
}
