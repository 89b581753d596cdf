// VduseExport: removal, other users of a name, processes that follow each other, and calls that fail.

#include <catch2/catch.hpp>
#include <cstring>
#include <thread>

#include "tests/support/vduse_disk.h"

using namespace gantry;
using namespace gantry::test;
using namespace std::chrono_literals;
using exports::RemoveMode;
using virtio::BlkType;

namespace {

constexpr uint8_t kOk = 0, kIoError = 1;

/// What a process before this one, or another one, has made. Its descriptor.
int foreign_device(VduseKernel& kernel, uint32_t queues, bool setup = true) {
    const int control = kernel.open_control();
    alignas(vduse_dev_config) std::byte memory[sizeof(vduse_dev_config) + virtio::BlkDevice::kConfigSize] = {};
    auto* shape = reinterpret_cast<vduse_dev_config*>(memory);
    std::strcpy(shape->name, "vd0");
    shape->device_id = 2;
    shape->features = virtio::kVersion1 | virtio::kAccessPlatform;
    shape->vq_num = queues;
    shape->config_size = virtio::BlkDevice::kConfigSize;
    REQUIRE(kernel.ioctl(control, VDUSE_CREATE_DEV, memory) == 0);
    kernel.close(control);
    const int device = kernel.open_device("vd0");
    REQUIRE(device >= 0);
    for (uint32_t i = 0; setup && i < queues; ++i) {
        vduse_vq_config queue{};
        queue.index = i;
        queue.max_size = 64;
        REQUIRE(kernel.ioctl(device, VDUSE_VQ_SETUP, &queue) == 0);
    }
    return device;
}

}  // namespace

TEST_CASE("vduse: options are checked in the words of the reference", "[vduse][once]") {
    VduseFixture f;
    const auto text = [&](json::object more) { return f.add(std::move(more)); };
    CHECK_THAT(text({{"queue-size", 3}}), Catch::StartsWith("queue-size is invalid"));
    CHECK_THAT(text({{"queue-size", 2}}), Catch::StartsWith("queue-size is invalid"));
    CHECK_THAT(text({{"queue-size", 2048}}), Catch::StartsWith("queue-size is invalid"));
    CHECK(text({{"num-queues", 0}}) == "num-queues must be greater than 0");
    CHECK(text({{"logical-block-size", 513}}) ==
          "Property e.logical-block-size doesn't take value '513', it's not a power of 2");
    CHECK_THAT(text({{"logical-block-size", 256}}),
               Catch::StartsWith("Property e.logical-block-size doesn't take value 256 (minimum: 512, maximum: "));
    for (const std::string& name : {std::string(), std::string("a/b"), std::string("control"), std::string("a b"),
                                    std::string(256, 'x'), std::string("..")}) {
        CHECK_THAT(text({{"name", name}}), Catch::StartsWith("failed to create vduse device; '" + name + "' cannot"));
    }
    CHECK(f.process.kernel.devices() == 0);
    CHECK(f.add({{"serial", std::string(30, 's')}, {"logical-block-size", 4096}, {"queue-size", 4}}) == "");
    CHECK(f.process.kernel.devices() == 1);
}

TEST_CASE("vduse: a call that fails when a device is made says so and leaves nothing", "[vduse][once]") {
    struct Row {
        unsigned long what;
        int error;
        unsigned skip;
        std::string_view text;
    };
    const auto row =
        GENERATE(Row{VduseKernel::kOpenControl, ENOENT, 0, "the running kernel has no VDUSE: load its module"},
                 Row{VduseKernel::kOpenControl, EACCES, 0, "run as root"},
                 Row{VduseKernel::kOpenControl, EMFILE, 0, "Too many open files"},
                 Row{VDUSE_SET_API_VERSION, EINVAL, 0, "version 0 of its interface"},
                 Row{VDUSE_CREATE_DEV, EINVAL, 0, "the kernel refuses device 'vd0' with 2 queue(s)"},
                 Row{VDUSE_CREATE_DEV, ENOMEM, 0, "Cannot allocate memory"},
                 Row{VduseKernel::kOpenDevice, EACCES, 0, "'/dev/vduse/vd0': Permission denied"},
                 Row{VDUSE_VQ_SETUP, EINVAL, 0, "queue 0 of device 'vd0'"},
                 Row{VDUSE_VQ_SETUP, EPERM, 1, "queue 1 of device 'vd0'"});
    VduseFixture f;
    f.process.kernel.fail(row.what, row.error, row.skip);
    const std::string text = f.add({{"num-queues", 2}});
    CAPTURE(row.text);
    CHECK_THAT(text, Catch::StartsWith("failed to create vduse device; "));
    CHECK_THAT(text, Catch::Contains(std::string(row.text)));
    CHECK(f.process.kernel.devices() == 0);
    CHECK(f.process.kernel.open_files() == 0);
    CHECK(f.process.registry.size() == 0);
    CHECK(f.add({{"num-queues", 2}}) == "");
}

