#include "cli/pid_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

namespace gantry::cli {

namespace {

Result<> lock_whole(int fd) {
    struct flock lock{};
    lock.l_type = F_WRLCK;
    lock.l_whence = SEEK_SET;
    if (::fcntl(fd, F_SETLK, &lock) != 0) return fail_errno(errno, "cannot create PID file: Cannot lock pid file");
    return {};
}

}  // namespace

Result<PidFile> PidFile::create(const std::string& path) {
    for (;;) {
        UniqueFd fd(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644));
        if (!fd) return fail_errno(errno, "cannot create PID file: Cannot open pid file '{}'", path);
        CHECK_OK(lock_whole(fd.get()));
        struct stat opened{}, named{};
        if (::fstat(fd.get(), &opened) != 0) return fail_errno(errno, "cannot create PID file: Cannot stat '{}'", path);
        // Its former owner may have removed the name between our open and our lock.
        if (::stat(path.c_str(), &named) != 0 || named.st_ino != opened.st_ino || named.st_dev != opened.st_dev)
            continue;
        std::string text = fmt::format("{}\n", ::getpid());
        if (::ftruncate(fd.get(), 0) != 0 ||
            ::pwrite(fd.get(), text.data(), text.size(), 0) != static_cast<ssize_t>(text.size())) {
            int e = errno;
            ::unlink(path.c_str());
            return fail_errno(e, "cannot create PID file: Failed to write pid file '{}'", path);
        }
        PidFile file;
        file.path_ = path;
        file.fd_ = std::move(fd);
        return file;
    }
}

void PidFile::remove() {
    if (!fd_) return;
    ::unlink(path_.c_str());
    fd_.reset();
}

}  // namespace gantry::cli
