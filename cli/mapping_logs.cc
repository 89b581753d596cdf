#include "cli/mapping_logs.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>

#include "block/formats/qcow2/mapping_log.h"

namespace gantry::cli {

Result<> check_mapping_log_directory(const std::string& directory) {
    struct statfs fs{};
    if (::statfs(directory.c_str(), &fs) != 0) return fail_errno(errno, "Directory of mapping logs '{}'", directory);
    struct stat st{};
    if (::stat(directory.c_str(), &st) != 0 || !S_ISDIR(st.st_mode)) {
        return fail(ErrorKind::kInvalid, "Directory of mapping logs '{}' is not a directory", directory);
    }
    const auto type = static_cast<uint64_t>(fs.f_type);
    if (type != TMPFS_MAGIC && type != RAMFS_MAGIC) {
        return fail(ErrorKind::kInvalid,
                    "Directory of mapping logs '{}' is not in memory; use one on tmpfs, such as /run or /dev/shm",
                    directory);
    }
    return {};
}

Result<UniqueFd> open_mapping_log(const std::string& directory, const std::string& node_name) {
    const std::string path = fmt::format("{}/{}.map", directory, node_name);
    UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
    if (!fd) return fail_errno(errno, "Mapping log '{}'", path);
    if (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
        if (errno != EWOULDBLOCK) return fail_errno(errno, "Mapping log '{}'", path);
        return fail(ErrorKind::kBusy, "Mapping log '{}' is in use by another process", path);
    }
    return fd;
}

namespace {

constexpr std::string_view kNamePrefix = "map-";

}  // namespace

Result<UniqueFd> KeptMappingLogs::open(const std::string& node_name) {
    const std::string name = fmt::format("{}{}", kNamePrefix, node_name);
    auto it = logs_.find(name);
    if (it == logs_.end()) {
        if (!keeper_.active()) return UniqueFd();
        std::vector<UniqueFd> left = keeper_.take(name);
        UniqueFd fd;
        if (left.size() == 1) {
            fd = std::move(left.front());
        } else {
            if (!left.empty()) keeper_.drop(name);
            fd.reset(::memfd_create(name.c_str(), MFD_CLOEXEC));
            if (!fd) return fail_errno(errno, "Memory file for a mapping log");
            const int number = fd.get();
            CHECK_OK(keeper_.put(name, std::span(&number, 1)));
        }
        it = logs_.emplace(name, std::move(fd)).first;
    }
    UniqueFd copy(::fcntl(it->second.get(), F_DUPFD_CLOEXEC, 3));
    if (!copy) return fail_errno(errno, "Memory file for a mapping log");
    return copy;
}

void KeptMappingLogs::drop_empty() {
    for (auto& [name, fd] : logs_) {
        block::qcow2::MappingLog log;
        const Result<> attached = log.attach(std::move(fd));
        if (attached && log.records().empty()) keeper_.drop(name);
    }
    logs_.clear();
}

}  // namespace gantry::cli
