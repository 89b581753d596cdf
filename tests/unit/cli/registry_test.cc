#include "cli/registry.h"

#include <algorithm>
#include <catch2/catch.hpp>
#include <set>

#include "block/create.h"
#include "cli/qmp_client.h"
#include "schema/schema.h"
#include "schema/unserved.h"
#include "tests/support/temp_dir.h"

using namespace gantry;

TEST_CASE("registry: the schema serves what the tables hold, and nothing else", "[cli]") {
    cli::check_registry();  // aborts otherwise
    std::set<std::string> drivers, values;
    for (const block::Driver& driver : cli::drivers()) {
        CHECK(drivers.insert(std::string(driver.name)).second);
        CHECK_FALSE(schema::unserved_driver(driver.name));
    }
    for (const auto& value : schema::type("BlockdevDriver").values) values.insert(std::string(value.name));
    CHECK(drivers == values);
    for (const exports::ExportType& type : cli::export_types()) {
        CHECK(schema::has_value(schema::type("BlockExportType"), type.name));
        CHECK_FALSE(schema::unserved_export(type.name));
    }
}

TEST_CASE("registry: every image that can be made has its options, and the reverse", "[cli]") {
    const schema::Type& options = schema::type("BlockdevCreateOptions");
    for (const block::Driver& driver : cli::drivers()) {
        INFO(driver.name);
        const auto variant = std::ranges::find(options.variants, driver.name, &schema::Variant::value);
        const bool described = variant != options.variants.end() && variant->type;
        CHECK(described == (driver.creator && driver.creator->create));
        if (driver.creator && (driver.creator->create_file || driver.creator->measure)) {
            CHECK_FALSE(driver.creator->words().empty());
        }
    }
}

TEST_CASE("control sockets: the directory follows the environment", "[cli]") {
    const auto directory = [](const char* runtime, const char* xdg) {
        runtime ? ::setenv("RUNTIME_DIRECTORY", runtime, 1) : ::unsetenv("RUNTIME_DIRECTORY");
        xdg ? ::setenv("XDG_RUNTIME_DIR", xdg, 1) : ::unsetenv("XDG_RUNTIME_DIR");
        std::string found = cli::control_directory();
        ::unsetenv("RUNTIME_DIRECTORY");
        ::unsetenv("XDG_RUNTIME_DIR");
        return found;
    };
    CHECK(directory("/run/gantry/a:/run/b", "/run/user/1") == "/run/gantry/a");
    CHECK(directory(nullptr, "/run/user/1") == "/run/user/1/gantry");
    CHECK(directory("", "") == directory(nullptr, nullptr));
}

TEST_CASE("control sockets: an absent one is named in the error", "[cli]") {
    test::TempDir dir;
    auto client = cli::QmpClient::connect(dir.file("none.qmp"));
    REQUIRE_FALSE(client);
    CHECK(client.error().message() == "Control socket '" + dir.file("none.qmp") + "': No such file or directory");
    auto longer = cli::QmpClient::connect("/" + std::string(200, 'x'));
    REQUIRE_FALSE(longer);
    CHECK(longer.error().message().find("longer than") != std::string::npos);
}
