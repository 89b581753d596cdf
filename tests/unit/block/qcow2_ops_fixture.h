// OpsFixture: an image made by qemu-img, changed here, held against a model of its contents and against qemu-img.
// Header only.

#pragma once

#include <catch2/catch.hpp>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <string>

#include "block/formats/qcow2/qcow2.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "block/formats/raw.h"
#include "block/graph.h"
#include "block/image_control.h"
#include "block/protocols/file.h"
#include "tests/support/node_io.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

namespace gantry::test {

struct OpsFixture {
    OpsFixture()
        : drivers{block::kFileDriver, block::kRawDriver, block::kQcow2Driver},
          graph(std::make_unique<block::Graph>(*rt.runtime, drivers, nullptr)),
          path(dir.file("i.qcow2")) {}
    ~OpsFixture() {
        close();
        rt.run(graph->close_all());
        graph.reset();
    }

    static bool tools_missing() {
        if (has_program("qemu-img") && has_program("qemu-io")) return false;
        WARN("SKIPPED: qemu-img or qemu-io is not installed");
        return true;
    }
    /// Output of a command, stderr too; its exit status in `status`.
    std::string output(const std::string& command) {
        ShellResult done = shell(command);
        status = done.status;
        return std::move(done.output);
    }
    void sh(const std::string& command) {
        const std::string text = output(command);
        if (status != 0) throw std::runtime_error("failed: " + command + ": " + text);
    }

    void create(const std::string& options, uint64_t size) {
        sh("qemu-img create -q -f qcow2 " + (options.empty() ? std::string() : "-o " + options + " ") + path + " " +
           std::to_string(size));
        disk.assign(size, 0);
    }
    /// "" or the refusal.
    std::string open(json::object options = {}) {
        close();
        options["driver"] = "qcow2";
        options["node-name"] = "q";
        options["discard"] = "unmap";
        // What order things reach the medium in is tests/crash's business; here it would only take time.
        options["file"] = json::object{
            {"driver", "file"}, {"filename", path}, {"discard", "unmap"}, {"cache", json::object{{"no-flush", true}}}};
        auto added = rt.run(graph->add(std::move(options)));
        if (!added) return added.error().message();
        node = *added;
        block::RootOptions user;
        user.perms = {block::Perm::kConsistentRead | block::Perm::kWrite, block::Perm::kAll};
        user.user = "the test";
        auto attached = rt.run(graph->attach(*node, std::move(user)));
        if (!attached) return attached.error().message();
        root = std::move(*attached);
        return {};
    }
    void close() {
        if (root) rt.run(graph->detach(std::move(root)));
        if (!node) return;
        node = nullptr;
        const Result<> removed = rt.run(graph->remove("q"));
        INFO((removed ? "" : removed.error().message()));
        REQUIRE(removed);
    }
    block::qcow2::Qcow2Node& image() { return dynamic_cast<block::qcow2::Qcow2Node&>(*node); }

    // ---- Changes, in the image and in the model ----

