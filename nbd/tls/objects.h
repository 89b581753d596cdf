// TLS credentials as objects of the process: by id, loaded again on request, held by who uses them.

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "block/crypto/secrets.h"
#include "nbd/tls/credentials.h"
#include "runtime/sync.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::nbd {

/// What an id stands for. Who holds one keeps the object from being deleted; take credentials() for each connection.
class TlsObject {
  public:
    /// `options` are those of object-add.
    TlsObject(json::object options, std::shared_ptr<const TlsCredentials> credentials);
    const std::string& id() const { return id_; }
    TlsKind kind() const { return kind_; }
    TlsEndpoint endpoint() const { return endpoint_; }
    const json::object& options() const { return options_; }
    /// The newest ones. Any thread.
    std::shared_ptr<const TlsCredentials> credentials() const;
    void replace(std::shared_ptr<const TlsCredentials> credentials);

  private:
    const json::object options_;
    const std::string id_;
    const TlsKind kind_;
    const TlsEndpoint endpoint_;
    mutable std::mutex m_;
    std::shared_ptr<const TlsCredentials> credentials_;
};

/// Main loop only.
class TlsObjects {
  public:
    explicit TlsObjects(const block::crypto::Secrets& secrets);
    ~TlsObjects();

    /// object-add of tls-creds-x509, tls-creds-psk, tls-creds-anon with validated options.
    Task<Result<>> add(json::object options);
    bool has(std::string_view id) const { return objects_.contains(id); }
    bool empty() const { return objects_.empty(); }
    /// kBusy while somebody holds it.
    Result<> remove(std::string_view id);
    /// Reads the files again, of one object or (empty id) of all. What cannot be loaded keeps its old credentials; the
    /// error names all of them. Connections that exist live on.
    Task<Result<>> reload(std::string id);
    void clear() { objects_.clear(); }

    /// "No TLS credentials with id 'X'", "Expected TLS credentials for a server endpoint".
    Result<std::shared_ptr<const TlsObject>> find(std::string_view id, TlsEndpoint endpoint) const;
    /// Whether an id belongs to an object of another kind: "Object with id 'X' is not TLS credentials".
    void set_other_objects(std::function<bool(std::string_view id)> is_other) { is_other_ = std::move(is_other); }

  private:
    const block::crypto::Secrets& secrets_;
    std::map<std::string, std::shared_ptr<TlsObject>, std::less<>> objects_;
    AsyncMutex reloading_;
    std::function<bool(std::string_view id)> is_other_;
};

/// TlsObjects::find() of the process's objects (the one TlsObjects that exists). Main loop only.
Result<std::shared_ptr<const TlsObject>> find_tls_object(std::string_view id, TlsEndpoint endpoint);

}  // namespace gantry::nbd
