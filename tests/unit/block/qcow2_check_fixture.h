// CheckFixture: image files made by qemu-img, damaged byte by byte, checked here and by qemu-img. Header only.

#pragma once

#include <boost/json/parse.hpp>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "block/formats/qcow2/be.h"
#include "block/formats/qcow2/check.h"
#include "block/formats/qcow2/qcow2.h"
#include "block/formats/raw.h"
#include "block/graph.h"
#include "block/protocols/file.h"
#include "tests/support/shell.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

/// Visibly, never silently.
#define SKIP_TEST(reason)         \
    do {                          \
        WARN("skipped: " reason); \
        return;                   \
    } while (false)

namespace gantry::test {

/// The bytes of an image and where its tables are.
class ImageBytes {
  public:
    explicit ImageBytes(const std::string& path) {
        std::ifstream in(path, std::ios::binary);
        bytes.resize(std::filesystem::file_size(path));
        in.read(reinterpret_cast<char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        if (!in) throw std::runtime_error("cannot read " + path);
    }
    void save(const std::string& path) const {
        std::ofstream out(path, std::ios::binary | std::ios::trunc);
        out.write(reinterpret_cast<const char*>(bytes.data()), static_cast<std::streamsize>(bytes.size()));
        if (!out) throw std::runtime_error("cannot write " + path);
    }
    uint64_t word(uint64_t at) const { return block::qcow2::load_be64(&bytes.at(at)); }
    uint32_t half(uint64_t at) const { return block::qcow2::load_be32(&bytes.at(at)); }
    void put(uint64_t at, uint64_t word) {
        if (bytes.size() < at + 8) bytes.resize(at + 8);
        block::qcow2::store_be64(&bytes[at], word);
    }
    void put16(uint64_t at, uint16_t v) { block::qcow2::store_be16(&bytes.at(at), v); }
    uint16_t get16(uint64_t at) const { return block::qcow2::load_be16(&bytes.at(at)); }

    uint64_t cluster_size() const { return uint64_t{1} << half(20); }
    uint64_t l1() const { return word(40); }
    uint64_t l1_entry(uint64_t index) const { return word(l1() + index * 8); }
    /// Place of the table that L1 entry `index` points to.
    uint64_t l2(uint64_t index = 0) const { return l1_entry(index) & kOffset; }
    uint64_t refcount_table() const { return word(48); }
    uint64_t refcount_block(uint64_t index = 0) const { return word(refcount_table() + index * 8); }
    /// Place of the 16-bit count of a cluster.
    uint64_t count_at(uint64_t cluster) const {
        const uint64_t per_block = cluster_size() / 2;
        return refcount_block(cluster / per_block) + cluster % per_block * 2;
    }

    static constexpr uint64_t kOffset = 0x00fffffffffffe00, kCopied = uint64_t{1} << 63;
    std::vector<uint8_t> bytes;
};

/// The numbers of both checks.
struct CheckNumbers {
    uint64_t errors = 0, corruptions = 0, leaks = 0, corruptions_fixed = 0, leaks_fixed = 0;
    uint64_t end = 0, total = 0, allocated = 0, fragmented = 0, compressed = 0;

    bool clean() const { return errors == 0 && corruptions == 0 && leaks == 0; }
    std::string found() const { return fmt::format("errors {} corruptions {} leaks {}", errors, corruptions, leaks); }
    std::string fixed() const {
        return fmt::format("corruptions fixed {} leaks fixed {}", corruptions_fixed, leaks_fixed);
    }
    std::string statistics() const {
        return fmt::format("end {:#x} total {} allocated {} fragmented {} compressed {}", end, total, allocated,
                           fragmented, compressed);
    }
};

struct CheckFixture {
    CheckFixture()
        : drivers{block::kFileDriver, block::kRawDriver, block::kQcow2Driver},
          graph(std::make_unique<block::Graph>(*rt.runtime, drivers, nullptr)) {}
    ~CheckFixture() {
        rt.run(graph->close_all());
        graph.reset();
    }

