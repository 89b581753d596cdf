// Keeper: descriptors that outlive this process, held by somebody else (the service manager's descriptor store).

#pragma once

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::exports {

/// Main loop only. Names: letters, digits, '-', '_', '.'; at most 200 bytes.
class Keeper {
  public:
    virtual ~Keeper() = default;
    /// Whether anybody holds what is put here.
    virtual bool active() const = 0;
    /// Held under `name` from now on, besides what is held under it already. The caller's descriptor stays its own.
    virtual Result<> put(std::string_view name, int fd) = 0;
    /// Nothing is held under `name` any more.
    virtual void drop(std::string_view name) = 0;
    /// What the process before this one has put under `name`, in its order; each is handed out once, and held still.
    virtual std::vector<UniqueFd> take(std::string_view name) = 0;
};

}  // namespace gantry::exports
