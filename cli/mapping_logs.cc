#include "cli/mapping_logs.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/vfs.h>

#include <cerrno>

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

}  // namespace gantry::cli
