#include "nbd/authz/authz.h"

#include "runtime/blocking_pool.h"
#include "schema/options.h"

namespace gantry::nbd {

namespace {

AuthzObjects* the_objects = nullptr;

class Simple final : public Authz {
  public:
    explicit Simple(std::string identity) : identity_(std::move(identity)) {}
    Task<Result<bool>> allows(std::string identity) override { co_return identity == identity_; }

  private:
    const std::string identity_;
};

class List final : public Authz {
  public:
    explicit List(AuthzRules rules) : rules_(std::move(rules)) {}
    Task<Result<bool>> allows(std::string identity) override { co_return rules_.allows(identity); }

  private:
    const AuthzRules rules_;
};

/// Bytes of the character that begins `text`.
size_t character(std::string_view text) {
    size_t n = 1;
    while (n < text.size() && (static_cast<uint8_t>(text[n]) & 0xc0) == 0x80) ++n;
    return n;
}

}  // namespace

bool glob_match(std::string_view pattern, std::string_view text) {
    constexpr size_t kNone = ~size_t{0};
    size_t p = 0, t = 0, star = kNone, star_text = 0;
    while (t < text.size()) {
        if (p < pattern.size() && pattern[p] == '*') {
            star = p++;
            star_text = t;
        } else if (p < pattern.size() && pattern[p] == '?') {
            ++p;
            t += character(text.substr(t));
        } else if (p < pattern.size() && pattern[p] == text[t]) {
            ++p;
            ++t;
        } else if (star != kNone) {
            // The last star takes one byte more.
            p = star + 1;
            t = ++star_text;
        } else {
            return false;
        }
    }
    while (p < pattern.size() && pattern[p] == '*') ++p;
    return p == pattern.size();
}

bool AuthzRules::allows(std::string_view identity) const {
    for (const Rule& rule : rules) {
        const bool hit = rule.format == Format::kExact ? rule.match == identity : glob_match(rule.match, identity);
        if (hit) return rule.allow;
    }
    return allow;
}

AuthzRules AuthzRules::from(const json::object& object) {
    const schema::Options options(object);
    AuthzRules out;
    out.allow = options.str("policy", "deny") == "allow";
    if (const json::value* rules = options.find("rules")) {
        for (const json::value& v : rules->get_array()) {
            const schema::Options rule(v.get_object());
            out.rules.push_back({rule.str("match"), rule.str("policy") == "allow",
                                 rule.str("format", "exact") == "glob" ? Format::kGlob : Format::kExact});
        }
    }
    return out;
}

AuthzObjects::AuthzObjects() { the_objects = this; }
AuthzObjects::~AuthzObjects() {
    if (the_objects == this) the_objects = nullptr;
}

Task<Result<>> AuthzObjects::add(json::object raw) {
    const schema::Options options(raw);
    const std::string type = options.str("qom-type"), id = options.str("id");
    std::shared_ptr<Authz> made;
    if (type == "authz-simple") {
        made = std::make_shared<Simple>(options.str("identity"));
    } else if (type == "authz-list") {
        made = std::make_shared<List>(AuthzRules::from(raw));
    } else if (type == "authz-pam") {
        CO_TRY(made, make_authz_pam(options.str("service")));
    } else {
        const std::string filename = options.str("filename");
        const bool refresh = options.flag("refresh", true);
        auto loaded = co_await run_blocking([&] { return make_authz_file(filename, refresh); });
        if (!loaded) co_return std::unexpected(std::move(loaded).error());
        made = std::move(*loaded);
    }
    if (!objects_.try_emplace(id, std::move(made)).second) {
        co_return fail(ErrorKind::kExists, "attempt to add duplicate property '{}' to object (type 'container')", id);
    }
    co_return Result<>();
}

bool AuthzObjects::remove(std::string_view id) {
    const auto it = objects_.find(id);
    if (it == objects_.end()) return false;
    objects_.erase(it);
    return true;
}

std::shared_ptr<Authz> AuthzObjects::find(std::string_view id) const {
    const auto it = objects_.find(id);
    return it == objects_.end() ? nullptr : it->second;
}

Task<Result<>> authorize(std::string id, std::string identity) {
    // It may be replaced while it is asked.
    const std::shared_ptr<Authz> object = the_objects ? the_objects->find(id) : nullptr;
    if (!object && the_objects && the_objects->is_other(id)) {
        co_return fail(ErrorKind::kInvalid, "Object '{}' is not a QAuthZ subclass; nobody is let in", id);
    }
    if (!object) {
        co_return fail(ErrorKind::kNotFound, "Cannot find QAuthZ object ID {}; nobody is let in before it exists", id);
    }
    if (identity.empty()) {
        co_return fail(ErrorKind::kPermission,
                       "authorization by '{}' needs a client whose name was verified (x509 with verify-peer, or PSK)",
                       id);
    }
    auto answer = co_await object->allows(identity);
    if (!answer) {
        co_return std::unexpected(
            std::move(answer).error().context(fmt::format("authorization of '{}' by '{}'", identity, id)));
    }
    if (!*answer) co_return fail(ErrorKind::kPermission, "TLS authz check for '{}' is denied by '{}'", identity, id);
    co_return Result<>();
}

}  // namespace gantry::nbd
