// Authorization: objects that say yes or no to the name of a verified client.

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::nbd {

/// One object. Main loop.
class Authz {
  public:
    virtual ~Authz() = default;
    /// May read files or ask PAM, on the blocking pool. An error is a no with a reason beyond the rules.
    virtual Task<Result<bool>> allows(std::string identity) = 0;
};

/// A list of rules: the first that matches decides, else the policy.
struct AuthzRules {
    enum class Format : uint8_t { kExact, kGlob };
    struct Rule {
        std::string match;
        bool allow = false;
        Format format = Format::kExact;
    };
    bool allow = false;  // the policy
    std::vector<Rule> rules;

    bool allows(std::string_view identity) const;
    /// From validated AuthZListProperties.
    static AuthzRules from(const json::object& options);
};

/// `*` any bytes, `?` any one character. Never more than pattern times text steps.
bool glob_match(std::string_view pattern, std::string_view text);

Result<std::shared_ptr<Authz>> make_authz_file(std::string filename, bool refresh);  // blocks
Result<std::shared_ptr<Authz>> make_authz_pam(std::string service);  // kUnsupported in a build without PAM

/// Main loop only.
class AuthzObjects {
  public:
    AuthzObjects();
    ~AuthzObjects();

    /// object-add of authz-simple, authz-list, authz-list-file (also spelt authz-listfile), authz-pam.
    Task<Result<>> add(json::object options);
    bool has(std::string_view id) const { return objects_.contains(id); }
    /// False: no such object. Nobody holds one: they are looked up for each client.
    bool remove(std::string_view id);
    void clear() { objects_.clear(); }
    void set_other_objects(std::function<bool(std::string_view id)> is_other) { is_other_ = std::move(is_other); }

    std::shared_ptr<Authz> find(std::string_view id) const;
    bool is_other(std::string_view id) const { return is_other_ && is_other_(id); }

  private:
    std::map<std::string, std::shared_ptr<Authz>, std::less<>> objects_;
    std::function<bool(std::string_view id)> is_other_;
};

/// Asks the object `id` of the process about `identity`. An error says why the answer is no: no such object, no
/// identity, a rule. Main loop.
Task<Result<>> authorize(std::string id, std::string identity);

}  // namespace gantry::nbd