    void write(uint64_t at, uint64_t length, uint8_t seed, block::WriteFlags flags = block::WriteFlags::kNone) {
        Bytes data = pattern(length, seed);
        std::ranges::copy(data, disk.begin() + static_cast<ptrdiff_t>(at));
        need(rt.run(node_write(node, at, std::move(data), flags)));
    }
    /// Contents that compress well.
    void write_compressed(uint64_t at, uint64_t length, uint8_t seed) {
        Bytes data(length);
        for (size_t i = 0; i < length; i++) data[i] = static_cast<uint8_t>(seed + i / 100);
        std::ranges::copy(data, disk.begin() + static_cast<ptrdiff_t>(at));
        need(rt.run(node_write(node, at, std::move(data), block::WriteFlags::kCompressed)));
    }
    void zero(uint64_t at, uint64_t length, bool unmap) {
        std::fill_n(disk.begin() + static_cast<ptrdiff_t>(at), length, uint8_t{0});
        need(rt.run(node_zero(node, at, length, unmap ? block::WriteFlags::kMayUnmap : block::WriteFlags::kNone)));
    }
    /// The id it got.
    std::string snapshot(const std::string& name) {
        need(rt.run(block::create_snapshot(*graph, *node, {.name = name, .date_sec = 1700000000, .date_nsec = 5})));
        const std::string id = image().image().snapshots.back().id;
        snapshots[id] = disk;
        return id;
    }
    void apply(const std::string& id) {
        need(rt.run(block::apply_snapshot(*graph, *node, id)));
        disk = snapshots.at(id);
    }
    void remove(const std::string& id) {
        need(rt.run(block::delete_snapshot(*graph, *node, id, "")));
        snapshots.erase(id);
    }
    void resize(uint64_t size, block::Preallocation preallocation = block::Preallocation::kOff) {
        need(rt.run(block::resize_image(*graph, *node, size, preallocation, true)));
        disk.resize(size, 0);
    }
    std::string amend(json::object options, bool force = false) {
        return error_of(rt.run(block::amend_image(*graph, *node, std::move(options), force)));
    }
    void compact() { need(rt.run(block::compact_image(*graph, *node))); }
    uint64_t file_bytes() const { return std::filesystem::file_size(path); }

    // ---- Truth ----

    void verify() {
        REQUIRE(node->size() == disk.size());
        compare(disk, "the disk");
    }
    /// Closes, asks qemu-img, opens again.
    void verify_file(const json::object& options = {}) {
        verify();
        close();
        const std::string report = output("cd " + dir.path() + " && qemu-img check -f qcow2 " + path);
        INFO(report);
        REQUIRE(status == 0);
        check_file(disk, "");
        for (const auto& [id, contents] : snapshots) check_file(contents, "-l snapshot.id=" + id + " ");
        const std::string refusal = open(options);
        INFO(refusal);
        REQUIRE(refusal == "");
    }
    void check_file(const Bytes& expected, const std::string& more) {
        const std::string raw = dir.file("check.raw");
        sh("cd " + dir.path() + " && qemu-img convert -f qcow2 -O raw " + more + path + " " + raw);
        Bytes found(std::filesystem::file_size(raw));
        std::ifstream in(raw, std::ios::binary);
        in.read(reinterpret_cast<char*>(found.data()), static_cast<std::streamsize>(found.size()));
        if (more.empty()) {
            REQUIRE(found.size() == expected.size());
        }
        // qemu-img gives a snapshot the size that the disk has today.
        INFO("qemu-img convert " << more);
        check_same(found.data(), expected.data(), std::min(found.size(), expected.size()));
    }
    static void check_same(const uint8_t* found, const uint8_t* expected, size_t bytes) {
        if (bytes == 0 || std::memcmp(found, expected, bytes) == 0) return;
        INFO("first difference at " << std::mismatch(found, found + bytes, expected).first - found);
        FAIL("other contents");
    }

    static void need(const Result<>& result) {
        INFO((result ? "" : result.error().message()));
        REQUIRE(result);
    }
    TempDir dir;
    TestRuntime rt;
    std::vector<block::Driver> drivers;
    std::unique_ptr<block::Graph> graph;
    std::string path;
    block::Node* node = nullptr;
    std::unique_ptr<block::Root> root;
    int status = 0;
    Bytes disk;                              // what it must hold
    std::map<std::string, Bytes> snapshots;  // by id

  private:
    void compare(const Bytes& expected, const char* what) {
        constexpr size_t kStep = size_t{4} << 20;
        for (size_t at = 0; at < expected.size(); at += kStep) {
            const size_t length = std::min(kStep, expected.size() - at);
            const Result<Bytes> found = rt.run(node_read(node, at, length));
            INFO(what << " at " << at << ": " << (found ? "" : found.error().message()));
            REQUIRE(found);
            check_same(found->data(), expected.data() + at, length);
        }
    }
};

}  // namespace gantry::test
