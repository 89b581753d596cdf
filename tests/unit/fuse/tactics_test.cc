#include "fuse/tactics.h"

#include <catch2/catch.hpp>

using namespace gantry;
using namespace gantry::fuse;

namespace {

/// A client whose requests take so long with each tactic.
struct Client {
    std::array<std::chrono::microseconds, kTactics> takes;
    Tactics tactics;
    uint64_t answered = 0;
    Clock::time_point now{};
    std::array<uint64_t, kTactics> used{};

    void run(uint64_t requests) {
        for (uint64_t i = 0; i < requests; ++i) {
            const auto tactic = static_cast<size_t>(tactics.next(answered, now));
            ++answered;
            ++used[tactic];
            now += takes[tactic];
        }
    }
};

using us = std::chrono::microseconds;
constexpr uint64_t kTrials = kTactics * (Tactics::kSettle + Tactics::kMeasure) + 8;

}  // namespace

TEST_CASE("tactics: the fastest one is found and kept", "[fuse][once]") {
    const auto [follow, pair, poll, best] = GENERATE(table<int, int, int, Tactic>({
        {10, 20, 22, Tactic::kFollow},
        {35, 20, 22, Tactic::kPair},
        {40, 50, 20, Tactic::kPoll},
    }));
    Client client{.takes = {us(follow), us(pair), us(poll)}};
    client.run(kTrials);
    REQUIRE(client.tactics.decided());
    CHECK(client.tactics.best() == best);
    client.run(20 * Tactics::kKeepMost);
    client.used = {};
    client.run(20 * Tactics::kKeepMost);
    CHECK(client.tactics.best() == best);
    // Trying the others costs little.
    CHECK(client.used[static_cast<size_t>(best)] > 20 * Tactics::kKeepMost * 97 / 100);
}

TEST_CASE("tactics: polling must be clearly better than what costs no CPU", "[fuse][once]") {
    Client client{.takes = {us(35), us(25), us(22)}};
    client.run(kTrials);
    CHECK(client.tactics.best() == Tactic::kPair);
}

TEST_CASE("tactics: what has become better is found when it is tried again", "[fuse][once]") {
    Client client{.takes = {us(35), us(20), us(30)}};
    client.run(kTrials);
    REQUIRE(client.tactics.best() == Tactic::kPair);
    client.takes[0] = us(5);
    client.run(8 * Tactics::kKeepLeast);
    CHECK(client.tactics.best() == Tactic::kFollow);
    // Also when the best has become bad.
    client.takes[0] = us(60);
    client.run(16 * Tactics::kKeepMost);
    CHECK(client.tactics.best() == Tactic::kPair);
}

TEST_CASE("tactics: what cannot be used is left out, and chosen no more", "[fuse][once]") {
    Client client{.takes = {us(5), us(20), us(40)}};
    for (uint64_t i = 0; i < 4 * Tactics::kKeepLeast; ++i) {
        if (client.tactics.next(client.answered, client.now) == Tactic::kFollow) {
            client.tactics.forbid(Tactic::kFollow);
            CHECK(client.tactics.next(client.answered, client.now) != Tactic::kFollow);
        }
        client.run(1);
    }
    CHECK(client.tactics.decided());
    CHECK(client.tactics.best() == Tactic::kPair);
    // Also when that is found out later.
    client.tactics.forbid(Tactic::kPair);
    client.run(1);
    CHECK(client.tactics.best() != Tactic::kPair);
}

TEST_CASE("tactics: several requests at once begin it anew", "[fuse][once]") {
    Client client{.takes = {us(35), us(20), us(30)}};
    client.run(kTrials);
    REQUIRE(client.tactics.decided());
    client.tactics.reset();
    CHECK_FALSE(client.tactics.decided());
    client.run(kTrials);
    CHECK(client.tactics.best() == Tactic::kPair);
}
