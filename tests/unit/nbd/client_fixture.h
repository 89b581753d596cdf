// A graph with the driver "nbd", and a server that follows a script.

#pragma once

#include <optional>
#include <string>
#include <vector>

#include "nbd/client/node.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/nbd_script_server.h"
#include "tests/support/node_io.h"

namespace gantry::test {

struct ClientFixture : GraphFixture {
    explicit ClientFixture(NbdScriptServer::Script script)
        : GraphFixture(nullptr, {nbd::kNbdDriver}), server(std::in_place, std::move(script)) {}
    ~ClientFixture() {
        if (graph->find("n") && !remove("n").empty()) std::terminate();
        server.reset();
    }

    /// blockdev-add of node "n"; `more` begins with a comma. The error, or "".
    std::string open(const std::string& more = "") {
        return add("{'driver': 'nbd', 'node-name': 'n', 'server': {'type': 'unix', 'path': '" + server->path() + "'}" +
                   more + "}");
    }
    /// Requests run on an I/O loop, as those of exports do.
    std::string read(uint64_t offset, size_t length, Bytes* data = nullptr) {
        return runtime.run_on_io(read_task(&node("n"), offset, length, data));
    }
    std::string write(uint64_t offset, size_t length, block::WriteFlags flags = block::WriteFlags::kNone) {
        return runtime.run_on_io(write_task(&node("n"), offset, length, flags));
    }
    std::string flush() { return runtime.run_on_io(flush_task(&node("n"))); }
    Result<block::BlockStatus> status(uint64_t offset, uint64_t length) {
        return runtime.run_on_io(status_task(&node("n"), offset, length));
    }

    static Task<std::string> read_task(block::Node* node, uint64_t offset, size_t length, Bytes* data) {
        Bytes memory(length, 0xee);
        const iovec iov{memory.data(), memory.size()};
        block::Request rq = block::Request::internal();
        Result<> done = co_await node->read(rq, offset, IoVec(iov));
        if (data) *data = memory;
        co_return text_of(done);
    }
    static Task<std::string> write_task(block::Node* node, uint64_t offset, size_t length, block::WriteFlags flags) {
        Bytes memory(length, 0x77);
        const iovec iov{memory.data(), memory.size()};
        block::Request rq = block::Request::internal();
        Result<> done = co_await node->write(rq, offset, IoVec(iov), flags);
        co_return text_of(done);
    }
    static Task<std::string> flush_task(block::Node* node) {
        block::Request rq = block::Request::internal();
        Result<> done = co_await node->flush(rq);
        co_return text_of(done);
    }
    static Task<Result<block::BlockStatus>> status_task(block::Node* node, uint64_t offset, uint64_t length) {
        block::Request rq = block::Request::internal();
        auto status = co_await node->block_status(rq, offset, length);
        co_return status;
    }

    std::optional<NbdScriptServer> server;
};

}  // namespace gantry::test
