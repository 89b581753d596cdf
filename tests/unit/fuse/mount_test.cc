// Real mounts of files that nobody serves: whatever asked a server would hang, and the test with it.

#include "fuse/mount.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <fstream>

#include "fuse/mountinfo.h"
#include "fuse/stale_mounts.h"
#include "fuse/wire.h"
#include "runtime/own_mounts.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

using namespace gantry;
using namespace gantry::fuse;

namespace {

bool may_mount() {
    if (::geteuid() == 0 && ::access("/dev/fuse", R_OK | W_OK) == 0) return true;
    if (std::getenv("GANTRY_CI")) FAIL("mounting needs root and /dev/fuse");
    WARN("skipped: mounting needs root and /dev/fuse");
    return false;
}

struct MountFixture {
    ~MountFixture() {
        // Whatever a failed test has left.
        for (int i = 0; i < 4; ++i) ::umount2(file.c_str(), MNT_DETACH);
    }
    std::string make(const std::string& name) {
        std::ofstream(dir.file(name)) << "below";
        return dir.file(name);
    }
    Result<std::unique_ptr<Mount>> mount(const std::string& path, const std::string& id = "disk") {
        MountRequest request;
        request.export_id = id;
        request.mountpoint = path;
        request.read_only = false;
        request.max_read = 1 << 20;
        return rt.run(Mount::create(std::move(request)));
    }
    std::vector<MountEntry> on(const std::string& path) {
        std::vector<MountEntry> found;
        const auto all = read_mountinfo();
        for (const MountEntry& entry : *all) {
            if (entry.path == path) found.push_back(entry);
        }
        return found;
    }
    test::TestRuntime rt;
    test::TempDir dir;
    std::string file = make("disk.raw");
};

ServerState asked(MountFixture& f) {
    const MountEntry entry = f.on(f.file).at(0);
    const UniqueFd root = open_root(entry);
    REQUIRE(root);
    return probe(entry, root.get(), std::chrono::milliseconds(200));
}

}  // namespace

TEST_CASE("mount: a file is covered, seen by its kind and source, and uncovered", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    {
        auto mount = f.mount(f.file);
        REQUIRE(mount);
        CHECK((*mount)->path() == f.file);
        CHECK((*mount)->allow_other());
        InHeader header;
        char room[16384];
        const ssize_t n = ::read((*mount)->fd(), room, sizeof room);
        REQUIRE(n >= static_cast<ssize_t>(sizeof header));
        std::memcpy(&header, room, sizeof header);
        CHECK(header.opcode == static_cast<uint32_t>(Opcode::kInit));
        const auto entries = f.on(f.file);
        REQUIRE(entries.size() == 1);
        CHECK(entries[0].type == kFilesystemType);
        CHECK(entries[0].source == "gantry:disk");
        CHECK(option_number(entries[0].options, "user_id", 77) == ::geteuid());
        CHECK(f.rt.run((*mount)->unmount(false)));
        CHECK(f.on(f.file).empty());
        CHECK(f.rt.run((*mount)->unmount(false)));
    }
    std::string content;
    std::ifstream(f.file) >> content;
    CHECK(content == "below");
}

TEST_CASE("mount: what is no regular file is refused with what it is", "[fuse][mount]") {
    MountFixture f;
    const auto missing = f.mount(f.dir.file("missing"));
    REQUIRE(!missing);
    CHECK(missing.error().kind() == ErrorKind::kNotFound);
    CHECK(missing.error().message() == "Failed to stat '" + f.dir.file("missing") + "': No such file or directory");
    const auto directory = f.mount(f.dir.path());
    REQUIRE(!directory);
    CHECK(directory.error().kind() == ErrorKind::kInvalid);
    CHECK(directory.error().message().starts_with("'" + f.dir.path() + "' is not a regular file"));
    CHECK(!f.mount("/dev/null"));
}

