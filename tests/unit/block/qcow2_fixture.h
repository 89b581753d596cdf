// Qcow2Fixture: a graph with qcow2 over memory and files, a reader on an I/O loop, an observer that remembers. Header
// only.

#pragma once

#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "block/formats/qcow2/qcow2.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/raw.h"
#include "block/graph.h"
#include "block/protocols/file.h"
#include "tests/support/memory_node.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"
#include "tests/unit/block/qcow2_tiny_image.h"

namespace gantry::test {

struct DamageObserver : block::Observer {
    struct Event {
        std::string node, msg;
        std::optional<uint64_t> offset, size;
        bool fatal;
    };
    std::vector<Event> events;
    void image_corrupted(const block::Node& node, std::string_view msg, std::optional<uint64_t> offset,
                         std::optional<uint64_t> size, bool fatal) override {
        events.push_back({node.name(), std::string(msg), offset, size, fatal});
    }
};

inline Task<Result<std::vector<uint8_t>>> read_channel(block::Channel* channel, uint64_t offset, uint64_t length) {
    std::vector<uint8_t> data(length, 0xee);
    const iovec one{data.data(), data.size()};
    CO_CHECK(co_await channel->read(offset, IoVec(one)));
    co_return data;
}
inline Task<Result<block::BlockStatus>> status_channel(block::Channel* channel, uint64_t offset, uint64_t length) {
    return channel->block_status(offset, length);
}
inline Task<int> try_read_channel(block::Channel* channel, uint64_t offset, uint8_t* to, size_t length) {
    const iovec one{to, length};
    co_return channel->try_read(offset, IoVec(one));
}

struct Qcow2Fixture {
    explicit Qcow2Fixture(const std::vector<block::Driver>& extra = {})
        : drivers{block::kFileDriver, block::kRawDriver, kMemoryDriver, block::kQcow2Driver} {
        drivers.insert(drivers.end(), extra.begin(), extra.end());
        graph = std::make_unique<block::Graph>(*rt.runtime, drivers, &observer);
    }
    ~Qcow2Fixture() {
        close();
        rt.run(graph->close_all());
        graph.reset();
        MemoryDisk::forget("image");
    }

    /// Opens `options` (driver qcow2 and node-name q are added), read-only unless they say otherwise. "" or the
    /// refusal.
    std::string open(json::object options) {
        close();
        options.emplace("driver", "qcow2");
        options["node-name"] = "q";
        if (!options.contains("read-only") && !options.contains("auto-read-only")) options["read-only"] = true;
        auto added = rt.run(graph->add(std::move(options)));
        if (!added) return added.error().message();
        node = *added;
        block::RootOptions reader;
        reader.perms = {block::Perm::kConsistentRead, block::Perm::kAll};
        reader.user = "the test";
        auto attached = rt.run(graph->attach(*node, std::move(reader)));
        if (!attached) return attached.error().message();
        root = std::move(*attached);
        channel = rt.run(root->channel(rt.io_loop()));
        return {};
    }
    void put_memory(const TinyImage& image) {
        auto disk = MemoryDisk::named("image");
        disk->resize(0);
        disk->resize(image.bytes.size());
        disk->write(0, image.bytes.data(), image.bytes.size());
    }
    std::string open_memory(const TinyImage& image, json::object options = {}) {
        put_memory(image);
        options["file"] = json::object{{"driver", "memory"}, {"disk", "image"}};
        return open(std::move(options));
    }
    std::string open_file(const std::string& path, json::object options = {}) {
        options["file"] = json::object{{"driver", "file"}, {"filename", path}};
        return open(std::move(options));
    }
    void close() {
        channel = nullptr;
        if (root) rt.run(graph->detach(std::move(root)));
        if (node) {
            node = nullptr;
            (void)rt.run(graph->remove("q"));
        }
    }

    block::qcow2::Qcow2Node& image() { return dynamic_cast<block::qcow2::Qcow2Node&>(*node); }
    Result<std::vector<uint8_t>> read(uint64_t offset, uint64_t length) {
        return rt.run_on_io(read_channel(channel, offset, length));
    }
    /// The error's text; "" when the read succeeds.
    std::string read_error(uint64_t offset, uint64_t length) {
        auto r = read(offset, length);
        return r ? std::string() : r.error().message();
    }
    /// The byte that fills the whole range; -1 when there are several, -2 on an error.
    int filled_with(uint64_t offset, uint64_t length) {
        auto r = read(offset, length);
        if (!r) return -2;
        for (uint8_t b : *r) {
            if (b != r->front()) return -1;
        }
        return r->front();
    }
    Result<block::BlockStatus> status(uint64_t offset, uint64_t length) {
        return rt.run_on_io(status_channel(channel, offset, length));
    }
    /// Lets what was posted to the main loop run.
    void settle() {
        rt.run(wait_until([turns = 0]() mutable { return ++turns > 3; }));
    }

    /// Runs a command line with the words joined; throws when it fails.
    static void sh(const std::string& command) {
        const ShellResult done = shell(command);
        if (done.status != 0) throw std::runtime_error("failed: " + command + ": " + done.output);
    }
    static bool has_tool(const std::string& tool) { return has_program(tool); }
    static std::vector<uint8_t> bytes_of(const std::string& path) {
        std::ifstream in(path, std::ios::binary);
        return {std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
    }

    TempDir dir;
    TestRuntime rt;
    DamageObserver observer;
    std::vector<block::Driver> drivers;
    std::unique_ptr<block::Graph> graph;
    block::Node* node = nullptr;
    std::unique_ptr<block::Root> root;
    block::Channel* channel = nullptr;
};

}  // namespace gantry::test
