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
            if (tactics.due(answered)) tactics.step(answered, now);
            const auto tactic = static_cast<size_t>(tactics.current());
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
    const auto [pair, follow, poll, best] = GENERATE(table<int, int, int, Tactic>({
        {20, 10, 22, Tactic::kFollow},
        {20, 35, 22, Tactic::kPair},
        {50, 40, 20, Tactic::kPoll},
    }));
    Client client{.takes = {us(pair), us(follow), us(poll)}};
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
    Client client{.takes = {us(25), us(35), us(22)}};
    client.run(kTrials);
    CHECK(client.tactics.best() == Tactic::kPair);
}

TEST_CASE("tactics: what has become better is found when it is tried again", "[fuse][once]") {
    Client client{.takes = {us(20), us(35), us(30)}};
    client.run(kTrials);
    REQUIRE(client.tactics.best() == Tactic::kPair);
    client.takes[1] = us(5);
    client.run(16 * Tactics::kKeepMost);
    CHECK(client.tactics.best() == Tactic::kFollow);
    // Also when the best has become bad.
    client.takes[1] = us(60);
    client.run(16 * Tactics::kKeepMost);
    CHECK(client.tactics.best() == Tactic::kPair);
}

TEST_CASE("tactics: what cannot be used is left out, and chosen no more", "[fuse][once]") {
    Client client{.takes = {us(20), us(5), us(40)}};
    for (uint64_t i = 0; i < 4 * Tactics::kKeepLeast; ++i) {
        client.run(1);
        if (client.tactics.current() == Tactic::kFollow) {
            client.tactics.forbid(Tactic::kFollow);
            client.run(1);
            CHECK(client.tactics.current() != Tactic::kFollow);
        }
    }
    CHECK(client.tactics.decided());
    CHECK(client.tactics.best() == Tactic::kPair);
    // Also when that is found out later.
    client.tactics.forbid(Tactic::kPair);
    client.run(1);
    CHECK(client.tactics.best() != Tactic::kPair);
}

TEST_CASE("tactics: after several requests at once it goes on with the best", "[fuse][once]") {
    Client client{.takes = {us(20), us(35), us(30)}};
    client.run(kTrials);
    REQUIRE(client.tactics.decided());
    client.tactics.reset();
    client.used = {};
    client.run(Tactics::kKeepLeast);
    CHECK(client.used[static_cast<size_t>(Tactic::kPair)] == Tactics::kKeepLeast);
}

TEST_CASE("tactics: trials that were interrupted are made again", "[fuse][once]") {
    Client client{.takes = {us(20), us(35), us(30)}};
    client.run(Tactics::kSettle + Tactics::kMeasure);
    client.tactics.reset();
    CHECK_FALSE(client.tactics.decided());
    client.run(kTrials);
    CHECK(client.tactics.best() == Tactic::kPair);
}
