// WritePlacement: both ways are tried, the clearly faster one is taken, and tried again later.

#include "nbd/write_placement.h"

#include <catch2/catch.hpp>

using gantry::nbd::WritePlacement;
using namespace std::chrono_literals;

namespace {

/// A client that keeps the connection busy: each write takes what its place costs.
struct Run {
    WritePlacement placement;
    WritePlacement::Clock::time_point now{};
    std::chrono::microseconds here, beside;

    /// How many of the next `writes` were done beside the loop.
    uint32_t writes(uint32_t count) {
        uint32_t placed_beside = 0;
        for (uint32_t i = 0; i < count; ++i) {
            const bool is_beside = placement.beside(now);
            placed_beside += is_beside;
            now += is_beside ? beside : here;
        }
        return placed_beside;
    }
};

}  // namespace

TEST_CASE("large writes go where they are faster", "[write_placement]") {
    const uint32_t tries = 2 * WritePlacement::kTry;
    SECTION("beside the loop") {
        Run run{.placement = {}, .here = 100us, .beside = 60us};
        CHECK(run.writes(tries) == WritePlacement::kTry);
        CHECK(run.writes(WritePlacement::kSettled) == WritePlacement::kSettled);
    }
    SECTION("on the loop") {
        Run run{.placement = {}, .here = 60us, .beside = 100us};
        CHECK(run.writes(tries) == WritePlacement::kTry);
        CHECK(run.writes(WritePlacement::kSettled) == 0);
    }
    SECTION("on the loop when there is no difference") {
        Run run{.placement = {}, .here = 60us, .beside = 58us};
        run.writes(tries);
        CHECK(run.writes(WritePlacement::kSettled) == 0);
    }
}

TEST_CASE("the place of large writes follows what changes", "[write_placement]") {
    Run run{.placement = {}, .here = 100us, .beside = 60us};
    run.writes(2 * WritePlacement::kTry + WritePlacement::kSettled);
    run.here = 60us;
    run.beside = 100us;
    CHECK(run.writes(2 * WritePlacement::kTry) == WritePlacement::kTry);
    CHECK(run.writes(WritePlacement::kSettled) == 0);
}