TEST_CASE("mount: a file is covered once, whatever the name it is reached by", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    auto first = f.mount(f.file);
    REQUIRE(first);
    REQUIRE(::symlink(f.file.c_str(), f.dir.file("link").c_str()) == 0);
    REQUIRE(::mkdir(f.dir.file("sub").c_str(), 0700) == 0);
    const std::string alias = f.dir.file("bind.raw");
    f.make("bind.raw");
    REQUIRE(::mount(f.file.c_str(), alias.c_str(), nullptr, MS_BIND, nullptr) == 0);
    for (const std::string& path : {f.file, f.dir.file("link"), f.dir.path() + "/sub/../disk.raw", alias}) {
        CAPTURE(path);
        const auto again = f.mount(path, "other");
        REQUIRE(!again);
        CHECK(again.error().kind() == ErrorKind::kExists);
        CHECK(again.error().message() == "There already is a FUSE export on '" + path + "'; it is FUSE export 'disk'");
    }
    CHECK(::umount2(alias.c_str(), MNT_DETACH) == 0);
    CHECK(f.on(f.file).size() == 1);
}

TEST_CASE("mount: a symbolic link stays, its target is covered", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    const std::string link = f.dir.file("link");
    REQUIRE(::symlink("disk.raw", link.c_str()) == 0);
    auto mount = f.mount(link);
    REQUIRE(mount);
    CHECK((*mount)->path() == f.file);
    CHECK(f.on(f.file).size() == 1);
    CHECK(f.rt.run((*mount)->unmount(true)));
    CHECK(f.on(f.file).empty());
}

TEST_CASE("mount: a safe unmount is refused while somebody has the file, a hard one is not",
          "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    auto mount = f.mount(f.file);
    REQUIRE(mount);
    const UniqueFd held(::open(f.file.c_str(), O_PATH | O_CLOEXEC));
    const Result<> refused = f.rt.run((*mount)->unmount(false));
    REQUIRE(!refused);
    CHECK(refused.error().kind() == ErrorKind::kBusy);
    CHECK(f.on(f.file).size() == 1);
    CHECK(f.rt.run((*mount)->unmount(true)));
    CHECK(f.on(f.file).empty());
}

TEST_CASE("mount: only our own is unmounted", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    SECTION("somebody has unmounted it") {
        auto mount = f.mount(f.file);
        REQUIRE(mount);
        REQUIRE(::umount2(f.file.c_str(), 0) == 0);
        const std::string other = f.make("other.raw");
        REQUIRE(::mount(other.c_str(), f.file.c_str(), nullptr, MS_BIND, nullptr) == 0);
        CHECK(f.rt.run((*mount)->unmount(false)));
        mount->reset();
        CHECK(f.on(f.file).size() == 1);
    }
    SECTION("somebody has covered it") {
        auto mount = f.mount(f.file);
        REQUIRE(mount);
        const std::string other = f.make("other.raw");
        REQUIRE(::mount(other.c_str(), f.file.c_str(), nullptr, MS_BIND, nullptr) == 0);
        CHECK(f.rt.run((*mount)->unmount(true)));
        mount->reset();
        CHECK(f.on(f.file).size() == 2);
        // What is left below is seen as what it is once it is on top.
        REQUIRE(::umount2(f.file.c_str(), 0) == 0);
        clean_stale_mounts();
        CHECK(f.on(f.file).empty());
    }
    SECTION("somebody has moved it") {
        auto mount = f.mount(f.file);
        REQUIRE(mount);
        const std::string elsewhere = f.make("elsewhere.raw");
        const bool moved = ::mount(f.file.c_str(), elsewhere.c_str(), nullptr, MS_MOVE, nullptr) == 0;
        CHECK(f.rt.run((*mount)->unmount(true)));
        CHECK(f.on(moved ? elsewhere : f.file).empty());
    }
}

