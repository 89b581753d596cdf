// Objects: what object-add makes: iothreads, secrets, TLS credentials, authorization.

#pragma once

#include <map>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "block/crypto/secrets.h"
#include "exports/export.h"
#include "nbd/authz/authz.h"
#include "nbd/tls/objects.h"
#include "runtime/error.h"
#include "runtime/runtime.h"
#include "schema/value.h"

namespace gantry::qmp {

/// Main loop only.
class Objects {
  public:
    Objects(Runtime& runtime, exports::Registry& exports, block::crypto::Secrets& secrets);
    ~Objects() { clear(); }

    /// object-add with validated options (qom-type, id, properties).
    Task<Result<>> add(json::object options);
    /// object-del: `object 'X' not found`, `object 'X' is in use, can not be deleted`.
    Result<> remove(std::string_view id);
    /// Stops every iothread, wipes every secret; no export is left.
    void clear();

    struct IoThread {
        Loop* loop = nullptr;
        int64_t poll_max_ns = 32768, poll_grow = 0, poll_shrink = 0, aio_max_batch = 0;
    };
    const std::map<std::string, IoThread, std::less<>>& iothreads() const { return iothreads_; }
    nbd::TlsObjects& tls() { return tls_; }

  private:
    bool exists(std::string_view id) const;
    Task<Result<>> add_kind(std::string type, json::object options);
    Result<> add_iothread(const json::object& options);

    Runtime& runtime_;
    exports::Registry& exports_;
    block::crypto::Secrets& secrets_;
    nbd::TlsObjects tls_;
    nbd::AuthzObjects authz_;
    std::map<std::string, IoThread, std::less<>> iothreads_;
    std::set<std::string, std::less<>> coming_;  // being made: files are read
};

}  // namespace gantry::qmp