    std::string path(const std::string& name) const { return dir.path() + "/" + name; }
    /// Words joined with blanks, output thrown away; throws when it fails.
    static void sh(const std::string& command) {
        const ShellResult done = shell(command);
        if (done.status != 0) throw std::runtime_error("failed: " + command + ": " + done.output);
    }
    static bool has_tool(const std::string& tool) { return has_program(tool); }
    void create(const std::string& name, const std::string& options, const std::string& size) {
        sh("qemu-img create -f qcow2 " + (options.empty() ? "" : "-o " + options) + " " + path(name) + " " + size);
    }
    void io(const std::string& name, const std::vector<std::string>& commands) {
        std::string line = "qemu-io -f qcow2";
        for (const std::string& c : commands) line += " -c '" + c + "'";
        sh(line + " " + path(name));
    }
    void copy(const std::string& from, const std::string& to) const {
        std::filesystem::copy_file(path(from), path(to), std::filesystem::copy_options::overwrite_existing);
    }

    Result<block::ImageCheck> try_check(const std::string& name, block::CheckRepair repair,
                                        block::Progress progress = {}) {
        json::object file{{"driver", "file"}, {"filename", path(name)}};
        if (repair == block::CheckRepair::kNone) file["read-only"] = true;
        return check_node(std::move(file), repair, std::move(progress));
    }
    Result<block::ImageCheck> check_node(json::object file, block::CheckRepair repair, block::Progress progress) {
        file["node-name"] = "image";
        auto node = rt.run(graph->add(std::move(file)));
        if (!node) throw std::runtime_error(node.error().message());
        block::RootOptions user;
        user.perms.need = block::Perm::kConsistentRead;
        if (repair != block::CheckRepair::kNone) user.perms.need |= block::Perm::kWrite | block::Perm::kResize;
        user.user = "the test";
        auto root = rt.run(graph->attach(**node, std::move(user)));
        if (!root) throw std::runtime_error(root.error().message());
        auto checked = rt.run(block::qcow2::check_file(**node, "image", repair, std::move(progress)));
        rt.run(graph->detach(std::move(*root)));
        auto removed = rt.run(graph->remove("image"));
        if (!removed) throw std::runtime_error(removed.error().message());
        return checked;
    }
    CheckNumbers check(const std::string& name, block::CheckRepair repair = block::CheckRepair::kNone) {
        auto c = try_check(name, repair);
        if (!c) throw std::runtime_error(c.error().message());
        findings = c->findings;
        return {.errors = c->check_errors,
                .corruptions = c->corruptions,
                .leaks = c->leaks,
                .corruptions_fixed = c->corruptions_fixed,
                .leaks_fixed = c->leaks_fixed,
                .end = c->image_end_offset.value_or(0),
                .total = c->total_clusters.value_or(0),
                .allocated = c->allocated_clusters.value_or(0),
                .fragmented = c->fragmented_clusters.value_or(0),
                .compressed = c->compressed_clusters.value_or(0)};
    }
    /// `arguments`: "-r all" etc.
    CheckNumbers reference(const std::string& name, const std::string& arguments = "") const {
        const std::string out = path(name) + ".json";
        (void)std::system(("qemu-img check -f qcow2 --output=json " + arguments + " " + path(name) + " > " + out +
                           " 2> " + path(name) + ".err")
                              .c_str());
        std::ifstream in(out);
        std::string text{std::istreambuf_iterator<char>(in), std::istreambuf_iterator<char>()};
        if (text.find('{') == std::string::npos) throw std::runtime_error("qemu-img check failed: " + text);
        const json::object o = json::parse(text.substr(text.find('{'))).as_object();
        const auto number = [&o](const char* key) {
            const json::value* v = o.if_contains(key);
            return v ? v->to_number<uint64_t>() : uint64_t{0};
        };
        return {.errors = number("check-errors"),
                .corruptions = number("corruptions"),
                .leaks = number("leaks"),
                .corruptions_fixed = number("corruptions-fixed"),
                .leaks_fixed = number("leaks-fixed"),
                .end = number("image-end-offset"),
                .total = number("total-clusters"),
                .allocated = number("allocated-clusters"),
                .fragmented = number("fragmented-clusters"),
                .compressed = number("compressed-clusters")};
    }
    /// The findings of the last check() as one text.
    std::string said() const {
        std::string all;
        for (size_t i = 0; i < findings.size() && i < 20; i++) all += findings[i] + "\n";
        return all;
    }

    TempDir dir;
    TestRuntime rt;
    std::vector<block::Driver> drivers;
    std::unique_ptr<block::Graph> graph;
    std::vector<std::string> findings;
};

}  // namespace gantry::test
