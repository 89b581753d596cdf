#include "cli/pid_file.h"

#include <sys/stat.h>
#include <unistd.h>

#include <catch2/catch.hpp>
#include <filesystem>
#include <fstream>

#include "tests/support/child.h"
#include "tests/support/temp_dir.h"

using gantry::cli::PidFile;

namespace {

std::string content(const std::string& path) {
    std::ifstream in(path);
    return std::string(std::istreambuf_iterator<char>(in), {});
}

}  // namespace

TEST_CASE("pid file: holds the id while it lives, and goes", "[cli]") {
    gantry::test::TempDir dir;
    const std::string path = dir.file("pid");
    {
        auto file = PidFile::create(path);
        REQUIRE(file);
        CHECK(content(path) == std::to_string(::getpid()) + "\n");
        PidFile moved = std::move(*file);
        CHECK(std::filesystem::exists(path));
        moved.remove();
        CHECK_FALSE(std::filesystem::exists(path));
        moved.remove();
    }
    CHECK_FALSE(std::filesystem::exists(path));
}

TEST_CASE("pid file: another process is refused while the first lives", "[cli]") {
    gantry::test::TempDir dir;
    const std::string path = dir.file("pid");
    auto file = PidFile::create(path);
    REQUIRE(file);
    CHECK(gantry::test::in_child([&] {
              auto second = PidFile::create(path);
              return second ? std::string("taken") : second.error().message();
          }) == "cannot create PID file: Cannot lock pid file: Resource temporarily unavailable");
    CHECK(content(path) == std::to_string(::getpid()) + "\n");
}

TEST_CASE("pid file: what a dead process left is taken over", "[cli]") {
    gantry::test::TempDir dir;
    const std::string path = dir.file("pid");
    std::ofstream(path) << "99999999 and more text than the new one\n";
    auto file = PidFile::create(path);
    REQUIRE(file);
    CHECK(content(path) == std::to_string(::getpid()) + "\n");
}

TEST_CASE("pid file: where it cannot be made, the error names it", "[cli]") {
    gantry::test::TempDir dir;
    for (const std::string& path : {dir.file("no/pid"), dir.path()}) {
        auto file = PidFile::create(path);
        REQUIRE_FALSE(file);
        CHECK(file.error().message().starts_with("cannot create PID file: "));
        CHECK(file.error().message().find(path) != std::string::npos);
    }
}
