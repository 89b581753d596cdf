// WriteFixture: images that are written, and what qemu-img says of them. Header only.

#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <catch2/catch.hpp>
#include <string>
#include <vector>

#include "tests/unit/block/qcow2_fixture.h"

namespace gantry::test {

inline Task<Result<>> write_channel(block::Channel* channel, uint64_t offset, std::vector<uint8_t> data,
                                    block::WriteFlags flags) {
    const iovec one{data.data(), data.size()};
    co_return co_await channel->write(offset, IoVec(one), flags);
}
inline Task<int> try_write_channel(block::Channel* channel, uint64_t offset, std::vector<uint8_t> data) {
    const iovec one{data.data(), data.size()};
    co_return channel->try_write(offset, IoVec(one), block::WriteFlags::kNone);
}

/// A fixture whose root writes.
struct WriteFixture : Qcow2Fixture {
    std::string open_writable(json::object options) {
        options["read-only"] = false;
        options.emplace("discard", "unmap");
        if (std::string refusal = open(std::move(options)); !refusal.empty()) return refusal;
        return text_of(
            rt.run(graph->set_perms(*root, {block::Perm::kConsistentRead | block::Perm::kWrite, block::Perm::kAll})));
    }
    std::string open_image(const std::string& path, json::object options = {}) {
        options["file"] = json::object{{"driver", "file"}, {"filename", path}, {"discard", "unmap"}};
        return open_writable(std::move(options));
    }
    std::string open_tiny(const TinyImage& image, json::object options = {}) {
        put_memory(image);
        options["file"] = json::object{{"driver", "memory"}, {"disk", "image"}};
        return open_writable(std::move(options));
    }
    static std::string text_of(const Result<>& result) { return result ? std::string() : result.error().message(); }

    std::string write(uint64_t offset, uint64_t length, uint8_t byte,
                      block::WriteFlags flags = block::WriteFlags::kNone) {
        return write_bytes(offset, std::vector<uint8_t>(length, byte), flags);
    }
    std::string write_bytes(uint64_t offset, std::vector<uint8_t> data,
                            block::WriteFlags flags = block::WriteFlags::kNone) {
        return text_of(rt.run_on_io(write_channel(channel, offset, std::move(data), flags)));
    }
    std::string zero(uint64_t offset, uint64_t length, block::WriteFlags flags = block::WriteFlags::kNone) {
        return text_of(rt.run_on_io(channel->write_zeroes(offset, length, flags)));
    }
    std::string discard(uint64_t offset, uint64_t length) {
        return text_of(rt.run_on_io(channel->discard(offset, length)));
    }
    std::string flush() { return text_of(rt.run_on_io(channel->flush())); }
    int try_write(uint64_t offset, uint64_t length, uint8_t byte) {
        return rt.run_on_io(try_write_channel(channel, offset, std::vector<uint8_t>(length, byte)));
    }

    std::string create(const std::string& options, uint64_t size) {
        const std::string path = dir.file("i.qcow2");
        sh(fmt::format("qemu-img create -q -f qcow2 {} {} {}", options, path, size));
        return path;
    }
    /// 0: clean.
    int check(const std::string& path) { return shell("qemu-img check -q -f qcow2 " + path).status; }
    /// The disk as qemu-img sees it.
    std::vector<uint8_t> contents(const std::string& path) {
        const std::string raw = dir.file("contents.raw");
        sh("qemu-img convert -f qcow2 -O raw " + path + " " + raw);
        return bytes_of(raw);
    }
    static uint64_t allocated_bytes(const std::string& path) {
        struct stat st{};
        return ::stat(path.c_str(), &st) == 0 ? static_cast<uint64_t>(st.st_blocks) * 512 : 0;
    }
};

inline bool no_qemu() {
    if (Qcow2Fixture::has_tool("qemu-img")) return false;
    WARN("SKIPPED: qemu-img is not installed");
    return true;
}

inline bool all_of(const std::vector<uint8_t>& data, uint64_t from, uint64_t length, uint8_t byte) {
    return std::all_of(data.begin() + static_cast<ptrdiff_t>(from),
                       data.begin() + static_cast<ptrdiff_t>(from + length), [byte](uint8_t b) { return b == byte; });
}

}  // namespace gantry::test