TEST_CASE("vduse: a call that fails when a driver begins is a refusal to it", "[vduse][once]") {
    const auto [what, error, skip] = GENERATE(table<unsigned long, int, unsigned>({
        {VDUSE_DEV_GET_FEATURES, EFAULT, 0},
        {VDUSE_DEV_GET_FEATURES, EFAULT, 1},
        {VDUSE_VQ_GET_INFO, EINVAL, 0},
        {VDUSE_VQ_GET_INFO, EINVAL, 1},
        {VDUSE_IOTLB_GET_FD, EMFILE, 0},
        {VDUSE_VQ_SETUP_KICKFD, EBADF, 0},
        {VDUSE_VQ_SETUP_KICKFD, EBADF, 1},
    }));
    CAPTURE(what, skip);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add({{"num-queues", 2}}) == "");
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseDisk disk(kernel, {.queues = 2});
    kernel.fail(what, error, skip);
    CHECK(f.drive([&] { return disk.bring_up(); }) == -EIO);
    CHECK_FALSE(f.process.registry.find("e")->details().at("running").as_bool());
    CHECK(f.drive([&] { return kernel.reset(); }) == 0);
    disk.forget_rings();
    REQUIRE(f.drive([&] { return disk.bring_up(); }) == 0);
    REQUIRE(disk.submit(1, BlkType::kOut, 8, 9));
    CHECK(f.reaped(disk, 1, 1));
    f.drive([&] { kernel.detach("vd0"); });
    CHECK(f.remove() == "");
    CHECK(f.gone());
    CHECK(kernel.devices() == 0);
    CHECK(kernel.open_files() == 0);
}

TEST_CASE("vduse: an export whose device has failed is removed when it is detached", "[vduse]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven();
    SECTION("messages cannot be read") { kernel.fail(VduseKernel::kRead, EIO); }
    SECTION("answers are lost") {
        kernel.set_patience(200ms);
        kernel.fail(VduseKernel::kWrite, EIO);
    }
    kernel.set_patience(200ms);
    CHECK(f.drive([&] { return kernel.reset(); }) == -EIO);
    CHECK(f.eventually([&] {
        const auto all = f.process.registry.list();
        return all.size() == 1 && all[0].shutting_down;
    }));
    f.drive([&] { kernel.detach("vd0"); });
    CHECK(f.gone());
    CHECK(kernel.devices() == 0);
    CHECK(kernel.open_files() == 0);
}

TEST_CASE("vduse: hard removal of an attached device fails its requests until it is detached", "[vduse]") {
    const bool packed = GENERATE(false, true);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven({{"num-queues", 2}}, {.packed = packed, .queues = 2});
    REQUIRE(disk.submit(1, BlkType::kOut, 8, 9));
    std::vector<VduseDisk::Done> done;
    REQUIRE(f.reaped(disk, 1, 1, &done));
    CHECK(done[0].status == kOk);
    REQUIRE(f.remove(RemoveMode::kHard) == "");
    for (uint32_t q = 0; q < 2; ++q) {
        REQUIRE(f.refused(disk, q, done));
        done.clear();
        for (unsigned i = 0; i < 100; ++i) {
            REQUIRE(disk.submit(q, i % 2 ? BlkType::kIn : BlkType::kOut, i * 8, 1));
            REQUIRE(f.reaped(disk, q, 1, &done));
        }
        CHECK(std::ranges::all_of(done, [](const auto& d) { return d.status == kIoError && d.length == 1; }));
    }
    CHECK(f.process.registry.list().at(0).shutting_down);
    // Another driver gets nowhere.
    CHECK(f.drive([&] { return kernel.reset(); }) == 0);
    disk.forget_rings();
    CHECK(f.drive([&] { return disk.bring_up(); }) == -EIO);
    f.drive([&] { kernel.detach("vd0"); });
    CHECK(f.gone());
    CHECK(f.process.deleted == 1);
    CHECK(kernel.devices() == 0);
    CHECK(kernel.open_files() == 0);
    CHECK(f.process.keeper.held() == 0);
}

