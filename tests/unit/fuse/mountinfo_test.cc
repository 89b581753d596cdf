#include "fuse/mountinfo.h"

#include <sys/sysmacros.h>

#include <catch2/catch.hpp>

using namespace gantry;
using namespace gantry::fuse;

TEST_CASE("mountinfo: a line's parts, with and without optional fields", "[fuse][mount]") {
    const auto all = parse_mountinfo(
        "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 shared:2 - ext3 /dev/root rw,errors=continue\n"
        "87 36 0:55 / /srv/disk.raw ro,nosuid - fuse.gantry gantry:disk "
        "ro,user_id=1000,group_id=100,max_read=1048576\n");
    REQUIRE(all.size() == 2);
    CHECK(all[0].id == 36);
    CHECK(all[0].parent == 35);
    CHECK(all[0].device == ::gnu_dev_makedev(98, 0));
    CHECK(all[0].root == "/mnt1");
    CHECK(all[0].path == "/mnt2");
    CHECK(all[0].type == "ext3");
    CHECK(all[1].parent == 36);
    CHECK(all[1].path == "/srv/disk.raw");
    CHECK(all[1].type == kFilesystemType);
    CHECK(all[1].source == "gantry:disk");
    CHECK(option_number(all[1].options, "user_id", 7) == 1000);
    CHECK(option_number(all[1].options, "group_id", 7) == 100);
    CHECK(option_number(all[1].options, "id", 7) == 7);
    CHECK(option_number(all[1].options, "ro", 7) == 7);
}

TEST_CASE("mountinfo: escaped paths are those of the file system", "[fuse][mount]") {
    const auto all = parse_mountinfo("1 2 0:5 / /a\\040b\\011c\\012d\\134e rw - fuse.gantry gantry:x rw\n");
    REQUIRE(all.size() == 1);
    CHECK(all[0].path == "/a b\tc\nd\\e");
}

TEST_CASE("mountinfo: lines that are none are left out", "[fuse][mount]") {
    const auto line =
        GENERATE(as<std::string>{}, "", "\n\n", "1", "1 2", "1 2 3", "x 2 0:5 / /a rw - t s o",
                 "1 2 05 / /a rw - t s o", "1 2 0:x / /a rw - t s o", "1 2 0:5 / /a rw shared:1", "1 2 0:5 / /a rw -",
                 "1 2 0:5 / /a rw", "1 2 0:5", "1 2 0:5 / /a\\0", " ", "- - - - - - -");
    CAPTURE(line);
    CHECK(parse_mountinfo(line).empty());
    const auto all = parse_mountinfo(line + "\n1 2 0:5 / /a rw - t s o");
    REQUIRE(all.size() == 1);
    CHECK(all[0].options == "o");
}

TEST_CASE("mountinfo: that of this process names the root", "[fuse][mount]") {
    const auto all = read_mountinfo();
    REQUIRE(all);
    CHECK(std::ranges::any_of(*all, [](const MountEntry& entry) { return entry.path == "/"; }));
}
