// authz-pam: the account stage of a PAM service.

#include "nbd/authz/authz.h"
#include "runtime/blocking_pool.h"
#include "runtime/sync.h"

#ifdef GANTRY_PAM

#include <security/pam_appl.h>

namespace gantry::nbd {

namespace {

/// Questions at the same time: a service that does not answer leaves half of the pool's threads to others.
AsyncSemaphore& asking() {
    static AsyncSemaphore slots(8);
    return slots;
}

/// There is nobody to talk to.
int no_conversation(int, const pam_message**, pam_response**, void*) { return PAM_CONV_ERR; }

Result<bool> ask(const std::string& service, const std::string& identity) {
    const pam_conv conversation{no_conversation, nullptr};
    pam_handle_t* handle = nullptr;
    int r = ::pam_start(service.c_str(), identity.c_str(), &conversation, &handle);
    if (r != PAM_SUCCESS) {
        return fail(ErrorKind::kPermission, "Unable to start PAM service '{}': {}", service,
                    ::pam_strerror(nullptr, r));
    }
    r = ::pam_acct_mgmt(handle, PAM_SILENT);
    const std::string why = ::pam_strerror(handle, r);
    ::pam_end(handle, r);
    if (r == PAM_SUCCESS) return true;
    if (r == PAM_PERM_DENIED || r == PAM_ACCT_EXPIRED || r == PAM_USER_UNKNOWN || r == PAM_AUTH_ERR) return false;
    return fail(ErrorKind::kPermission, "PAM service '{}' gives no answer: {}", service, why);
}

class Pam final : public Authz {
  public:
    explicit Pam(std::string service) : service_(std::move(service)) {}
    Task<Result<bool>> allows(std::string identity) override {
        const std::string service = service_;
        co_await asking().acquire();
        auto answer = co_await run_blocking([&] { return ask(service, identity); });
        asking().release();
        co_return answer;
    }

  private:
    const std::string service_;
};

}  // namespace

Result<std::shared_ptr<Authz>> make_authz_pam(std::string service) {
    if (service.empty()) return fail(ErrorKind::kInvalid, "service not provided");
    return std::make_shared<Pam>(std::move(service));
}

}  // namespace gantry::nbd

#else

namespace gantry::nbd {

Result<std::shared_ptr<Authz>> make_authz_pam(std::string) {
    return fail(ErrorKind::kUnsupported, "authz-pam needs a build with PAM");
}

}  // namespace gantry::nbd

#endif
