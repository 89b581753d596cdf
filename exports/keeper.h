// Keeper: descriptors that outlive this process, held by somebody else (the service manager's descriptor store).

#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"

namespace gantry::exports {

/// Main loop only. Names: letters, digits, '-', '_', '.', '#'; at most 200 bytes.
class Keeper {
  public:
    virtual ~Keeper() = default;
    /// Whether anybody holds what is put here.
    virtual bool active() const = 0;
    /// Why nobody does, for people.
    virtual std::string why_inactive() const = 0;
    /// Held under `name` from now on, all or none, besides what is held under it already. The caller's descriptors stay
    /// its own.
    virtual Result<> put(std::string_view name, std::span<const int> fds) = 0;
    /// Nothing is held under `name` any more.
    virtual void drop(std::string_view name) = 0;
    /// What the process before this one has put under `name`, in no certain order; each is handed out once, and held
    /// still.
    virtual std::vector<UniqueFd> take(std::string_view name) = 0;
    /// The same, only to be looked at: the descriptors stay where they are.
    virtual std::vector<int> look(std::string_view name) const = 0;
    /// The names of what the process before this one has put and nobody has taken yet.
    virtual std::vector<std::string> waiting() const = 0;

    /// What exports leave as it is when they end, because a process after this one goes on with it.
    enum class Leave : uint8_t {
        kNothing,
        kInherited,  // what they have from the process before this one: the start-up of this one has failed
        kEverything,
    };
    virtual Leave leave() const = 0;
};

}  // namespace gantry::exports
