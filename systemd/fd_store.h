// The service manager's descriptor store (sd_notify(3), FDSTORE=1): descriptors that outlive this process and come back
// to the next one.

#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/unique_fd.h"
#include "systemd/activation.h"
#include "systemd/notify.h"

namespace gantry::systemd {

/// Main loop only.
class FdStore {
  public:
    enum class Use : uint8_t {
        kAuto,  // when the manager says that it has one (FDSTORE, since systemd 254), or has given something back
        kOn,    // whenever there is a manager
        kOff,   // what comes back is closed, and removed from the store
    };
    /// Takes what came back out of `passed`, and the variable FDSTORE. `notifier` lives as long as this.
    FdStore(Notifier& notifier, ActivationSockets& passed, Use use);
    FdStore(const FdStore&) = delete;

    bool active() const { return active_; }
    /// Why not, for people; empty when it is.
    std::string_view why_inactive() const { return why_inactive_; }
    /// All in one message, so either all are stored or none: also when this process dies right after it. Without
    /// watching for hang-ups (FDPOLL=0). Errors: kUnsupported, kTooLarge, errno.
    Result<> put(std::string_view name, std::span<const int> fds);
    void drop(std::string_view name);
    /// What came back under `name`; once.
    std::vector<UniqueFd> take(std::string_view name);
    /// The same, which stays here.
    std::vector<int> look(std::string_view name) const;
    /// What came back and was not taken yet: each name once.
    std::vector<std::string> waiting() const;

    /// Names of the store begin like this, so that nothing else that is passed is taken for one.
    static constexpr std::string_view kPrefix = "gantry-";
    static constexpr size_t kMaxName = 200;  // bytes, without the prefix

  private:
    Notifier& notifier_;
    std::vector<ActivationSockets::Passed> back_;
    std::string_view why_inactive_;
    bool active_ = false;
};

}  // namespace gantry::systemd
