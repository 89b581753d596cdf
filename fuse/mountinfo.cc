#include "fuse/mountinfo.h"

#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <charconv>
#include <optional>

#include "runtime/unique_fd.h"

namespace gantry::fuse {

namespace {

std::string_view next_field(std::string_view& line) {
    const size_t space = line.find(' ');
    const std::string_view field = line.substr(0, space);
    line = space == std::string_view::npos ? std::string_view() : line.substr(space + 1);
    return field;
}

template <class T>
bool parse_number(std::string_view text, T& out) {
    const auto r = std::from_chars(text.data(), text.data() + text.size(), out);
    return r.ec == std::errc() && r.ptr == text.data() + text.size();
}

/// Blanks, line ends and backslashes are written as three octal digits.
std::string unescape(std::string_view text) {
    std::string out;
    out.reserve(text.size());
    for (size_t i = 0; i < text.size(); ++i) {
        unsigned value = 0;
        const std::string_view digits = text.substr(i + 1, 3);
        const auto r = std::from_chars(digits.data(), digits.data() + digits.size(), value, 8);
        if (text[i] == '\\' && digits.size() == 3 && r.ec == std::errc() && r.ptr == digits.data() + 3 && value < 256) {
            out += static_cast<char>(value);
            i += 3;
        } else {
            out += text[i];
        }
    }
    return out;
}

/// "36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue" (proc(5)).
std::optional<MountEntry> parse_line(std::string_view line) {
    MountEntry entry;
    if (!parse_number(next_field(line), entry.id) || !parse_number(next_field(line), entry.parent)) return {};
    const std::string_view device = next_field(line);
    const size_t colon = device.find(':');
    unsigned major = 0, minor = 0;
    if (colon == std::string_view::npos || !parse_number(device.substr(0, colon), major) ||
        !parse_number(device.substr(colon + 1), minor)) {
        return {};
    }
    entry.device = ::gnu_dev_makedev(major, minor);
    entry.root = unescape(next_field(line));
    entry.path = unescape(next_field(line));
    next_field(line);  // options of the mount
    for (std::string_view field = next_field(line); field != "-"; field = next_field(line)) {
        if (line.empty()) return {};
    }
    entry.type = unescape(next_field(line));
    entry.source = unescape(next_field(line));
    entry.options = unescape(next_field(line));
    if (entry.path.empty() || entry.type.empty()) return {};
    return entry;
}

}  // namespace

std::vector<MountEntry> parse_mountinfo(std::string_view text) {
    std::vector<MountEntry> all;
    while (!text.empty()) {
        const size_t end = text.find('\n');
        if (auto entry = parse_line(text.substr(0, end))) all.push_back(std::move(*entry));
        text = end == std::string_view::npos ? std::string_view() : text.substr(end + 1);
    }
    return all;
}

Result<std::vector<MountEntry>> read_mountinfo() {
    UniqueFd fd(::open("/proc/self/mountinfo", O_RDONLY | O_CLOEXEC));
    if (!fd) return fail_errno(errno, "Cannot read what is mounted, '/proc/self/mountinfo'");
    std::string text;
    std::array<char, 16384> buffer;
    for (;;) {
        const ssize_t n = ::read(fd.get(), buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(errno, "Cannot read what is mounted, '/proc/self/mountinfo'");
        if (n == 0) break;
        text.append(buffer.data(), static_cast<size_t>(n));
    }
    return parse_mountinfo(text);
}

uint64_t option_number(std::string_view options, std::string_view name, uint64_t otherwise) {
    while (!options.empty()) {
        const size_t comma = options.find(',');
        const std::string_view option = options.substr(0, comma);
        options = comma == std::string_view::npos ? std::string_view() : options.substr(comma + 1);
        if (!option.starts_with(name) || option.substr(name.size(), 1) != "=") continue;
        uint64_t value = 0;
        if (parse_number(option.substr(name.size() + 1), value)) return value;
    }
    return otherwise;
}

}  // namespace gantry::fuse
