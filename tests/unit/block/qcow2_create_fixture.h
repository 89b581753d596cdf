// CreateFixture: makes images by command and by words, and asks qemu-img about them. Header only.

#pragma once

#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

#include "block/create.h"
#include "schema/json_dialect.h"
#include "schema/scalar_text.h"
#include "tests/support/power_cut.h"
#include "tests/unit/block/qcow2_fixture.h"

namespace gantry::test {

inline json::object options_of(std::string text) {
    for (char& c : text) {
        if (c == '\'') c = '"';
    }
    auto parsed = schema::parse_json(text);
    if (!parsed) throw std::runtime_error(parsed.error().message());
    return parsed->as_object();
}

/// What a command prints, with its status when it is not 0.
inline std::string output_of(const std::string& command) {
    ShellResult done = shell(command);
    if (done.status != 0) done.output += fmt::format("[exit {}]", done.status);
    return std::move(done.output);
}

/// "name=value,...".
inline block::CreationWords words_of(std::string_view text) {
    block::CreationWords words;
    while (!text.empty()) {
        const std::string_view pair = text.substr(0, text.find(','));
        text.remove_prefix(std::min(text.size(), pair.size() + 1));
        words.emplace_back(pair.substr(0, pair.find('=')), pair.substr(pair.find('=') + 1));
    }
    return words;
}

struct CreateFixture : Qcow2Fixture {
    CreateFixture() : Qcow2Fixture({kJournalDriver}) {}
    /// blockdev-create; "" or the refusal.
    std::string create(const std::string& text, block::Progress progress = {}) {
        auto made = rt.run(block::create_image(*graph, options_of(text), std::move(progress)));
        return made ? std::string() : made.error().message();
    }
    /// gantry image create -o words.
    std::string create_file(const std::string& format, const std::string& filename, std::string_view words) {
        auto made = rt.run(block::create_image_file(*graph, format, filename, words_of(words), {}));
        return made ? std::string() : made.error().message();
    }
    /// What `qemu-img info` says, without names and the space on disk.
    static std::string info(const std::string& here, const std::string& path) {
        std::string text = output_of(here + "qemu-img info -f qcow2 " + path);
        std::string kept;
        for (size_t at = 0; at < text.size();) {
            const size_t end = std::min(text.find('\n', at), text.size());
            const std::string line = text.substr(at, end - at);
            at = end + 1;
            if (line.starts_with("image: ") || line.starts_with("disk size: ") ||
                line.find("data file: ") < line.size())
                continue;
            kept += line + "\n";
        }
        return kept;
    }
    /// Bytes that have a place, of this image or its data file.
    static uint64_t mapped(const std::string& here, const std::string& path) {
        auto map = schema::parse_json(output_of(here + "qemu-img map -f qcow2 --output=json " + path));
        if (!map) throw std::runtime_error(map.error().message());
        uint64_t bytes = 0;
        for (const json::value& range : map->as_array()) {
            if (range.at("data").as_bool()) bytes += range.at("length").to_number<uint64_t>();
        }
        return bytes;
    }
    static void put_text(const std::string& path, const std::string& text) { std::ofstream(path) << text; }
    static uint64_t size_of(const std::string& text) { return *schema::parse_size_text(text); }
    static uint64_t length(const std::string& path) { return std::filesystem::file_size(path); }
    static uint64_t blocks(const std::string& path) {
        struct stat st = {};
        ::stat(path.c_str(), &st);
        return static_cast<uint64_t>(st.st_blocks);
    }
};

}  // namespace gantry::test
