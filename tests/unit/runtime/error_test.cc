#include "runtime/error.h"

#include <catch2/catch.hpp>
#include <cerrno>

namespace gantry {
namespace {

TEST_CASE("error: an errno gives kind, text and number", "[runtime][error]") {
    const auto [number, kind] = GENERATE(table<int, ErrorKind>({{ENOENT, ErrorKind::kNotFound},
                                                                {ENOSPC, ErrorKind::kNoSpace},
                                                                {EDQUOT, ErrorKind::kNoSpace},
                                                                {EACCES, ErrorKind::kPermission},
                                                                {EROFS, ErrorKind::kReadOnly},
                                                                {EIO, ErrorKind::kIo},
                                                                {ECANCELED, ErrorKind::kCancelled},
                                                                {ETIMEDOUT, ErrorKind::kTimedOut},
                                                                {EADDRINUSE, ErrorKind::kBusy},
                                                                {ECONNREFUSED, ErrorKind::kIo}}));
    const Error e = Error::from_errno(number, "opening 'x'");
    CHECK(e.kind() == kind);
    CHECK(e.errno_value() == number);
    CHECK(e.message() == "opening 'x': " + errno_text(number));
}

TEST_CASE("error: every kind has an errno", "[runtime][error]") {
    for (int k = 0; k <= static_cast<int>(ErrorKind::kShutdown); ++k) {
        CHECK(Error(static_cast<ErrorKind>(k), "x").errno_value() > 0);
    }
    CHECK(Error(ErrorKind::kNoSpace, "x").errno_value() == ENOSPC);
    CHECK(Error(ErrorKind::kIo, "x", EREMOTEIO).errno_value() == EREMOTEIO);
}

TEST_CASE("error: context goes in front, copies are independent", "[runtime][error]") {
    const Error first(ErrorKind::kCorrupt, "bad magic");
    Error copy(first);
    copy = std::move(copy).context("node 'd'").with_class(QmpClass::kDeviceNotFound);
    CHECK(copy.message() == "node 'd': bad magic");
    CHECK(copy.qmp_class() == QmpClass::kDeviceNotFound);
    CHECK(first.message() == "bad magic");
    CHECK(first.qmp_class() == QmpClass::kGenericError);
}

Result<int> parse(bool good) {
    if (!good) return fail(ErrorKind::kInvalid, "no {}", "number");
    return 5;
}
Result<int> twice(bool good) {
    TRY(const int n, parse(good));
    CHECK_OK(parse(good));
    return 2 * n;
}

TEST_CASE("error: TRY binds the value or returns the error", "[runtime][error]") {
    CHECK(*twice(true) == 10);
    const auto r = twice(false);
    REQUIRE_FALSE(r);
    CHECK(r.error().message() == "no number");
}

TEST_CASE("error: an unknown errno has a text", "[runtime][error]") {
    CHECK(errno_text(99999) == "Unknown error 99999");
}

}  // namespace
}  // namespace gantry
