#include "cli/made_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <utility>

#include "runtime/own_mounts.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

Result<MadeFile> MadeFile::create(const std::string& path) {
    MadeFile made;
    if (place_of(path, true)) return made;
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
    if (!fd) return fail_errno(errno, "Could not create the mount point '{}'", path);
    struct stat st{};
    std::error_code error;
    if (::fstat(fd.get(), &st) != 0) return fail_errno(errno, "Could not create the mount point '{}'", path);
    // By then the working directory may be another.
    made.path_ = std::filesystem::absolute(path, error).string();
    if (error) made.path_ = path;
    made.device_ = st.st_dev;
    made.inode_ = st.st_ino;
    return made;
}

MadeFile::MadeFile(MadeFile&& other) noexcept { *this = std::move(other); }

MadeFile& MadeFile::operator=(MadeFile&& other) noexcept {
    std::swap(path_, other.path_);
    std::swap(device_, other.device_);
    std::swap(inode_, other.inode_);
    return *this;
}

MadeFile::~MadeFile() {
    if (path_.empty()) return;
    const auto place = place_of(path_, false);
    struct stat st{};
    if (place && place->device == device_ && ::lstat(path_.c_str(), &st) == 0 && st.st_ino == inode_ &&
        st.st_size == 0) {
        ::unlink(path_.c_str());
    }
}

}  // namespace gantry::cli
