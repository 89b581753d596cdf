#include "runtime/fd_sets.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>

#include "tests/support/temp_dir.h"

using namespace gantry;

namespace {

struct Files {
    test::TempDir dir;
    FdSets sets;
    UniqueFd open(int flags) { return UniqueFd(::open(dir.file("f").c_str(), flags | O_CREAT | O_CLOEXEC, 0600)); }
    std::string why(std::string_view path, int flags) {
        auto opened = sets.open(path, flags);
        return opened ? "" : opened.error().message();
    }
};

ino_t inode(int fd) {
    struct stat st{};
    ::fstat(fd, &st);
    return st.st_ino;
}

}  // namespace

TEST_CASE("fd sets: a member is found by its access mode", "[runtime][fdset][once]") {
    Files f;
    auto read = f.sets.add(f.open(O_RDONLY), {}, "r");
    REQUIRE(read);
    CHECK(read->first == 0);
    CHECK(
        f.why("/dev/fdset/0", O_RDWR) ==
        "Could not dup FD for /dev/fdset/0 flags 2: Permission denied; add a descriptor that is opened for reading and "
        "writing to the set");
    REQUIRE(f.sets.add(f.open(O_RDWR), 0, {}));
    auto opened = f.sets.open("/dev/fdset/0", O_RDWR);
    REQUIRE(opened);
    CHECK((::fcntl(opened->fd.get(), F_GETFL) & O_ACCMODE) == O_RDWR);
    CHECK(::fcntl(opened->fd.get(), F_GETFD) == FD_CLOEXEC);
    CHECK(inode(opened->fd.get()) == inode(read->second));
}

TEST_CASE("fd sets: what names no set is refused", "[runtime][fdset][once]") {
    Files f;
    REQUIRE(f.sets.add(f.open(O_RDONLY), 3, {}));
    for (std::string_view path : {"/dev/fdset/", "/dev/fdset/4", "/dev/fdset/-3", "/dev/fdset/3x", "/dev/fdset/3/..",
                                  "/dev/fdset/99999999999999999999"}) {
        INFO(path);
        CHECK(f.why(path, O_RDONLY).starts_with(fmt::format("Could not dup FD for {} flags 0: No such file", path)));
    }
    CHECK(f.why("/dev/fdset/3", O_RDONLY) == "");
    CHECK(FdSets::is_set("/dev/fdset/3"));
    CHECK_FALSE(FdSets::is_set("/dev/fd/3"));
}

TEST_CASE("fd sets: numbers that are free are taken, the smallest first", "[runtime][fdset][once]") {
    Files f;
    const auto add = [&](std::optional<int64_t> id) {
        auto added = f.sets.add(f.open(O_RDONLY), id, {});
        return added ? added->first : -1;
    };
    CHECK(add(1) == 1);
    CHECK(add({}) == 0);
    CHECK(add({}) == 2);
    CHECK(add(-1) == -1);
    CHECK(f.sets.remove(1, {}));
    CHECK(add({}) == 1);
    CHECK(f.sets.list().size() == 3);
}

TEST_CASE("fd sets: a set without members stays while somebody uses it", "[runtime][fdset][once]") {
    Files f;
    const auto member = f.sets.add(f.open(O_RDONLY), {}, {});
    REQUIRE(member);
    auto use = f.sets.open("/dev/fdset/0", O_RDONLY);
    REQUIRE(use);
    CHECK(f.sets.remove(0, member->second));
    REQUIRE(f.sets.list().size() == 1);
    CHECK(f.sets.list()[0].members.empty());
    CHECK(f.sets.remove(0, member->second).error().message() ==
          fmt::format("File descriptor named 'fdset-id:0, fd:{}' not found", member->second));
    use->use.reset();
    CHECK(f.sets.list().empty());
    CHECK(f.sets.remove(0, {}).error().message() == "File descriptor named 'fdset-id:0' not found");
}
