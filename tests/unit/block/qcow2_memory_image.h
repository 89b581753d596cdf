// An image that qemu-img made, on a disk in memory with faults, and what qemu-img says of it afterwards. Header only.

#pragma once

#include <catch2/catch.hpp>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "block/formats/qcow2/qcow2.h"
#include "block/formats/qcow2/qcow2_node.h"
#include "tests/support/graph_fixture.h"
#include "tests/support/memory_node.h"
#include "tests/support/node_io.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"

namespace gantry::test {

struct MemoryImage : GraphFixture {
    MemoryImage() : GraphFixture(nullptr, {block::kQcow2Driver}) {}
    ~MemoryImage() {
        close();
        MemoryDisk::forget("image");
        MemoryDisk::forget("backing");
    }

    static bool tools_missing() {
        if (has_program("qemu-img")) return false;
        WARN("SKIPPED: qemu-img is not installed");
        return true;
    }

    /// `options` of qemu-img create -o.
    void create(const std::string& options, uint64_t size) {
        const std::string path = dir.file("i.qcow2");
        const ShellResult made = shell(
            fmt::format("qemu-img create -q -f qcow2 {}{} {} {}", options.empty() ? "" : "-o ", options, path, size));
        if (made.status != 0) throw std::runtime_error(made.output);
        std::ifstream in(path, std::ios::binary);
        const std::vector<char> bytes{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
        MemoryDisk::forget("image");
        disk = MemoryDisk::named("image");
        disk->write(0, bytes.data(), bytes.size());
    }
    void put_backing(const Bytes& bytes) {
        MemoryDisk::forget("backing");
        MemoryDisk::named("backing")->write(0, bytes.data(), bytes.size());
        has_backing = true;
    }
    /// `node`, `file`: more options of the two, each with a comma before it. "" or the refusal.
    std::string open(const std::string& node_options = "", const std::string& file_options = "") {
        close();
        std::string text = "{'driver':'qcow2','node-name':'q','discard':'unmap'" + node_options +
                           ",'file':{'driver':'memory','disk':'image','discard':'unmap','growable':true" +
                           file_options + "}";
        text += has_backing ? ",'backing':{'driver':'memory','disk':'backing','read-only':true}}" : ",'backing':null}";
        if (std::string refusal = add(text); !refusal.empty()) return refusal;
        block::RootOptions user = writer("the test");
        user.perms.share = block::Perm::kAll;
        root = attach("q", std::move(user));
        return {};
    }
    /// "" or the error of closing.
    std::string close() {
        if (root) detach(std::move(root));
        return graph->find("q") ? remove("q") : std::string();
    }
    block::Node* q() { return &node("q"); }
    block::qcow2::Qcow2Node& image() { return dynamic_cast<block::qcow2::Qcow2Node&>(node("q")); }

    /// Puts down the image as it is in memory.
    std::string save() {
        std::string path = dir.file("saved.qcow2");
        const Bytes bytes = disk->bytes(0, disk->size());
        std::ofstream(path, std::ios::binary | std::ios::trunc)
            .write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        return path;
    }
    /// Of the closed image: 0 clean, 2 corrupt, 3 leaks. What is said is in `report`.
    int qemu_check() {
        const ShellResult checked = shell("qemu-img check -f qcow2 " + save());
        report = checked.output.substr(0, 3000);
        return checked.status;
    }

    TempDir dir;
    std::shared_ptr<MemoryDisk> disk;
    bool has_backing = false;
    std::unique_ptr<block::Root> root;
    std::string report;
};

}  // namespace gantry::test
