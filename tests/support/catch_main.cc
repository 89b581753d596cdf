// The main function of every Catch2 program. GANTRY_TEST_SHARD=2/4 runs the second quarter of the cases that are
// chosen: neighbours go to different shards, those tagged [long] are dealt first.

#define CATCH_CONFIG_RUNNER
#include <algorithm>
#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

namespace {

struct Shard {
    unsigned number = 1, count = 1;
};

bool parse(const char* text, Shard& shard) {
    int end = 0;
    return std::sscanf(text, "%u/%u%n", &shard.number, &shard.count, &end) == 2 && text[end] == '\0' &&
           shard.number >= 1 && shard.number <= shard.count;
}

std::vector<Catch::TestCase> chosen(Catch::Session& session) {
    const Catch::Config& config = session.config();
    return Catch::filterTests(Catch::getAllTestCasesSorted(config), config.testSpec(), config);
}

/// As a test specification has it.
std::string escaped(const std::string& name) {
    std::string text;
    for (const char c : name) {
        if (std::string_view("\\,[]\"~*").find(c) != std::string_view::npos) text += '\\';
        text += c;
    }
    return text;
}

/// The session runs its share only. False when there is none, or a name chooses other cases, too.
bool narrow(Catch::Session& session, Shard shard) {
    std::vector<Catch::TestCase> all, others;
    for (const Catch::TestCase& test : chosen(session))
        (std::ranges::count(test.lcaseTags, "long") != 0 ? all : others).push_back(test);
    all.insert(all.end(), others.begin(), others.end());
    std::string names;
    size_t count = 0;
    for (size_t i = shard.number - 1; i < all.size(); i += shard.count, ++count)
        names += (count == 0 ? "" : ",") + escaped(all[i].name);
    Catch::ConfigData data = session.configData();
    data.testsOrTags = {names};
    session.useConfigData(data);
    return count != 0 && chosen(session).size() == count;
}

}  // namespace

int main(int argc, char** argv) {
    Catch::Session session;
    if (const int status = session.applyCommandLine(argc, argv); status != 0) return status;
    Shard shard;
    if (const char* text = std::getenv("GANTRY_TEST_SHARD");
        text && !(parse(text, shard) && (shard.count == 1 || narrow(session, shard)))) {
        std::fprintf(stderr, "GANTRY_TEST_SHARD: '%s' is no part of what there is to run\n", text);
        return 2;
    }
    return session.run();
}
