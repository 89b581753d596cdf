// Descriptors that one monitor connection has passed.

#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::qmp {

/// Main loop only. They are closed with the connection.
class MonitorDescriptors {
  public:
    /// What came with the command that is being executed; none: invalid.
    UniqueFd passed;

    /// getfd: a descriptor of that name is replaced.
    void put(std::string name, UniqueFd fd) { named_.insert_or_assign(std::move(name), std::move(fd)); }
    /// Gives one away; invalid when there is none.
    UniqueFd take(std::string_view name) {
        const auto it = named_.find(name);
        if (it == named_.end()) return UniqueFd();
        UniqueFd fd = std::move(it->second);
        named_.erase(it);
        return fd;
    }

  private:
    std::map<std::string, UniqueFd, std::less<>> named_;
};

}  // namespace gantry::qmp
