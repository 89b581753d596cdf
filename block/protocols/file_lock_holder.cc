// Who holds a lock: the kernel does not name the owner of an open file description's lock, but /proc shows the locks of
// each descriptor that we may look at.

#include <dirent.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <array>
#include <charconv>
#include <memory>

#include "block/protocols/file_locks.h"
#include "runtime/unique_fd.h"

namespace gantry::block {

namespace {

struct CloseDir {
    void operator()(DIR* dir) const { ::closedir(dir); }
};
using Directory = std::unique_ptr<DIR, CloseDir>;

/// The first 4 KiB of a file of /proc; empty when it cannot be read.
std::string read_small(const std::string& path) {
    UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
    if (!fd) return {};
    std::array<char, 4096> buffer;
    const ssize_t n = ::read(fd.get(), buffer.data(), buffer.size());
    return n > 0 ? std::string(buffer.data(), static_cast<size_t>(n)) : std::string();
}

template <class T>
bool parse_number(std::string_view text, T& out) {
    const auto r = std::from_chars(text.data(), text.data() + text.size(), out);
    return r.ec == std::errc() && r.ptr == text.data() + text.size();
}

std::string_view last_word(std::string_view& line) {
    const size_t end = line.find_last_not_of(' ');
    if (end == std::string_view::npos) return {};
    line = line.substr(0, end + 1);
    const size_t space = line.find_last_of(" \t");
    std::string_view word = space == std::string_view::npos ? line : line.substr(space + 1);
    line = space == std::string_view::npos ? std::string_view() : line.substr(0, space);
    return word;
}

/// "lock:\t1: OFDLCK  ADVISORY  READ -1 fe:00:131 100 101" (the last number may be EOF): does such a line cover `byte`?
bool info_has_lock(std::string_view info, unsigned byte) {
    while (!info.empty()) {
        const size_t newline = info.find('\n');
        std::string_view line = info.substr(0, newline);
        info = newline == std::string_view::npos ? std::string_view() : info.substr(newline + 1);
        if (!line.starts_with("lock:")) continue;
        const std::string_view end_word = last_word(line);
        uint64_t first = 0, last = UINT64_MAX;
        if (end_word != "EOF" && !parse_number(end_word, last)) continue;
        if (!parse_number(last_word(line), first)) continue;
        if (byte >= first && byte <= last) return true;
    }
    return false;
}

std::string process_text(int pid) {
    if (pid == ::getpid()) return "this process";
    std::string name = read_small(fmt::format("/proc/{}/comm", pid));
    while (!name.empty() && (name.back() == '\n' || name.back() == '\0')) name.pop_back();
    for (char& c : name) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
    }
    return name.empty() ? fmt::format("process {}", pid) : fmt::format("process {} ({})", pid, name);
}

bool process_holds(int pid, unsigned byte, const struct stat& file, int own_fd) {
    const Directory dir(::opendir(fmt::format("/proc/{}/fdinfo", pid).c_str()));
    if (!dir) return false;
    while (const dirent* entry = ::readdir(dir.get())) {
        int number = 0;
        if (!parse_number(std::string_view(entry->d_name), number)) continue;
        if (pid == ::getpid() && number == own_fd) continue;
        if (!info_has_lock(read_small(fmt::format("/proc/{}/fdinfo/{}", pid, number)), byte)) continue;
        // What the kernel knows of it is enough: its server may be one of our own exports.
        struct statx st;
        if (::statx(AT_FDCWD, fmt::format("/proc/{}/fd/{}", pid, number).c_str(), AT_STATX_DONT_SYNC, STATX_INO, &st) ==
                0 &&
            ::gnu_dev_makedev(st.stx_dev_major, st.stx_dev_minor) == file.st_dev && st.stx_ino == file.st_ino)
            return true;
    }
    return false;
}

}  // namespace

std::string file_lock_holder(int fd, unsigned byte, int pid_hint) {
    if (pid_hint > 0) return process_text(pid_hint);  // a traditional lock has an owner
    struct stat file;
    if (::fstat(fd, &file) < 0) return {};
    const Directory proc(::opendir("/proc"));
    if (!proc) return {};
    while (const dirent* entry = ::readdir(proc.get())) {
        int pid = 0;
        if (parse_number(std::string_view(entry->d_name), pid) && process_holds(pid, byte, file, fd)) {
            return process_text(pid);
        }
    }
    return {};
}

}  // namespace gantry::block
