// Ownership of a file descriptor.

#pragma once

#include <unistd.h>

#include <utility>

namespace gantry {

namespace detail {
/// Called before a descriptor is closed: loops that watch the number notice that it is a new descriptor when they meet
/// it again (backend_epoll.cc). Any thread.
void descriptor_closing(int fd) noexcept;
}  // namespace detail

/// Owns one file descriptor and closes it. Not thread-safe; movable.
class UniqueFd {
  public:
    UniqueFd() = default;
    explicit UniqueFd(int fd) : fd_(fd) {}
    UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
    UniqueFd& operator=(UniqueFd&& other) noexcept {
        if (this != &other) reset(std::exchange(other.fd_, -1));
        return *this;
    }
    ~UniqueFd() { reset(); }

    int get() const { return fd_; }
    explicit operator bool() const { return fd_ >= 0; }
    int release() { return std::exchange(fd_, -1); }
    void reset(int fd = -1) {
        if (fd_ >= 0) {
            detail::descriptor_closing(fd_);
            ::close(fd_);
        }
        fd_ = fd;
    }

  private:
    int fd_ = -1;
};

}  // namespace gantry