TEST_CASE("vduse: where a device is whose requests are refused", "[vduse]") {
    const bool packed = GENERATE(false, true);
    CAPTURE(packed);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven({}, {.packed = packed});
    REQUIRE(disk.submit(0, BlkType::kFlush, 0));
    REQUIRE(f.reaped(disk, 0, 1));
    REQUIRE(f.remove(RemoveMode::kHard) == "");
    // The removal goes on while they come; then once around the ring and more.
    std::vector<VduseDisk::Done> done;
    REQUIRE(f.refused(disk, 0, done));
    for (unsigned i = 0; i < 97; ++i) {
        REQUIRE(disk.submit(0, BlkType::kFlush, 0));
        REQUIRE(f.reaped(disk, 0, 1, &done));
        CHECK(done.back().status == kIoError);
    }
    const size_t asked = done.size() + 2;
    // Its rings may be gone for a while.
    CHECK(f.drive([&] { return kernel.update({}); }) == 0);
    CHECK(f.drive([&] { return kernel.update({}); }) == 0);
    CHECK(f.drive([&] { return kernel.update(disk.maps()); }) == 0);
    REQUIRE(disk.submit(0, BlkType::kFlush, 0));
    REQUIRE(f.reaped(disk, 0, 1));
    const auto state = f.drive([&] { return kernel.queue_state(0); });
    REQUIRE(state);
    CHECK((packed ? state->packed.last_avail_idx : state->split.avail_index) == (packed ? asked % 64 : asked));
    CHECK(kernel.any_left() == false);

    // The process ends, and the next one goes on with the driver.
    f.end(f.process);
    CHECK(kernel.open_files() == 0);
    CHECK(kernel.any_left());
    VduseProcess next(*f.runtime.runtime, f.graph, true);
    VduseDisk after(disk, next.kernel);
    kernel.copy_to(next.kernel, after.maps());
    f.process.keeper.copy_to(next.keeper);
    vduse::give_up_records(next.keeper, next.kernel);
    CHECK(next.keeper.held() == 1);
    REQUIRE(f.add(next) == "");
    done.clear();
    REQUIRE(after.submit(0, BlkType::kFlush, 0));
    REQUIRE(f.reaped(after, 0, 1, &done));
    CHECK(done[0].status == kOk);
    f.drive([&] { next.kernel.detach("vd0"); });
    f.end(next);
}

TEST_CASE("vduse: what is kept of a device that nobody has any more is given up", "[vduse][once]") {
    VduseKernel kernel;
    HeldFiles before, keeper;
    {
        vduse::Record record(&before, "e", 1, 64);
        REQUIRE(record.begin(false));
    }
    before.copy_to(keeper);
    REQUIRE(keeper.held() == 1);
    kernel.close(foreign_device(kernel, 1));
    SECTION("not while a driver waits") {
        kernel.set_patience(50ms);
        (void)kernel.attach("vd0");
        vduse::give_up_records(keeper, kernel);
        CHECK(keeper.held() == 1);
    }
    SECTION("else at once") {
        vduse::give_up_records(keeper, kernel);
        CHECK(keeper.held() == 0);
        CHECK(keeper.waiting().empty());
    }
}

