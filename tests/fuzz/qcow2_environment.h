// What the qcow2 fuzz entries share: a runtime without files, the input as a disk in memory. Header only.

#pragma once

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "block/crypto/secrets.h"
#include "block/formats/qcow2/layout.h"
#include "block/formats/qcow2/qcow2.h"
#include "block/formats/raw.h"
#include "block/graph.h"
#include "block/image_operations.h"
#include "block/root.h"
#include "runtime/log.h"
#include "runtime/runtime.h"
#include "tests/support/memory_node.h"

/// A promise of the driver that an input breaks.
#define FUZZ_REQUIRE(condition)                                                                      \
    do {                                                                                             \
        if (!(condition)) {                                                                          \
            std::fprintf(stderr, "%s:%d: does not hold: %s\n", __FILE_NAME__, __LINE__, #condition); \
            std::abort();                                                                            \
        }                                                                                            \
    } while (false)

namespace gantry::test {

/// GANTRY_TEST_LOG: what the entry does, to understand an input.
template <class... Args>
void trace(fmt::format_string<Args...> text, Args&&... args) {
    static const bool wanted = std::getenv("GANTRY_TEST_LOG") != nullptr;
    if (wanted) std::fprintf(stderr, "fuzz: %s\n", fmt::format(text, std::forward<Args>(args)...).c_str());
}
inline void trace_check(std::string_view what, const Result<block::ImageCheck>& check) {
    if (!check) return trace("{}: {}", what, check.error().message());
    trace("{}: corruptions {} leaks {} errors {}; fixed {} and {}", what, check->corruptions, check->leaks,
          check->check_errors, check->corruptions_fixed, check->leaks_fixed);
    for (size_t i = 0; i < check->findings.size() && i < 20; i++) trace("  {}", check->findings[i]);
}

/// One for the process.
struct Qcow2Environment {
    Qcow2Environment() {
        log::set_level(std::getenv("GANTRY_TEST_LOG") ? log::Level::kInfo : log::Level::kOff);
        RuntimeOptions options;
        options.backend = IoBackendKind::kEpoll;
        options.io_loops = 0;
        options.pool_threads = 1;
        runtime = std::move(*Runtime::create(options));
        // No file driver: names found in an image lead nowhere on this machine.
        drivers = {block::kQcow2Driver, block::kRawDriver, kMemoryDriver};
    }
    template <class T>
    T run(Task<T> task) {
        return runtime->main_loop().run_until_complete(std::move(task));
    }

    std::unique_ptr<Runtime> runtime;
    std::vector<block::Driver> drivers;
};

/// A graph over a disk with the bytes of the input.
struct Qcow2Input {
    Qcow2Input(Qcow2Environment& e, const uint8_t* data, size_t size) : environment(e) {
        MemoryDisk::forget("image");
        disk = MemoryDisk::named("image");
        disk->resize(size);
        if (size != 0) disk->write(0, data, size);
        graph = std::make_unique<block::Graph>(*e.runtime, e.drivers, nullptr);
        graph->opens_locked = true;  // unlocking is bounded, but not by milliseconds
        (void)e.run(graph->secrets().add({{"qom-type", "secret"}, {"id", "s"}, {"data", "key"}}));
    }
    ~Qcow2Input() {
        environment.run(graph->close_all());
        graph.reset();
    }

    bool holds(const uint8_t* data, size_t size) const {
        return size == 0 || disk->bytes(0, size) == std::vector<uint8_t>(data, data + size);
    }

    /// The driver's memory node; growable, as files are.
    json::object memory() const {
        return {{"driver", "memory"}, {"disk", "image"}, {"growable", true}, {"discard", "unmap"}};
    }

    /// The image in it, with what it needs besides: a data file, a passphrase.
    json::object image() const {
        json::object options{{"driver", "qcow2"}, {"node-name", "q"}, {"discard", "unmap"}, {"file", memory()}};
        const std::vector<uint8_t> head = disk->bytes(0, 80);
        if (head[79] & block::qcow2::kIncompatDataFile) {
            options["data-file"] = json::object{{"driver", "memory"}, {"size", 65536}, {"growable", true}};
        }
        if (head[35] == 1) options["encrypt"] = json::object{{"format", "aes"}, {"key-secret", "s"}};
        return options;
    }

    Qcow2Environment& environment;
    std::shared_ptr<MemoryDisk> disk;
    std::unique_ptr<block::Graph> graph;
};

inline Task<std::unique_ptr<block::Root>> use_node(block::Graph& graph, block::Node& node, block::Perm need) {
    block::RootOptions user;
    user.perms = {need, block::Perm::kAll};
    user.user = "the fuzzer";
    auto root = co_await graph.attach(node, std::move(user));
    FUZZ_REQUIRE(root);
    co_return std::move(*root);
}

}  // namespace gantry::test
