#include "block/protocols/host_device.h"

#include <fcntl.h>
#include <linux/loop.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "tests/unit/block/child_process.h"
#include "tests/unit/block/file_fixture.h"

using namespace gantry;
using namespace gantry::block;
using namespace gantry::test;
using Catch::Contains;
using Catch::StartsWith;

namespace {

constexpr uint64_t kMiB = 1 << 20;

/// A loop device over a sparse file; empty path where this machine gives none (not root, no driver).
struct LoopDevice {
    explicit LoopDevice(const std::string& file, uint64_t bytes, std::vector<std::string> more = {}) {
        std::ofstream(file).close();
        std::filesystem::resize_file(file, bytes);
        std::vector<std::string> command = {"losetup", "--find", "--show"};
        command.insert(command.end(), more.begin(), more.end());
        command.push_back(file);
        if (!have_program("losetup")) return;
        Ran ran = run_program(std::move(command));
        if (ran.status != 0) {
            why = ran.output;
            return;
        }
        while (!ran.output.empty() && ran.output.back() == '\n') ran.output.pop_back();
        path = ran.output;
    }
    ~LoopDevice() {
        if (!path.empty()) (void)run_program({"losetup", "--detach", path});
    }
    std::string path, why = "losetup is not installed";
};

}  // namespace

TEST_CASE("host_device: what is no block device is refused", "[host_device][open]") {
    FileFixture f;
    write_file(f.dir.file("img"), "x");
    std::filesystem::create_directory(f.dir.file("folder"));
    const auto open = [&](const std::string& name) {
        return f.refused({{"driver", "host_device"}, {"node-name", "d"}, {"filename", name}, {"read-only", true}});
    };
    const std::string image = f.dir.file("img");
    CHECK_THAT(open(image), StartsWith("'host_device' driver requires '" + image +
                                       "' to be either a character or block device; use driver file"));
    CHECK(open(f.dir.file("folder")) == "Could not open '" + f.dir.file("folder") + "': Is a directory");
    CHECK_THAT(open("/dev/null"), StartsWith("'/dev/null' is a character device"));
    CHECK(open("/dev/no-such-device") == "Could not open '/dev/no-such-device': No such file or directory");
    CHECK(open("") == "The 'host_device' block driver requires a file name");
}

TEST_CASE("host_device: reads, writes, zeroes and discards a loop device", "[host_device][root]") {
    FileFixture f;
    const std::string backing = f.dir.file("backing");
    LoopDevice loop(backing, 16 * kMiB);
    if (loop.path.empty()) {
        WARN("skipped: no loop device here: " << loop.why);
        return;
    }
    const bool direct = GENERATE(false, true);
    json::object options{{"driver", "host_device"}, {"node-name", "d"}, {"filename", loop.path}, {"discard", "unmap"}};
    options["cache"] = json::object{{"direct", direct}};
    auto added = f.add(std::move(options));
    if (!added && added.error().kind() == ErrorKind::kPermission) {
        WARN("skipped: " << added.error().message());
        return;
    }
    REQUIRE(added);
    Node& node = **added;
    auto root = f.attach(node, FileFixture::kWriter);
    REQUIRE(root);
    CHECK(node.size() == 16 * kMiB);
    CHECK_FALSE(node.limits().can_grow_by_write);
    CHECK(f.run(write_text(&node, 3 * kMiB + 17, "device")) == "");
    CHECK(f.read(&node, 3 * kMiB + 17, 6) == "device");
    CHECK(f.run(write_text(&node, 4 * kMiB, std::string(2 * kMiB, 'x'))) == "");
    CHECK(f.run(flush(&node)) == "");
    CHECK_THAT(f.run(write_text(&node, 16 * kMiB - 1, "ab")), Contains("beyond its end"));

    CHECK(f.run(zero(&node, 4 * kMiB + 100, kMiB, WriteFlags::kNone)) == "");
    CHECK((f.read(&node, 4 * kMiB + 100, kMiB) == std::string(kMiB, '\0')));
    CHECK(f.read(&node, 4 * kMiB, 100) == std::string(100, 'x'));
    CHECK(f.read(&node, 5 * kMiB + 100, 100) == std::string(100, 'x'));
    CHECK(f.run(zero(&node, 5 * kMiB, kMiB, WriteFlags::kMayUnmap)) == "");
    CHECK((f.read(&node, 5 * kMiB, kMiB) == std::string(kMiB, '\0')));
    CHECK(f.run(discard(&node, 4 * kMiB, kMiB)) == "");
    const json::object stats = node.driver_stats();
    CHECK(stats.at("driver") == "host_device");
    CHECK(stats.at("discard-nb-ok").to_number<int>() + stats.at("discard-nb-failed").to_number<int>() == 1);

    auto s = f.rt.run(status(&node, 0, kMiB));
    REQUIRE(s);
    CHECK((s->data && s->length == kMiB && s->file == &node));
    CHECK(f.run(flush(&node)) == "");
    f.detach(std::move(*root));
    CHECK_THAT(f.run(f.graph.resize(node, 8 * kMiB)), StartsWith("Cannot resize device files"));
    CHECK(f.run(f.graph.resize(node, 16 * kMiB)) == "");

    // The device has grown: its own size is the one that may be given.
    std::filesystem::resize_file(backing, 20 * kMiB);
    const UniqueFd fd(::open(loop.path.c_str(), O_RDONLY | O_CLOEXEC));
    REQUIRE(::ioctl(fd.get(), LOOP_SET_CAPACITY) == 0);
    CHECK(node.size() == 16 * kMiB);
    CHECK(f.run(f.graph.resize(node, 20 * kMiB)) == "");
    CHECK(node.size() == 20 * kMiB);
    CHECK(f.read(&node, 19 * kMiB, 10) == std::string(10, '\0'));
}