TEST_CASE("vduse: a name that somebody has", "[vduse][once]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    const int device = foreign_device(kernel, 1);
    SECTION("is refused, with who it is") {
        const std::string text = f.add();
        CHECK_THAT(text, Catch::Contains("device 'vd0' is there already, and process 4711 (somebody) serves it"));
        CHECK(kernel.devices() == 1);
        CHECK(kernel.open_files() == 1);
        kernel.close(device);
    }
    SECTION("is free when nobody serves it and it is not attached") {
        kernel.close(device);
        CHECK(f.add() == "");
        CHECK((kernel.shape().features & virtio::kRingPacked));
    }
    SECTION("is taken over when it is attached and nobody serves it") {
        kernel.set_patience(50ms);
        kernel.close(device);
        // Nobody answers the driver's first reset, so the kernel has given it up; that is for whoever detaches it.
        std::thread administrator([&] { (void)kernel.attach("vd0"); });
        administrator.join();
        CHECK(kernel.broken());
        CHECK_THAT(f.add(), Catch::Contains("is attached to the vDPA bus since before this process"));
        CHECK(kernel.devices() == 1);
        CHECK(kernel.open_files() == 0);
    }
}

TEST_CASE("vduse: an attached device of another shape is refused", "[vduse][once]") {
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add({{"num-queues", 2}}) == "");
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseProcess next(*f.runtime.runtime, f.graph, true);
    kernel.copy_to(next.kernel, {});
    CHECK_THAT(f.add(next, {{"num-queues", 1}}), Catch::Contains("it has more than 1 queue(s)"));
    CHECK_THAT(f.add(next, {{"num-queues", 3}}), Catch::Contains("it has less than 3 queue(s)"));
    for (const unsigned long what :
         {VDUSE_VQ_GET_INFO, VDUSE_DEV_SET_CONFIG, static_cast<unsigned long>(VDUSE_VQ_SETUP)}) {
        next.kernel.fail(what, EFAULT);
        CHECK_THAT(f.add(next, {{"num-queues", 2}}), Catch::StartsWith("failed to create vduse device; "));
        CHECK(next.kernel.open_files() == 0);
        CHECK(next.kernel.exists("vd0"));
    }
    CHECK(f.add(next, {{"num-queues", 2}}) == "");
    f.drive([&] { next.kernel.detach("vd0"); });
    f.end(next);
    CHECK(next.kernel.devices() == 0);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: the requests of a killed process are answered by the next one, each once", "[vduse]") {
    const bool packed = GENERATE(false, true);
    const bool event_idx = GENERATE(false, true);
    CAPTURE(packed, event_idx);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    constexpr uint32_t kQueues = 3;
    VduseDisk disk = f.driven({{"num-queues", kQueues}}, {.packed = packed, .event_idx = event_idx, .queues = kQueues});
    // Some are answered, some taken and held, and of one queue none.
    unsigned held = 0;
    for (uint32_t q = 0; q < 2; ++q) {
        for (unsigned i = 0; i < 7; ++i) REQUIRE(disk.submit(q, BlkType::kOut, (100 * q + i) * 8, 0x11));
        REQUIRE(f.reaped(disk, q, 7));
    }
    f.memory->hold = true;
    for (uint32_t q = 0; q < 2; ++q) {
        for (unsigned i = 0; i < 6; ++i) {
            REQUIRE(disk.submit(q, BlkType::kOut, (100 * q + i) * 8, static_cast<uint8_t>(0x20 + i)));
            ++held;
        }
    }
    REQUIRE(f.eventually([&] { return f.memory->held == static_cast<int>(held); }));

    // Killed here: the next process finds copies of what outlives the first, which cannot touch them any more.
    VduseProcess next(*f.runtime.runtime, f.graph, true);
    VduseDisk after(disk, next.kernel);
    kernel.copy_to(next.kernel, after.maps());
    f.process.keeper.copy_to(next.keeper);
    // The driver has not slept meanwhile, on all queues.
    for (uint32_t q = 0; q < kQueues; ++q) REQUIRE(after.submit(q, BlkType::kOut, (100 * q + 50) * 8, 0x77));
    const size_t outstanding = after.outstanding();
    REQUIRE(outstanding == held + kQueues);

    const auto config = next.kernel.config();

    SECTION("which is like the first, but for the size of blocks") {
        f.memory->hold = false;
        REQUIRE(f.reaped(disk, 0, 6));
        REQUIRE(f.reaped(disk, 1, 6));
        f.memory->fill(0, VduseFixture::kBytes, 0);
        REQUIRE(f.add(next, {{"num-queues", kQueues}, {"logical-block-size", 4096}}) == "");
        CHECK(next.kernel.config() != config);
        size_t answers = 0;
        CHECK(f.eventually([&] {
            for (uint32_t q = 0; q < kQueues; ++q) {
                for (const auto& done : after.reap(q)) {
                    ++answers;
                    if (done.status != kOk) throw std::runtime_error("a request failed");
                }
            }
            return after.outstanding() == 0;
        }));
        CHECK(answers == outstanding);
        const auto contents = f.memory->contents();
        for (uint32_t q = 0; q < kQueues; ++q) {
            for (unsigned i = 0; i < 6 && q < 2; ++i) CHECK(contents[(100 * q + i) * 4096] == 0x20 + i);
            CHECK(contents[(100 * q + 50) * 4096] == 0x77);
            CHECK(f.eventually([&] { return next.kernel.interrupts(q) > 0; }));
        }
        CHECK(next.kernel.config_interrupts() == 2);
        // And on it goes.
        for (unsigned i = 0; i < 200; ++i) {
            REQUIRE(after.submit(i % kQueues, BlkType::kOut, i * 8, 5));
            REQUIRE(f.reaped(after, i % kQueues, 1));
        }
    }
    SECTION("unless its image has other features") {
        CHECK_THAT(f.add(next, {{"num-queues", kQueues}, {"writable", false}, {"logical-block-size", 4096}}),
                   Catch::Contains("its driver uses it as this export does not offer it"));
        // Nothing was told to the driver.
        CHECK(next.kernel.config() == config);
        CHECK(next.kernel.open_files() == 0);
        CHECK(next.kernel.exists("vd0"));
        f.memory->hold = false;
    }
    SECTION("and a call that fails meanwhile leaves it to the one after") {
        const unsigned long what = GENERATE(
            static_cast<unsigned long>(VDUSE_DEV_INJECT_CONFIG_IRQ), static_cast<unsigned long>(VDUSE_DEV_GET_FEATURES),
            static_cast<unsigned long>(VDUSE_IOTLB_GET_FD), static_cast<unsigned long>(VDUSE_VQ_SETUP_KICKFD));
        next.kernel.fail(what, EFAULT);
        CHECK_THAT(f.add(next, {{"num-queues", kQueues}, {"logical-block-size", 4096}}),
                   Catch::Contains("VDUSE device 'vd0'") || Catch::Contains("cannot be taken over"));
        CHECK(next.kernel.config() == config);
        CHECK(next.kernel.open_files() == 0);
        CHECK(next.kernel.exists("vd0"));
        f.memory->hold = false;
    }
    next.kernel.set_patience(100ms);
    f.drive([&] { next.kernel.detach("vd0"); });
    f.end(next);
    f.memory->hold = false;
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: a process is killed that has started queues and not said so yet", "[vduse]") {
    const bool packed = GENERATE(false, true);
    const bool keeps = GENERATE(true, false);
    const bool in_flight = GENERATE(true, false);
    CAPTURE(packed, keeps, in_flight);
    VduseFixture f(keeps);
    VduseKernel& kernel = f.process.kernel;
    REQUIRE(f.add() == "");
    REQUIRE(f.drive([&] { return kernel.attach("vd0"); }) == 0);
    VduseDisk disk(kernel, {.packed = packed});
    constexpr unsigned kAnswered = 3;
    const unsigned more = in_flight ? 2 : 0;
    for (unsigned i = 0; i < kAnswered; ++i) REQUIRE(disk.submit(0, BlkType::kOut, i * 8, 0x11, false));
    kernel.delays_driver_ok = true;
    int noted = -1;
    std::thread driver([&] { noted = disk.bring_up(); });
    const auto requests = [&]() -> uint64_t {
        const json::object details = f.process.registry.find("e")->details();
        const json::array& queues = details.at("queues").as_array();
        return queues.empty() ? 0 : queues[0].at("requests").to_number<uint64_t>();
    };
    const bool answered = f.eventually([&] { return requests() == kAnswered; });
    f.memory->hold = true;
    for (unsigned i = 0; i < more; ++i) CHECK(disk.submit(0, BlkType::kOut, (50 + i) * 8, 0x22));
    const bool taken = f.eventually([&] { return f.memory->held == static_cast<int>(more); });

    VduseProcess next(*f.runtime.runtime, f.graph, keeps);
    VduseDisk after(disk, next.kernel);
    kernel.copy_to(next.kernel, after.maps());
    f.process.keeper.copy_to(next.keeper);
    f.memory->hold = false;
    CHECK(f.reaped(disk, 0, kAnswered + more));
    f.drive([&] {
        kernel.release_answer();
        driver.join();
    });
    REQUIRE((answered && taken && noted == 0));
    f.memory->fill(0, VduseFixture::kBytes, 0);

    REQUIRE(f.add(next) == "");
    // The kernel asks again.
    const int result = f.drive([&] { return next.kernel.set_status(15); });
    if (keeps || (!packed && !in_flight)) {
        REQUIRE(result == 0);
        std::vector<VduseDisk::Done> done;
        REQUIRE(f.reaped(after, 0, kAnswered + more, &done));
        CHECK(std::ranges::all_of(done, [](const auto& d) { return d.status == kOk; }));
        const auto contents = f.memory->contents();
        for (unsigned i = 0; i < kAnswered; ++i) CHECK(contents[i * 4096] == 0);
        for (unsigned i = 0; i < more; ++i) CHECK(contents[(50 + i) * 4096] == 0x22);
        for (unsigned i = 0; i < 100; ++i) {
            REQUIRE(after.submit(0, BlkType::kOut, i * 8, 5));
            REQUIRE(f.reaped(after, 0, 1));
        }
    } else {
        // Nobody knows which requests were answered: better none is than one twice.
        CHECK(result == -EIO);
        CHECK(f.drive([&] { return next.kernel.reset(); }) == 0);
        after.forget_rings();
        REQUIRE(f.drive([&] { return after.bring_up(); }) == 0);
        REQUIRE(after.submit(0, BlkType::kOut, 8, 5));
        CHECK(f.reaped(after, 0, 1));
    }
    f.drive([&] { next.kernel.detach("vd0"); });
    f.end(next);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: a process is killed between a reset and the next start", "[vduse]") {
    const bool packed = GENERATE(false, true);
    const bool keeps = GENERATE(true, false);
    CAPTURE(packed, keeps);
    VduseFixture f(keeps);
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven({}, {.packed = packed});
    for (unsigned i = 0; i < 10; ++i) {
        REQUIRE(disk.submit(0, BlkType::kOut, i * 8, 1));
        REQUIRE(f.reaped(disk, 0, 1));
    }
    REQUIRE(f.drive([&] { return kernel.reset(); }) == 0);
    VduseProcess next(*f.runtime.runtime, f.graph, keeps);
    VduseDisk after(disk, next.kernel);
    kernel.copy_to(next.kernel, after.maps());
    f.process.keeper.copy_to(next.keeper);
    REQUIRE(f.add(next) == "");
    after.forget_rings();
    REQUIRE(f.drive([&] { return after.bring_up(); }) == 0);
    for (unsigned i = 0; i < 100; ++i) {
        REQUIRE(after.submit(0, BlkType::kOut, i * 8, 5));
        REQUIRE(f.reaped(after, 0, 1));
    }
    f.drive([&] { next.kernel.detach("vd0"); });
    f.end(next);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: without a keeper a device is taken over when nothing is in flight", "[vduse]") {
    VduseFixture f(false);
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven();
    CHECK_FALSE(f.process.registry.find("e")->details().at("kept-for-restart").as_bool());
    for (unsigned i = 0; i < 100; ++i) {
        REQUIRE(disk.submit(0, BlkType::kOut, i * 8, 3));
        REQUIRE(f.reaped(disk, 0, 1));
    }
    VduseProcess next(*f.runtime.runtime, f.graph, false);
    SECTION("and goes on") {
        VduseDisk after(disk, next.kernel);
        kernel.copy_to(next.kernel, after.maps());
        REQUIRE(f.add(next) == "");
        for (unsigned i = 0; i < 100; ++i) {
            REQUIRE(after.submit(0, BlkType::kOut, i * 8, 4));
            REQUIRE(f.reaped(after, 0, 1));
        }
    }
    SECTION("and is refused otherwise") {
        f.memory->hold = true;
        REQUIRE(disk.submit(0, BlkType::kOut, 0, 4));
        REQUIRE(f.eventually([&] { return f.memory->held == 1; }));
        VduseDisk after(disk, next.kernel);
        kernel.copy_to(next.kernel, after.maps());
        f.memory->hold = false;
        CHECK_THAT(f.add(next), Catch::Contains("requests may be in flight that a process before this one has taken"));
        CHECK(next.kernel.open_files() == 0);
    }
    next.kernel.set_patience(100ms);
    f.drive([&] { next.kernel.detach("vd0"); });
    f.end(next);
    f.drive([&] { kernel.detach("vd0"); });
}

