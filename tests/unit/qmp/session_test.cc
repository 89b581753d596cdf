#include "qmp/session.h"

#include <atomic>
#include <catch2/catch.hpp>

#include "qmp/command.h"
#include "qmp_bench.h"

using namespace gantry;
using gantry::test::kNegotiate;
using gantry::test::QmpBench;
using gantry::test::Wire;
using gantry::test::with_session;

namespace {

/// What the client saw, checked after its thread has ended.
struct Seen {
    std::vector<std::string> lines;
    void take(Wire& wire, int count) {
        for (int i = 0; i < count; i++) lines.push_back(wire.line());
    }
};

std::string version_reply(std::string_view id) {
    json::object reply{{"return", qmp::version_info()}};
    return schema::to_json(reply).substr(0, schema::to_json(reply).size() - 1) + fmt::format(", \"id\": {}}}", id);
}

std::string error_reply(std::string_view kind, std::string_view desc, std::string_view id = {}) {
    std::string out = "{";
    if (!id.empty()) out += fmt::format("\"id\": {}, ", id);
    return out + fmt::format("\"error\": {{\"class\": \"{}\", \"desc\": \"{}\"}}}}", kind, desc);
}

}  // namespace

TEST_CASE("session: greets, negotiates and answers in order", "[qmp]") {
    QmpBench bench;
    Seen seen;
    with_session(bench, [&](Wire& wire) {
        wire.send(R"({"execute": "query-version", "id": 0})");
        wire.send(kNegotiate);
        for (int i = 1; i <= 20; i++) wire.send(fmt::format(R"({{"execute": "query-version", "id": {}}})", i));
        seen.take(wire, 23);
    });
    REQUIRE(seen.lines.size() == 23);
    CHECK(seen.lines[0].starts_with(R"({"QMP": {"version": {"qemu": {)"));
    CHECK(seen.lines[0].ends_with(R"("capabilities": ["oob"]}})"));
    CHECK(seen.lines[1] ==
          error_reply("CommandNotFound", "Expecting capabilities negotiation with 'qmp_capabilities'", "0"));
    CHECK(seen.lines[2] == R"({"return": {}})");
    for (int i = 1; i <= 20; i++) CHECK(seen.lines[static_cast<size_t>(i) + 2] == version_reply(std::to_string(i)));
}

TEST_CASE("session: malformed input is answered in its turn", "[qmp]") {
    QmpBench bench;
    Seen seen;
    with_session(bench, [&](Wire& wire) {
        wire.send(kNegotiate);
        wire.send(
            R"({"execute": "query-version", "id": 1} nonsense {"execute": "query-version", "id": 2})"
            R"([1]{"execute": "query-version", "id": 3}{"bogus": 1, "id": 4}{"execute": "query-version", "id": 5})");
        seen.take(wire, 9);
    });
    REQUIRE(seen.lines.size() == 9);
    CHECK(seen.lines[2] == version_reply("1"));
    CHECK(seen.lines[3] == error_reply("GenericError", "JSON parse error, invalid keyword 'nonsense'"));
    CHECK(seen.lines[4] == version_reply("2"));
    CHECK(seen.lines[5] == error_reply("GenericError", "QMP input must be a JSON object"));
    CHECK(seen.lines[6] == version_reply("3"));
    CHECK(seen.lines[7] == error_reply("GenericError", "QMP input member 'bogus' is unexpected", "4"));
    CHECK(seen.lines[8] == version_reply("5"));
}

TEST_CASE("session: a half-closed client gets every answer", "[qmp]") {
    QmpBench bench;
    Seen seen;
    with_session(bench, [&](Wire& wire) {
        wire.send(kNegotiate);
        for (int i = 0; i < 50; i++) wire.send(fmt::format(R"({{"execute": "query-qmp-schema", "id": {}}})", i));
        wire.half_close();
        seen.take(wire, 53);
    });
    REQUIRE(seen.lines.size() == 53);
    for (int i = 0; i < 50; i++)
        CHECK(seen.lines[static_cast<size_t>(i) + 2].ends_with(fmt::format(R"("id": {}}})", i)));
    CHECK(seen.lines[52] == "<end>");
}

TEST_CASE("session: a client may leave at any byte", "[qmp]") {
    QmpBench bench;
    const std::string text = std::string(kNegotiate) + R"({"execute": "query-qmp-schema"})";
    for (size_t length = 0; length <= text.size(); length++) {
        with_session(bench, [&](Wire& wire) { wire.send(text.substr(0, length)); });
    }
    CHECK(bench.quits == 0);
}

TEST_CASE("session: out of band errors overtake, nothing runs out of band", "[qmp]") {
    QmpBench bench;
    Seen seen;
    with_session(bench, [&](Wire& wire) {
        wire.send(R"({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})");
        seen.take(wire, 2);
        wire.send(R"({"exec-oob": "query-version", "id": 1})");
        seen.take(wire, 1);
        wire.send(R"({"exec-oob": "no-such", "id": 2})");
        seen.take(wire, 1);
    });
    REQUIRE(seen.lines.size() == 4);
    CHECK(seen.lines[2] == error_reply("GenericError", "The command query-version does not support OOB", "1"));
    CHECK(seen.lines[3] == error_reply("CommandNotFound", "The command no-such has not been found", "2"));
}

