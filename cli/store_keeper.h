// StoreKeeper: the service manager's descriptor store as what exports know.

#pragma once

#include "exports/keeper.h"
#include "systemd/fd_store.h"

namespace gantry::cli {

/// Main loop only.
class StoreKeeper final : public exports::Keeper {
  public:
    explicit StoreKeeper(systemd::FdStore& store) : store_(store) {}

    bool active() const override { return store_.active(); }
    std::string why_inactive() const override { return std::string(store_.why_inactive()); }
    Result<> put(std::string_view name, std::span<const int> fds) override { return store_.put(name, fds); }
    void drop(std::string_view name) override { store_.drop(name); }
    std::vector<UniqueFd> take(std::string_view name) override { return store_.take(name); }
    std::vector<int> look(std::string_view name) const override { return store_.look(name); }
    std::vector<std::string> waiting() const override { return store_.waiting(); }
    Leave leave() const override { return leave_; }
    void set_leave(Leave leave) { leave_ = leave; }

  private:
    systemd::FdStore& store_;
    Leave leave_ = Leave::kNothing;
};

}  // namespace gantry::cli