TEST_CASE("mount: the destructor unmounts, unless the mount is left to a successor", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    auto mount = f.mount(f.file);
    REQUIRE(mount);
    const json::object saved = (*mount)->save();
    UniqueFd kept(::fcntl((*mount)->fd(), F_DUPFD_CLOEXEC, 3));
    (*mount)->leave();
    mount->reset();
    REQUIRE(f.on(f.file).size() == 1);
    clean_stale_mounts();
    REQUIRE(f.on(f.file).size() == 1);  // it is silent, not gone

    auto adopted = f.rt.run(Mount::adopt(saved, std::move(kept)));
    REQUIRE(adopted);
    CHECK((*adopted)->path() == f.file);
    CHECK(!f.mount(f.file, "second"));
    adopted->reset();
    CHECK(f.on(f.file).empty());
    CHECK(!f.rt.run(Mount::adopt(saved, UniqueFd(::open("/dev/null", O_RDWR | O_CLOEXEC)))));
    CHECK(!f.rt.run(Mount::adopt({{"device", "x"}, {"path", 1}}, UniqueFd())));
    // The place is free again.
    CHECK(f.mount(f.file, "third"));
}

TEST_CASE("mount: what a daemon that is gone has left is cleaned, and mounted over", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    auto mount = f.mount(f.file);
    REQUIRE(mount);
    (*mount)->leave();
    mount->reset();  // nobody has the descriptor now
    REQUIRE(f.on(f.file).size() == 1);
    CHECK(asked(f) == ServerState::kGone);
    SECTION("by the one who looks for all") {
        clean_stale_mounts();
        CHECK(f.on(f.file).empty());
    }
    SECTION("by the next export there") {
        auto next = f.mount(f.file, "next");
        REQUIRE(next);
        CHECK(f.on(f.file).size() == 1);
    }
}

TEST_CASE("mount: a mount that has taken the place and the numbers of one that was unmounted stays",
          "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    auto first = f.mount(f.file, "first");
    REQUIRE(first);
    REQUIRE(::umount2(f.file.c_str(), 0) == 0);
    // By another process, as it were: nothing here knows of it.
    const UniqueFd device(::open("/dev/fuse", O_RDWR | O_CLOEXEC));
    const std::string options = "fd=" + std::to_string(device.get()) + ",rootmode=100000,user_id=0,group_id=0";
    REQUIRE(::mount("gantry:first", f.file.c_str(), "fuse.gantry", 0, options.c_str()) == 0);
    if (GENERATE(false, true)) {
        f.rt.run((*first)->abort());
        pollfd ready{device.get(), POLLIN, 0};
        REQUIRE(::poll(&ready, 1, 0) >= 0);
        CHECK((ready.revents & POLLERR) == 0);
    }
    CHECK(f.rt.run((*first)->unmount(true)));
    first->reset();
    CHECK(f.on(f.file).size() == 1);
}

TEST_CASE("mount: a silent server of another process is left alone", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    auto mount = f.mount(f.file);
    REQUIRE(mount);
    const auto before = std::chrono::steady_clock::now();
    CHECK(asked(f) == ServerState::kSilent);
    CHECK(std::chrono::steady_clock::now() - before < std::chrono::seconds(5));
}

TEST_CASE("own mounts: a path into one is refused without asking its server", "[fuse][mount][root][once]") {
    if (!may_mount()) return;
    MountFixture f;
    const OwnMounts& own = OwnMounts::process();
    const UniqueFd below(::open(f.file.c_str(), O_PATH | O_CLOEXEC));
    auto mount = f.mount(f.file);
    REQUIRE(mount);
    REQUIRE(::symlink("disk.raw", f.dir.file("link").c_str()) == 0);
    for (const std::string& path : {f.file, f.dir.file("link")}) {
        const Result<> refused = own.check_path(path);
        REQUIRE(!refused);
        CHECK(refused.error().errno_value() == EDEADLK);
        CHECK(refused.error().message() ==
              "Could not open '" + path +
                  "': Resource deadlock avoided; it is FUSE export 'disk' of this process, "
                  "which would wait for itself");
    }
    CHECK(own.check_path(f.dir.path()));
    CHECK(own.check_path(f.dir.file("missing")));
    CHECK(own.check_fd(below.get(), f.file));
    CHECK(own.check_path("/proc/self/fd/" + std::to_string(below.get())));
    const UniqueFd above(::open(f.file.c_str(), O_PATH | O_CLOEXEC));
    CHECK(!own.check_fd(above.get(), f.file));
    mount->reset();
    CHECK(own.check_path(f.file));
}