TEST_CASE("session: pretty replies end each line with CR LF", "[qmp]") {
    QmpBench bench;
    Seen seen;
    with_session(
        bench,
        [&](Wire& wire) {
            wire.send(kNegotiate);
            for (int messages = 0; messages < 2;) {
                seen.take(wire, 1);
                if (seen.lines.back() == "}" || seen.lines.back().starts_with('<')) messages++;
            }
        },
        true);
    CHECK(seen.lines[0] == "{");
    CHECK(seen.lines[1] == "    \"QMP\": {");
    REQUIRE(seen.lines.size() > 3);
    CHECK(seen.lines[seen.lines.size() - 3] == "    \"return\": {");
    CHECK(seen.lines[seen.lines.size() - 2] == "    }");
}

TEST_CASE("session: events come after the negotiation and between replies", "[qmp]") {
    QmpBench bench;
    Seen seen;
    std::atomic<bool> negotiated = false;
    const json::object event{{"event", "TEST"}};
    struct Sender {
        static Task<void> run(qmp::Session* session, const json::object* event, std::atomic<bool>* negotiated) {
            session->send_event(*event);  // too early
            const bool ready = co_await test::wait_until([negotiated] { return negotiated->load(); });
            CHECK(ready);
            for (int i = 0; i < 3; i++) session->send_event(*event);
        }
    };
    TaskScope scope;
    with_session(
        bench,
        [&](Wire& wire) {
            seen.take(wire, 1);
            wire.send(kNegotiate);
            seen.take(wire, 1);
            negotiated = true;
            seen.take(wire, 3);
            wire.send(R"({"execute": "query-version", "id": 1})");
            seen.take(wire, 1);
        },
        false, [&](qmp::Session& session) { scope.spawn(Sender::run(&session, &event, &negotiated)); });
    bench.rt.run(scope.join());
    REQUIRE(seen.lines.size() == 6);
    CHECK(seen.lines[1] == R"({"return": {}})");
    for (size_t i = 2; i < 5; i++) CHECK(seen.lines[i] == R"({"event": "TEST"})");
    CHECK(seen.lines[5] == version_reply("1"));
}

TEST_CASE("session: a client that does not read pauses its own commands", "[qmp]") {
    QmpBench bench;
    std::atomic<bool> look = false;
    struct Watch {
        static Task<void> run(QmpBench* bench, qmp::Session* session, std::atomic<bool>* look) {
            const bool asked = co_await test::wait_until([look] { return look->load(); });
            CHECK(asked);
            // It executes until about 1 MiB waits for the client, far from all of the 500 answers.
            size_t nodes = 0;
            for (int still = 0; still < 100;) {
                const size_t now = bench->graph.nodes().size();
                still = now == nodes ? still + 1 : 0;
                nodes = now;
                co_await sleep_for(std::chrono::milliseconds(1));
            }
            CHECK(nodes > 0);
            CHECK(nodes < 500);
            session->close();  // and ends at once when it must
        }
    };
    TaskScope scope;
    bool ended = false;
    with_session(
        bench,
        [&](Wire& wire) {
            wire.send(kNegotiate);
            std::thread sender([&] {
                for (int i = 0; i < 500; i++) {
                    wire.send(fmt::format(R"({{"execute": "blockdev-add", "arguments": {{"driver": "null-co", )"
                                          R"("node-name": "n{}"}}}}{{"execute": "query-qmp-schema"}})",
                                          i));
                }
            });
            look = true;
            sender.join();  // the session's end breaks the connection
            ended = wire.closed_by_peer();
        },
        false, [&](qmp::Session& session) { scope.spawn(Watch::run(&bench, &session, &look)); });
    bench.rt.run(scope.join());
    CHECK(ended);
}

TEST_CASE("session: a client that reads no events is dropped when too much waits", "[qmp]") {
    QmpBench bench;
    const json::object event{{"event", "TEST"}, {"data", {{"text", std::string(1 << 20, 'x')}}}};
    std::atomic<bool> negotiated = false;
    struct Flood {
        static Task<void> run(qmp::Session* session, const json::object* event, std::atomic<bool>* negotiated) {
            const bool ready = co_await test::wait_until([negotiated] { return negotiated->load(); });
            CHECK(ready);
            // 100 MiB; all of it before the session ends, which needs a turn of the loop.
            for (int i = 0; i < 100; i++) session->send_event(*event);
        }
    };
    TaskScope scope;
    std::vector<std::string> lines;
    bool gone = false;
    with_session(
        bench,
        [&](Wire& wire) {
            wire.send(kNegotiate);
            lines = {wire.line(), wire.line()};
            negotiated = true;
            gone = wire.closed_by_peer();
        },
        false, [&](qmp::Session& session) { scope.spawn(Flood::run(&session, &event, &negotiated)); });
    bench.rt.run(scope.join());
    CHECK(gone);
    REQUIRE(lines.size() == 2);
    CHECK(lines[1] == R"({"return": {}})");
}

TEST_CASE("session: quit is answered", "[qmp]") {
    QmpBench bench;
    Seen seen;
    with_session(bench, [&](Wire& wire) {
        wire.send(kNegotiate);
        wire.send(R"({"execute": "quit", "id": 9})");
        seen.take(wire, 3);
    });
    CHECK(seen.lines.back() == R"({"return": {}, "id": 9})");
    CHECK(bench.quits == 1);
}
