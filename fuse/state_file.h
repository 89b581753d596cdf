// StateFile: a few facts in a memory file that outlives this process, whole at any moment.

#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "runtime/error.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::fuse {

/// Two places, written in turn, each with a number and a sum: who dies while he writes leaves the older one. write() on
/// any thread.
class StateFile {
  public:
    static constexpr size_t kPlace = 32768;  // bytes, with the head

    static Result<std::unique_ptr<StateFile>> create();
    /// Takes over what another process has made; kInvalid when it is no such file or has nothing whole in it. Goes on
    /// being written.
    static Result<std::unique_ptr<StateFile>> adopt(UniqueFd fd);
    StateFile(const StateFile&) = delete;

    int fd() const { return fd_.get(); }
    /// The newest that is whole.
    Result<json::object> read() const;
    /// kTooLarge for more than fits; errno.
    Result<> write(const json::object& state);

  private:
    explicit StateFile(UniqueFd fd) : fd_(std::move(fd)) {}
    struct Head;
    struct Found;
    Found newest() const;

    UniqueFd fd_;
    mutable std::mutex mutex_;
    uint64_t number_ = 0;  // of what was written last
};

}  // namespace gantry::fuse
