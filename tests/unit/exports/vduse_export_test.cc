// VduseExport over a kernel of the test's own: its life, its driver's requests, and what goes wrong.

#include <catch2/catch.hpp>
#include <cstring>
#include <random>
#include <thread>

#include "schema/schema.h"
#include "schema/validate.h"
#include "tests/support/vduse_disk.h"

using namespace gantry;
using namespace gantry::test;
using namespace std::chrono_literals;
using exports::RemoveMode;
using virtio::BlkType;

namespace {

constexpr uint8_t kOk = 0;

uint64_t capacity(VduseKernel& kernel) {
    uint64_t sectors;
    std::memcpy(&sectors, kernel.config().data(), sizeof sectors);
    return sectors;
}

/// Random reads and writes, many in flight on each queue, against a copy of the disk.
void exercise(VduseFixture& f, VduseDisk& disk, unsigned requests, uint32_t seed) {
    std::mt19937 random(seed);
    constexpr uint64_t kBlocks = VduseFixture::kBytes / VduseDisk::kData;
    const uint32_t queues = disk.shape().queues;
    std::vector<std::vector<std::pair<uint64_t, uint8_t>>> under_way(queues);
    std::vector<uint8_t> shadow = f.memory->contents();
    std::vector<bool> busy(kBlocks);
    unsigned submitted = 0, done = 0;
    const auto step = [&] {
        for (uint32_t q = 0; q < queues; ++q) {
            while (submitted < requests) {
                const uint64_t block = random() % kBlocks;
                if (busy[block]) break;
                const bool write = random() % 2;
                const auto fill = static_cast<uint8_t>(random());
                const auto slot = disk.submit(q, write ? BlkType::kOut : BlkType::kIn, block * 8, fill);
                if (!slot) break;
                ++submitted;
                busy[block] = true;
                if (write) std::memset(shadow.data() + block * VduseDisk::kData, fill, VduseDisk::kData);
            }
            for (const auto& answer : disk.reap(q)) {
                ++done;
                const VduseDisk::Slot& slot = disk.slot(q, answer.slot);
                busy[slot.sector / 8] = false;
                if (answer.status != kOk) throw std::runtime_error("a request failed");
                if (slot.type != BlkType::kIn) continue;
                if (answer.length != VduseDisk::kData + 1 ||
                    std::memcmp(disk.data(q, answer.slot).data(), shadow.data() + slot.sector * 512,
                                VduseDisk::kData) != 0) {
                    throw std::runtime_error("other data than was written");
                }
            }
        }
        return done == requests;
    };
    REQUIRE(f.eventually(step));
    CHECK(disk.outstanding() == 0);
    CHECK(f.memory->contents() == shadow);
}

}  // namespace

TEST_CASE("vduse: a device is made, attached, used, reset, detached and destroyed", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add({{"num-queues", 2}, {"serial", "abc"}}) == "");
    REQUIRE(kernel.exists("vd0"));
    const vduse_dev_config shape = kernel.shape();
    CHECK(shape.device_id == 2);
    CHECK(shape.vq_num == 2);
    CHECK((shape.features & virtio::kVersion1));
    CHECK((shape.features & virtio::kAccessPlatform));
    CHECK_FALSE((shape.features & virtio::kBlkConfigWce));
    CHECK((shape.features & virtio::kRingPacked));
    CHECK(kernel.config().size() == virtio::BlkDevice::kConfigSize);
    CHECK(capacity(kernel) == VduseFixture::kBytes / 512);
    exports::Export* exported = f.process.registry.find("e");

    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    CHECK_THAT(f.remove(), Catch::StartsWith("export 'e' still in use"));
    VduseDisk disk(kernel, {.queues = 2});
    REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
    CHECK(kernel.status() == 15);
    for (uint32_t q = 0; q < 2; ++q) {
        REQUIRE(disk.submit(q, BlkType::kOut, q * 8, static_cast<uint8_t>(0x40 + q)));
        std::vector<VduseDisk::Done> done;
        REQUIRE(f.reaped(disk, q, 1, &done));
        CHECK(done[0].status == kOk);
        CHECK(f.eventually([&] { return kernel.interrupts(q) > 0; }));
    }
    CHECK(f.memory->contents()[0] == 0x40);
    CHECK(f.memory->contents()[4096] == 0x41);
    json::object details = exported->details();
    details["id"] = "e";
    const auto listed =
        schema::validate_value(*schema::find_command("query-vduse-exports")->returns, json::array{details});
    CHECK((listed ? "" : listed.error().message()) == "");
    CHECK(details.at("running").as_bool());
    CHECK(details.at("kept-for-restart").as_bool());
    CHECK(details.at("queues").as_array().size() == 2);
    CHECK(f.process.keeper.held() == 1);

    CHECK(f.drive([&] { return kernel.reset(); }) == 0);
    CHECK_FALSE(exported->details().at("running").as_bool());
    CHECK_FALSE(kernel.has_kick(0));
    disk.forget_rings();
    REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
    exercise(f, disk, 100, 1);
    f.drive([&] { kernel.detach("vd0"); });
    CHECK(f.remove() == "");
    CHECK(f.gone());
    CHECK(kernel.devices() == 0);
    CHECK(kernel.open_files() == 0);
    CHECK(f.process.keeper.held() == 0);
}

