#include "fuse/state_file.h"

#include <sys/mman.h>
#include <unistd.h>

#include <catch2/catch.hpp>

using gantry::UniqueFd;
using gantry::fuse::StateFile;
namespace json = boost::json;

namespace {

UniqueFd copy_of(const StateFile& file) { return UniqueFd(::dup(file.fd())); }

}  // namespace

TEST_CASE("state file: another process reads what was written last", "[fuse]") {
    auto file = StateFile::create();
    REQUIRE(file);
    CHECK_FALSE((*file)->read());
    CHECK_FALSE(StateFile::adopt(copy_of(**file)));  // nothing in it
    for (int i = 0; i < 5; ++i) {
        REQUIRE((*file)->write({{"i", i}, {"text", std::string(static_cast<size_t>(100 * (5 - i)), 'x')}}));
        auto other = StateFile::adopt(copy_of(**file));
        REQUIRE(other);
        CHECK((*other)->read()->at("i").as_int64() == i);
    }
    auto next = StateFile::adopt(copy_of(**file));
    REQUIRE((*next)->write({{"i", 5}}));
    CHECK((*next)->read()->at("i").as_int64() == 5);
}

TEST_CASE("state file: who dies while he writes leaves what was there before", "[fuse]") {
    auto file = StateFile::create();
    REQUIRE((*file)->write({{"i", 1}}));
    REQUIRE((*file)->write({{"i", 2}}));
    const size_t cut = GENERATE(0, 8, 16, 24, 32, 36);
    // The third goes where the first was: as much of it as was written before the end.
    std::string place(64, '\0');
    REQUIRE((*file)->write({{"i", 3}}));
    REQUIRE(::pread((*file)->fd(), place.data(), place.size(), StateFile::kPlace) == 64);
    auto torn = StateFile::create();
    REQUIRE((*torn)->write({{"i", 1}}));
    REQUIRE((*torn)->write({{"i", 2}}));
    REQUIRE(::pwrite((*torn)->fd(), place.data(), cut, StateFile::kPlace) == static_cast<ssize_t>(cut));
    INFO(cut);
    auto read = StateFile::adopt(copy_of(**torn));
    REQUIRE(read);
    CHECK((*read)->read()->at("i").as_int64() == 2);
}

TEST_CASE("state file: what is none is refused", "[fuse]") {
    CHECK_FALSE(StateFile::adopt(UniqueFd()));
    UniqueFd empty(::memfd_create("x", MFD_CLOEXEC));
    CHECK_FALSE(StateFile::adopt(UniqueFd(::dup(empty.get()))));
    REQUIRE(::ftruncate(empty.get(), 2 * StateFile::kPlace) == 0);
    CHECK_FALSE(StateFile::adopt(UniqueFd(::dup(empty.get()))));
    auto file = StateFile::create();
    CHECK_FALSE((*file)->write({{"text", std::string(StateFile::kPlace, 'x')}}));
}
