// FileFixture: a graph that knows the drivers of local storage, and short ways to use it. Header only.

#pragma once

#include <sys/stat.h>

#include <array>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>

#include "block/graph.h"
#include "block/protocols/file.h"
#include "runtime/buffer.h"
#include "tests/support/temp_dir.h"
#include "tests/support/test_runtime.h"

namespace gantry::test {

using block::Node;
using block::Perm;
using block::WriteFlags;

inline Task<Result<>> write_text(Node* node, uint64_t offset, std::string text, WriteFlags flags = WriteFlags::kNone) {
    block::Request rq = block::Request::internal();
    const iovec one{text.data(), text.size()};
    co_return co_await node->write(rq, offset, IoVec(one), flags);
}
inline Task<Result<std::string>> read_text(Node* node, uint64_t offset, size_t length) {
    block::Request rq = block::Request::internal();
    std::string text(length, '?');
    const iovec one{text.data(), text.size()};
    CO_CHECK(co_await node->read(rq, offset, IoVec(one)));
    co_return text;
}
inline Task<Result<>> zero(Node* node, uint64_t offset, uint64_t length, WriteFlags flags) {
    block::Request rq = block::Request::internal();
    co_return co_await node->write_zeroes(rq, offset, length, flags);
}
inline Task<Result<>> discard(Node* node, uint64_t offset, uint64_t length) {
    block::Request rq = block::Request::internal();
    co_return co_await node->discard(rq, offset, length);
}
inline Task<Result<>> flush(Node* node) {
    block::Request rq = block::Request::internal();
    co_return co_await node->flush(rq);
}
inline Task<Result<block::BlockStatus>> status(Node* node, uint64_t offset, uint64_t length) {
    block::Request rq = block::Request::internal();
    co_return co_await node->block_status(rq, offset, length);
}

inline void write_file(const std::string& path, const std::string& bytes) {
    std::ofstream(path, std::ios::binary) << bytes;
}
inline std::string file_bytes(const std::string& path) {
    std::ifstream in(path, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(in), {});
}
inline uint64_t allocated_bytes(const std::string& path) {
    struct stat st{};
    return ::stat(path.c_str(), &st) == 0 ? static_cast<uint64_t>(st.st_blocks) * 512 : 0;
}

struct FileFixture {
    static constexpr Perm kReader = Perm::kConsistentRead;
    static constexpr Perm kWriter = Perm::kConsistentRead | Perm::kWrite | Perm::kResize;

    ~FileFixture() { rt.run(graph.close_all()); }

    Result<Node*> add(json::object options) { return rt.run(graph.add(std::move(options))); }
    Result<Node*> add_file(const std::string& path, json::object more = {}) {
        more["driver"] = "file";
        more["node-name"] = "f";
        more["filename"] = path;
        return add(std::move(more));
    }
    /// The message of a refused open.
    std::string refused(json::object options) {
        auto r = add(std::move(options));
        return r ? std::string("(opened)") : r.error().message();
    }
    Result<std::unique_ptr<block::Root>> attach(Node& node, Perm need, Perm share = Perm::kAll) {
        block::RootOptions options;
        options.perms = {need, share};
        options.user = "the test";
        return rt.run(graph.attach(node, std::move(options)));
    }
    void detach(std::unique_ptr<block::Root> root) { rt.run(graph.detach(std::move(root))); }
    void remove(const char* name = "f") {
        auto r = rt.run(graph.remove(name));
        if (!r) throw std::runtime_error(r.error().message());
    }
    /// A file with these bytes, open for writing, its writer attached.
    struct Open {
        Node* node;
        std::unique_ptr<block::Root> root;
    };
    Open open_rw(const std::string& path, json::object more = {}) {
        auto node = add_file(path, std::move(more));
        if (!node) throw std::runtime_error(node.error().message());
        auto root = attach(**node, kWriter);
        if (!root) throw std::runtime_error(root.error().message());
        return {*node, std::move(*root)};
    }
    std::string read(Node* node, uint64_t offset, size_t length) {
        auto r = rt.run(read_text(node, offset, length));
        return r ? *r : "error: " + r.error().message();
    }
    /// "" or the error.
    template <class T>
    std::string run(Task<Result<T>> task) {
        auto r = rt.run(std::move(task));
        return r ? std::string() : r.error().message();
    }

    TempDir dir;
    TestRuntime rt;
    const std::array<block::Driver, 2> drivers{block::kFileDriver, block::kHostDeviceDriver};
    block::Graph graph{*rt.runtime, drivers, nullptr};
};

}  // namespace gantry::test