TEST_CASE("vduse: requests through split and packed rings on several queues", "[vduse]") {
    const bool packed = GENERATE(false, true);
    const bool event_idx = GENERATE(false, true);
    const uint32_t queues = GENERATE(1U, 4U);
    CAPTURE(packed, event_idx, queues);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven({{"num-queues", queues}}, {.packed = packed, .event_idx = event_idx, .queues = queues});
    exercise(f, disk, 1500, queues);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: a reset waits for requests that are under way", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven();
    f.memory->hold = true;
    for (unsigned i = 0; i < 5; ++i) REQUIRE(disk.submit(0, BlkType::kOut, i * 8, 7));
    REQUIRE(f.eventually([&] { return f.memory->held == 5; }));

    SECTION("and is answered when they have ended") {
        std::atomic<bool> answered = false;
        const int result = f.runtime.run([](VduseFixture* fixture, std::atomic<bool>* flag) -> Task<int> {
            TaskScope scope;
            int value = -1;
            scope.spawn([](VduseFixture* g, std::atomic<bool>* h, int* out) -> Task<void> {
                *out = co_await run_blocking([g] { return g->process.kernel.reset(); });
                *h = true;
            }(fixture, flag, &value));
            // The message is there and not answered, whatever else goes on.
            for (int i = 0; i < 50; ++i) co_await sleep_for(1ms);
            const bool early = flag->load();
            fixture->memory->hold = false;
            co_await scope.join();
            co_return early ? -1 : value;
        }(&f, &answered));
        CHECK(result == 0);
        CHECK(disk.reap(0).size() == 5);
        CHECK(f.memory->contents()[4 * 4096] == 7);
    }
    SECTION("that are cancelled where that can be done") {
        f.memory->cancel_releases = true;
        kernel.set_patience(2s);
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
        CHECK_FALSE(kernel.broken());
        CHECK(disk.reap(0).size() == 5);
    }
    SECTION("and fails in time when they do not end, and so does the next driver until they have") {
        kernel.set_patience(400ms);
        CHECK(f.drive([&] { return kernel.reset(); }) == -EIO);
        CHECK_FALSE(kernel.broken());
        CHECK(f.drive([&] { return disk.bring_up(); }) == -EIO);
        CHECK_FALSE(kernel.broken());
        f.memory->hold = false;
        REQUIRE(f.eventually([&] { return f.memory->held == 0; }));
        REQUIRE(f.eventually([&] { return !f.process.registry.find("e")->details().at("running").as_bool(); }));
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
        disk.forget_rings();
        REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
        exercise(f, disk, 50, 3);
    }
    f.memory->hold = false;
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: the driver's memory changes while it works", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven({{"num-queues", 2}}, {.queues = 2});
    exercise(f, disk, 50, 4);

    SECTION("requests that are under way end before that is answered") {
        f.memory->hold = true;
        REQUIRE(disk.submit(0, BlkType::kIn, 0));
        REQUIRE(f.eventually([&] { return f.memory->held == 1; }));
        kernel.set_patience(400ms);
        CHECK(f.drive([&] { return kernel.update(disk.maps()); }) == -EIO);
        CHECK_FALSE(kernel.broken());
        f.memory->hold = false;
        CHECK(f.reaped(disk, 0, 1));
        // The kernel has taken the memory away by then.
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
        disk.forget_rings();
        REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
        exercise(f, disk, 50, 5);
    }
    SECTION("the same rings are found in other memory") {
        VduseDisk moved(disk, kernel);
        REQUIRE(f.drive([&] { return kernel.update(moved.maps()); }) == 0);
        exercise(f, moved, 200, 6);
        CHECK(disk.reap(0).empty());
    }
    SECTION("under load") {
        std::atomic<bool> stop = false;
        std::atomic<unsigned> updates = 0;
        std::thread hotplug([&] {
            while (!stop) {
                if (kernel.update(disk.maps()) != 0) break;
                ++updates;
            }
        });
        exercise(f, disk, 2000, 7);
        CHECK(f.eventually([&] { return updates > 2; }));
        stop = true;
        CHECK(f.eventually([&] { return stop.load(); }));
        f.drive([&] { hotplug.join(); });
        CHECK_FALSE(kernel.broken());
    }
    SECTION("rings that are not there any more are broken until a reset") {
        REQUIRE(f.drive([&] { return kernel.update({}); }) == 0);
        CHECK(f.eventually([&] {
            return f.process.registry.find("e")->details().at("queues").as_array()[0].as_object().contains("broken");
        }));
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
        disk.forget_rings();
        REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
        exercise(f, disk, 50, 8);
    }
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: the driver learns of another size", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add() == "");
    exports::Export* exported = f.process.registry.find("e");
    f.runtime.run([](exports::Export* e) -> Task<void> {
        e->on_resize(1 << 20);
        co_return;
    }(exported));
    CHECK(capacity(kernel) == 2048);
    CHECK(kernel.config_interrupts() == 0);
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseDisk disk(kernel, {});
    REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
    f.runtime.run([](exports::Export* e) -> Task<void> {
        e->on_resize(3 << 20);
        co_return;
    }(exported));
    CHECK(capacity(kernel) == 3 * 2048);
    CHECK(kernel.config_interrupts() == 1);
    kernel.fail(VDUSE_DEV_SET_CONFIG, ENOMEM);
    f.runtime.run([](exports::Export* e) -> Task<void> {
        e->on_resize(4 << 20);
        co_return;
    }(exported));
    CHECK(kernel.config_interrupts() == 1);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: an interrupt before the kernel has noted DRIVER_OK is made up for", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    kernel.notes_late = true;
    REQUIRE(f.add() == "");
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseDisk disk(kernel, {});
    REQUIRE(disk.submit(0, BlkType::kIn, 0, 0, false));
    REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
    CHECK(kernel.refused_interrupts() > 0);
    CHECK(f.reaped(disk, 0, 1));
    CHECK(f.eventually([&] { return kernel.interrupts(0) > 0; }));
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: where a queue is can be asked, and what is not known is refused", "[vduse]") {
    const bool packed = GENERATE(false, true);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven({}, {.packed = packed});
    for (unsigned i = 0; i < 3; ++i) {
        REQUIRE(disk.submit(0, BlkType::kFlush, 16));
        REQUIRE(f.reaped(disk, 0, 1));
    }
    const auto state = f.drive([&] { return kernel.queue_state(0); });
    REQUIRE(state);
    if (packed) {
        // A flush in an indirect table takes one slot.
        CHECK(state->packed.last_avail_idx == 3);
        CHECK(state->packed.last_avail_counter == 1);
        CHECK(state->packed.last_used_idx == 3);
    } else {
        CHECK(state->split.avail_index == 3);
    }
    exercise(f, disk, 50, 9);
    CHECK_FALSE(f.drive([&] { return kernel.queue_state(5); }));
    CHECK(f.drive([&] { return kernel.send_unknown(); }) == -EIO);
    exercise(f, disk, 50, 10);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: features that were not offered are refused", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add() == "");
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseDisk disk(kernel, {});
    for (const uint64_t features :
         {disk.features() | virtio::kBlkConfigWce, disk.features() & ~virtio::kVersion1, disk.features() | 2}) {
        CHECK(f.drive([&] { return disk.bring_up(features); }) == -EIO);
        CHECK(kernel.status() == 3);
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
    }
    CHECK(f.drive([&] { return disk.bring_up(); }) == 0);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: a ring that makes no sense is not served, the others are", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add({{"num-queues", 2}}) == "");
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseDisk disk(kernel, {.queues = 2});
    const auto broken = [&] {
        for (const json::value& queue : f.process.registry.find("e")->details().at("queues").as_array()) {
            if (queue.as_object().at("index") == 0) return queue.as_object().contains("broken");
        }
        return false;
    };

    SECTION("at once") {
        REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
        Driver& driver = disk.driver(0);
        SECTION("an index too far") { std::memset(disk.guest().at(driver.driver_area() + 2, 2), 0x77, 2); }
        SECTION("memory that is nowhere") {
            const Piece pieces[] = {{0x10, 16, false}, {0x9999'0000'0000, 1, true}};
            REQUIRE(driver.add(pieces));
            driver.kick();
        }
        SECTION("memory up to the end of all addresses") {
            const Piece pieces[] = {{VduseDisk::kFirst, 16, false}, {UINT64_MAX - 3, 4096, true}};
            REQUIRE(driver.add(pieces));
            driver.kick();
        }
        kernel.kick(0);
        REQUIRE(f.eventually(broken));
        REQUIRE(disk.submit(1, BlkType::kOut, 0, 0x55));
        CHECK(f.reaped(disk, 1, 1));
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
        disk.forget_rings();
        REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
        exercise(f, disk, 50, 11);
    }
    SECTION("or not even begun") {
        for (const uint8_t status : {1, 3}) REQUIRE(f.drive([&] { return kernel.set_status(status); }) == 0);
        kernel.choose(disk.features());
        REQUIRE(f.drive([&] { return kernel.set_status(11); }) == 0);
        kernel.map(disk.maps());
        disk.tell_queues();
        Driver& d = disk.driver(1);
        SECTION("too large") { kernel.set_queue(1, 128, d.descriptors(), d.driver_area(), d.device_area(), 0); }
        SECTION("no power of two") { kernel.set_queue(1, 48, d.descriptors(), d.driver_area(), d.device_area(), 0); }
        SECTION("nowhere") { kernel.set_queue(1, 64, 0x5000, d.driver_area(), d.device_area(), 0); }
        SECTION("not aligned") { kernel.set_queue(1, 64, d.descriptors() + 8, d.driver_area(), d.device_area(), 0); }
        SECTION("half outside") {
            const uint64_t end = VduseDisk::kFirst + VduseDisk::kBytes;
            kernel.set_queue(1, 64, end - 512, d.driver_area(), d.device_area(), 0);
        }
        CHECK(f.drive([&] { return kernel.set_status(15); }) == -EIO);
        CHECK_FALSE(f.process.registry.find("e")->details().at("running").as_bool());
        CHECK(f.drive([&] { return kernel.reset(); }) == 0);
        disk.forget_rings();
        CHECK(f.drive([&] { return disk.bring_up(); }) == 0);
    }
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: memory that the driver lets us only read is only read", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven();
    Guest rom({{0x2000, 0x2000}});
    auto maps = disk.maps();
    maps.push_back({0x2000, 0x3fff, 0, rom.fd(0), VDUSE_ACCESS_RO});
    REQUIRE(f.drive([&] { return kernel.update(maps); }) == 0);
    rom.write(0x2000, std::string(16, '\0'));
    // A read into it: what is written goes nowhere, and the status is elsewhere.
    const uint64_t status = disk.guest().alloc(1);
    const Piece pieces[] = {{0x2000, 16, false}, {0x3000, 512, true}, {status, 1, true}};
    f.memory->fill(0, 512, 0xab);
    REQUIRE(disk.driver(0).add(pieces));
    disk.driver(0).kick();
    kernel.kick(0);
    CHECK(f.eventually([&] { return disk.driver(0).reap().size() == 1; }));
    CHECK(rom.read(0x3000, 512) == std::string(512, '\0'));
    exercise(f, disk, 50, 12);
    f.drive([&] { kernel.detach("vd0"); });
}