TEST_CASE("vduse: the end of the process leaves what is attached to the next one", "[vduse]") {
    const bool hand_over = GENERATE(false, true);
    VduseFixture f;
    VduseKernel& kernel = f.process.kernel;
    VduseDisk disk = f.driven();
    REQUIRE(disk.submit(0, BlkType::kOut, 8, 9));
    REQUIRE(f.reaped(disk, 0, 1));
    if (hand_over) f.process.keeper.leaving = exports::Keeper::Leave::kEverything;
    f.end(f.process);
    CHECK(kernel.devices() == 1);
    CHECK(kernel.open_files() == 0);
    CHECK(f.process.keeper.held() == 1);
    // A driver that does not know goes on asking.
    REQUIRE(disk.submit(0, BlkType::kOut, 16, 9));
    VduseProcess next(*f.runtime.runtime, f.graph, true);
    VduseDisk after(disk, next.kernel);
    kernel.copy_to(next.kernel, after.maps());
    f.process.keeper.copy_to(next.keeper);
    REQUIRE(f.add(next) == "");
    CHECK(f.reaped(after, 0, 1));
    f.drive([&] { next.kernel.detach("vd0"); });
    CHECK(f.runtime.run(next.registry.remove("e", RemoveMode::kSafe)));
    CHECK(f.eventually([&] { return next.registry.size() == 0; }));
    CHECK(next.kernel.devices() == 0);
    CHECK(next.keeper.held() == 0);
}

