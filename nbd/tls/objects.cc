#include "nbd/tls/objects.h"

#include "nbd/tls/policy.h"
#include "runtime/blocking_pool.h"
#include "schema/options.h"

namespace gantry::nbd {

namespace {

TlsObjects* the_objects = nullptr;

TlsKind kind_of(const json::object& options) {
    const std::string type = schema::Options(options).str("qom-type");
    if (type == "tls-creds-psk") return TlsKind::kPsk;
    return type == "tls-creds-anon" ? TlsKind::kAnon : TlsKind::kX509;
}

TlsEndpoint endpoint_of(const json::object& options) {
    return schema::Options(options).str("endpoint", "client") == "server" ? TlsEndpoint::kServer : TlsEndpoint::kClient;
}

Result<TlsCredentialsOptions> read_options(const json::object& raw, const block::crypto::Secrets& secrets) {
    const schema::Options options(raw);
    TlsCredentialsOptions out;
    out.kind = kind_of(raw);
    out.endpoint = endpoint_of(raw);
    out.dir = options.str("dir");
    out.ca_cert = options.str("ca-cert");
    out.ca_crl = options.str("ca-crl");
    out.cert = options.str("cert");
    out.key = options.str("key");
    out.psk_file = options.str("keys");
    out.dh_params = options.str("dh-params");
    out.priority = options.str("priority");
    out.verify_peer = options.flag("verify-peer", true);
    out.sanity_check = options.flag("sanity-check", true);
    out.username = options.str("username", out.username);
    if (options.has("passwordid")) {
        TRY(out.key_password, secrets.lookup_text(options.str("passwordid")));
    }
    return out;
}

Task<Result<std::shared_ptr<const TlsCredentials>>> load_from(TlsCredentialsOptions options) {
    auto loaded = co_await run_blocking([&] { return TlsCredentials::load(std::move(options)); });
    co_return loaded;
}

}  // namespace

TlsObject::TlsObject(json::object options, std::shared_ptr<const TlsCredentials> credentials)
    : options_(std::move(options)),
      id_(schema::Options(options_).str("id")),
      kind_(kind_of(options_)),
      endpoint_(endpoint_of(options_)),
      credentials_(std::move(credentials)) {}

std::shared_ptr<const TlsCredentials> TlsObject::credentials() const {
    const std::lock_guard lock(m_);
    return credentials_;
}

void TlsObject::replace(std::shared_ptr<const TlsCredentials> credentials) {
    const std::lock_guard lock(m_);
    credentials_.swap(credentials);
}

TlsObjects::TlsObjects(const block::crypto::Secrets& secrets) : secrets_(secrets) { the_objects = this; }
TlsObjects::~TlsObjects() {
    if (the_objects == this) the_objects = nullptr;
}

Task<Result<>> TlsObjects::add(json::object raw) {
    CO_TRY(TlsCredentialsOptions options, read_options(raw, secrets_));
    auto loaded = co_await load_from(std::move(options));
    if (!loaded) co_return std::unexpected(std::move(loaded).error());
    auto object = std::make_shared<TlsObject>(std::move(raw), std::move(*loaded));
    const std::string id = object->id();
    if (!objects_.try_emplace(id, std::move(object)).second) {
        co_return fail(ErrorKind::kExists, "attempt to add duplicate property '{}' to object (type 'container')", id);
    }
    co_return Result<>();
}

Result<> TlsObjects::remove(std::string_view id) {
    const auto it = objects_.find(id);
    if (it == objects_.end()) return fail(ErrorKind::kNotFound, "object '{}' not found", id);
    if (it->second.use_count() > 1) {
        return fail(ErrorKind::kBusy, "object '{}' is in use, can not be deleted; an NBD server or node has it", id);
    }
    objects_.erase(it);
    return {};
}

Task<Result<>> TlsObjects::reload(std::string id) {
    // One after the other: who was asked first must not replace what the next one read.
    const AsyncMutex::Guard turn = co_await reloading_.lock();
    std::vector<std::string> ids;
    if (!id.empty()) {
        if (!has(id)) {
            if (is_other_ && is_other_(id)) {
                co_return fail(ErrorKind::kInvalid, "Object with id '{}' is not TLS credentials", id);
            }
            co_return fail(ErrorKind::kNotFound, "No TLS credentials with id '{}'", id);
        }
        ids.push_back(id);
    } else {
        for (const auto& [name, object] : objects_) ids.push_back(name);
    }
    std::string failures;
    for (const std::string& name : ids) {
        const auto it = objects_.find(name);
        if (it == objects_.end()) continue;  // deleted meanwhile
        // It may be deleted meanwhile.
        const std::weak_ptr<TlsObject> asked = it->second;
        auto options = read_options(it->second->options(), secrets_);
        Result<std::shared_ptr<const TlsCredentials>> loaded = nullptr;
        if (options) {
            loaded = co_await load_from(std::move(*options));
        } else {
            loaded = std::unexpected(std::move(options).error());
        }
        const std::shared_ptr<TlsObject> object = asked.lock();
        if (!object) continue;
        if (loaded) {
            object->replace(std::move(*loaded));
        } else {
            failures += fmt::format("{}object '{}': {}", failures.empty() ? "" : "; ", name, loaded.error().message());
        }
    }
    if (!failures.empty()) {
        co_return fail(ErrorKind::kInvalid, "TLS credentials stay as they were: {}", failures);
    }
    co_return Result<>();
}

Result<std::shared_ptr<const TlsObject>> TlsObjects::find(std::string_view id, TlsEndpoint endpoint) const {
    const auto it = objects_.find(id);
    if (it == objects_.end() && is_other_ && is_other_(id)) {
        return fail(ErrorKind::kInvalid, "Object with id '{}' is not TLS credentials", id);
    }
    if (it == objects_.end()) return fail(ErrorKind::kNotFound, "No TLS credentials with id '{}'", id);
    if (it->second->endpoint() != endpoint) {
        return fail(ErrorKind::kInvalid, "Expected TLS credentials for a {} endpoint; '{}' has endpoint={}",
                    tls_endpoint_name(endpoint), id, tls_endpoint_name(it->second->endpoint()));
    }
    return it->second;
}

Result<std::shared_ptr<const TlsObject>> find_tls_object(std::string_view id, TlsEndpoint endpoint) {
    if (!the_objects) return fail(ErrorKind::kNotFound, "No TLS credentials with id '{}'", id);
    return the_objects->find(id, endpoint);
}

Result<TlsPolicy> tls_policy(const json::object& raw) {
    const schema::Options options(raw);
    TlsPolicy policy;
    policy.authz = options.str("tls-authz");
    policy.required = options.flag("tls-required", true);
    // Whoever asks for authorization gets it, or no server.
    if (options.has("tls-authz") && policy.authz.empty()) {
        return fail(ErrorKind::kInvalid, "Parameter 'tls-authz' expects the id of an authorization object, not ''");
    }
    if (options.has("tls-authz") && !policy.required) {
        return fail(
            ErrorKind::kInvalid,
            "'tls-authz' is of no use with tls-required=off: clients without TLS would not be asked for a name");
    }
    if (options.has("tls-creds")) {
        TRY(policy.object, find_tls_object(options.str("tls-creds"), TlsEndpoint::kServer));
    } else if (options.has("tls-authz") || options.has("tls-required")) {
        return fail(ErrorKind::kInvalid, "'{}' is of no use without 'tls-creds'",
                    options.has("tls-authz") ? "tls-authz" : "tls-required");
    }
    return policy;
}

}  // namespace gantry::nbd