TEST_CASE("host_device: a device set read-only is not opened for writing", "[host_device][root]") {
    FileFixture f;
    LoopDevice loop(f.dir.file("backing"), 4 * kMiB, {"--read-only"});
    if (loop.path.empty()) {
        WARN("skipped: no loop device here: " << loop.why);
        return;
    }
    const json::object options{{"driver", "host_device"}, {"node-name", "d"}, {"filename", loop.path}};
    if (!UniqueFd(::open(loop.path.c_str(), O_RDONLY | O_CLOEXEC))) {
        WARN("skipped: " << loop.path << " cannot be opened here");
        return;
    }
    CHECK_THAT(f.refused(options), StartsWith("Could not open '" + loop.path + "': Permission denied"));
    json::object fallback = options;
    fallback["auto-read-only"] = true;
    auto node = f.add(std::move(fallback));
    REQUIRE(node);
    CHECK((*node)->read_only());
    auto writer = f.attach(**node, FileFixture::kWriter);
    REQUIRE_FALSE(writer);
    CHECK(writer.error().kind() == ErrorKind::kReadOnly);
    CHECK(f.read(*node, 0, 4) == std::string(4, '\0'));
}

TEST_CASE("host_device: after a flush that failed no later one succeeds", "[host_device][flush][root]") {
    FileFixture f;
    // A device whose writes run out of space: its backing file lies on a file system that is too small.
    const std::string small = f.dir.file("small");
    std::filesystem::create_directory(small);
    if (!have_program("mount") || run_program({"mount", "-t", "tmpfs", "-o", "size=1m", "none", small}).status != 0) {
        WARN("skipped: no file system can be mounted here");
        return;
    }
    struct Unmount {
        std::string path;
        ~Unmount() { (void)run_program({"umount", "--lazy", path}); }
    } unmount{small};
    LoopDevice loop(small + "/backing", 16 * kMiB);
    if (loop.path.empty()) {
        WARN("skipped: no loop device here: " << loop.why);
        return;
    }
    auto added = f.add({{"driver", "host_device"}, {"node-name", "d"}, {"filename", loop.path}, {"discard", "unmap"}});
    if (!added && added.error().kind() == ErrorKind::kPermission) {
        WARN("skipped: " << added.error().message());
        return;
    }
    REQUIRE(added);
    auto root = f.attach(**added, FileFixture::kWriter);
    REQUIRE(root);
    CHECK(f.run(write_text(*added, 0, "fits")) == "");
    CHECK(f.run(flush(*added)) == "");
    CHECK(f.run(write_text(*added, kMiB, std::string(4 * kMiB, 'x'))) == "");
    // Without the request layer, which remembers by itself.
    constexpr auto driver_flush = [](Node* node) -> Task<Result<>> {
        Request rq = Request::internal();
        co_return co_await node->do_flush(rq);
    };
    CHECK_THAT(f.run(driver_flush(*added)), StartsWith("flushing '" + loop.path + "': "));
    CHECK(f.run(discard(*added, kMiB, 4 * kMiB)) == "");
    CHECK_THAT(f.run(driver_flush(*added)), StartsWith("flushing '" + loop.path + "': "));
    CHECK(f.run(write_text(*added, 0, "FUA!", WriteFlags::kFua)) != "");
    CHECK(f.run(flush(*added)) != "");
    f.detach(std::move(*root));
    f.remove("d");
}