TEST_CASE("vduse: a message that was read and not answered comes again", "[vduse][once]") {
    VduseKernel kernel;
    virtio::BlkDevice::Config config{};
    auto made = vduse::Device::create(kernel, {.name = "vd0",
                                               .features = virtio::kVersion1 | virtio::kAccessPlatform,
                                               .queues = 1,
                                               .queue_size = 64,
                                               .config = config});
    REQUIRE(made);
    vduse::Device& device = **made;
    int noted = -1;
    std::thread driver([&] { noted = kernel.set_status(1); });
    const auto next = [&device] {
        for (const auto deadline = Clock::now() + 10s; Clock::now() < deadline;) {
            auto message = device.next_message();
            if (!message || *message) return message;
            std::this_thread::yield();
        }
        return Result<std::optional<vduse_dev_request>>(std::nullopt);
    };
    const auto first = next();
    REQUIRE(first);
    REQUIRE(*first);
    CHECK((*first)->type == VDUSE_SET_STATUS);
    kernel.fail(VduseKernel::kRead, EAGAIN);
    CHECK(device.next_message().value() == std::nullopt);
    device.close();
    REQUIRE(device.reopen());
    const auto again = next();
    REQUIRE(again);
    REQUIRE(*again);
    CHECK((*again)->request_id == (*first)->request_id);
    vduse_dev_response response{};
    response.request_id = (*again)->request_id;
    CHECK(device.answer(response));
    driver.join();
    CHECK(noted == 0);
    CHECK(device.answer(response));  // nobody waits any more
    CHECK(device.destroy().error().kind() == ErrorKind::kBusy);
    device.close();
    CHECK(device.destroy());
}
