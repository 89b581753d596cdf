// /proc/self/mountinfo: what is mounted where, as this process sees it.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"

namespace gantry::fuse {

constexpr std::string_view kFilesystemType = "fuse.gantry";

struct MountEntry {
    uint64_t id = 0, parent = 0;
    uint64_t device = 0;  // as st_dev
    std::string root;     // the part of the file system that is mounted
    std::string path;
    std::string type;
    std::string source;
    std::string options;  // of the file system: "rw,user_id=0,group_id=0,..."
};

/// Pure. Lines that are none are left out.
std::vector<MountEntry> parse_mountinfo(std::string_view text);
/// Blocks for no file system. kIo when /proc is not there.
Result<std::vector<MountEntry>> read_mountinfo();
/// The number behind `name=` in a list of options, or `otherwise`.
uint64_t option_number(std::string_view options, std::string_view name, uint64_t otherwise);

}  // namespace gantry::fuse
