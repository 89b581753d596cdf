#include "cli/readable.h"

#include <catch2/catch.hpp>

#include "schema/json_dialect.h"

using namespace gantry::cli;

namespace {

std::string shown(std::string_view text) { return readable(gantry::schema::parse_json(text).value()); }

}  // namespace

TEST_CASE("readable: JSON as indented lines", "[cli]") {
    CHECK(shown("{}").empty());
    CHECK(shown("[]") == "[]\n");
    CHECK(shown("5") == "5\n");
    CHECK(shown("\"text\"") == "text\n");
    CHECK(shown("{\"a\": 1, \"b\": {\"c\": true, \"d\": null}, \"e\": \"x y\"}") ==
          "a: 1\nb:\n  c: true\n  d: null\ne: x y\n");
    CHECK(shown("[{\"a\": 1, \"b\": [1, 2]}, 3, {\"c\": {}}]") == "- a: 1\n  b:\n    - 1\n    - 2\n- 3\n- c: {}\n");
}

TEST_CASE("readable: tables are as wide as their widest cells", "[cli]") {
    CHECK(table({}).empty());
    CHECK(table({{"NAME", "SIZE"}, {"a", "1 MiB"}, {"longer name", "2"}}) ==
          "NAME         SIZE\na            1 MiB\nlonger name  2\n");
    CHECK(table({{"A", "B", "C"}, {"x"}}) == "A  B  C\nx\n");
}

TEST_CASE("readable: sizes in binary units with the exact number", "[cli]") {
    auto [bytes, text] = GENERATE(table<uint64_t, std::string>({
        {0, "0 B"},
        {1023, "1023 B"},
        {1024, "1 KiB (1024 bytes)"},
        {1536, "1.5 KiB (1536 bytes)"},
        {1610612736, "1.5 GiB (1610612736 bytes)"},
        {UINT64_MAX, "16 EiB (18446744073709551615 bytes)"},
    }));
    CHECK(readable_size(bytes) == text);
}
