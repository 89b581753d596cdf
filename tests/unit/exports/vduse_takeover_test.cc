// VduseExport: a device that is in use since before the process, and cannot be taken over.

#include <catch2/catch.hpp>

#include "tests/support/vduse_disk.h"

using namespace gantry;
using namespace gantry::test;
using namespace std::chrono_literals;
using virtio::BlkType;

namespace {

/// A driver whose request the process of `f` has taken and not answered, and two processes after a kill now.
struct Successors {
    Successors(VduseFixture& f, bool packed)
        : fixture(f),
          disk(f.driven({}, {.packed = packed})),
          first(*f.runtime.runtime, f.graph, true),
          second(*f.runtime.runtime, f.graph, true),
          seen_by_first(disk, first.kernel),
          seen_by_second(disk, second.kernel) {
        f.memory->hold = true;
        REQUIRE(disk.submit(0, BlkType::kOut, 0, 4));
        REQUIRE(f.eventually([&] { return f.memory->held == 1; }));
        seen_by_first = VduseDisk(disk, first.kernel);
        seen_by_second = VduseDisk(disk, second.kernel);
        f.process.kernel.copy_to(first.kernel, seen_by_first.maps());
        f.process.kernel.copy_to(second.kernel, seen_by_second.maps());
        f.process.keeper.copy_to(first.keeper);
        f.memory->hold = false;
    }
    ~Successors() {
        for (VduseProcess* process : {&first, &second, &fixture.process}) {
            process->kernel.set_patience(100ms);
            fixture.drive([process] { process->kernel.detach("vd0"); });
        }
        fixture.end(first);
        fixture.end(second);
    }

    VduseFixture& fixture;
    VduseDisk disk;
    VduseProcess first, second;
    VduseDisk seen_by_first, seen_by_second;
};

}  // namespace

TEST_CASE("vduse: a take-over that is refused leaves nothing that the next process would believe", "[vduse]") {
    const bool packed = GENERATE(false, true);
    VduseFixture f(false);
    Successors after(f, packed);
    CHECK_THAT(f.add(after.first), Catch::Contains("nobody has kept which"));
    CHECK(after.first.keeper.held() == 0);
    after.first.keeper.copy_to(after.second.keeper);
    CHECK_THAT(f.add(after.second), Catch::Contains("nobody has kept which"));
}

TEST_CASE("vduse: a take-over with another size of queues is refused and spoils nothing", "[vduse]") {
    const bool packed = GENERATE(false, true);
    const int wrong = GENERATE(32, 128);
    const bool same_process = GENERATE(false, true);
    CAPTURE(packed, wrong, same_process);
    VduseFixture f;
    Successors after(f, packed);
    CHECK_THAT(f.add(after.first, {{"queue-size", wrong}}), Catch::Contains("cannot be taken over"));
    CHECK(after.first.keeper.held() == 1);
    if (!same_process) after.first.keeper.copy_to(after.second.keeper);
    VduseDisk& disk = same_process ? after.seen_by_first : after.seen_by_second;
    REQUIRE(f.add(same_process ? after.first : after.second) == "");
    std::vector<VduseDisk::Done> done;
    REQUIRE(f.reaped(disk, 0, 1, &done));
    CHECK(done[0].status == 0);
}
