// Secrets: the objects `secret` and `secret_keyring`.

#pragma once

#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "block/crypto/secret_bytes.h"
#include "runtime/error.h"
#include "runtime/task.h"
#include "schema/value.h"

namespace gantry::block::crypto {

/// Main loop. Nobody holds a reference to a secret: users take a copy, so a secret may go once it was used.
class Secrets {
  public:
    /// Whether an id belongs to another object, for the text of a refusal.
    using IsOther = std::function<bool(std::string_view id)>;
    void set_other_objects(IsOther is_other) { is_other_ = std::move(is_other); }

    /// object-add with validated options of `secret` or `secret_keyring`. Files and keys are read now, on the blocking
    /// pool. `file` may name a credential of the service manager: "credential:ID".
    Task<Result<>> add(json::object options);
    /// False: no such secret.
    bool remove(std::string_view id) { return secrets_.erase(std::string(id)) != 0; }
    bool has(std::string_view id) const { return secrets_.contains(id); }
    void clear() { secrets_.clear(); }

    /// "No secret with id 'x'", "Object with id 'x' is not a secret".
    Result<SecretBytes> lookup(std::string_view id) const;
    /// A passphrase: must be UTF-8.
    Result<SecretBytes> lookup_text(std::string_view id) const;

  private:
    Result<SecretBytes> decode(const json::object& options, SecretBytes raw) const;

    std::map<std::string, SecretBytes, std::less<>> secrets_;
    IsOther is_other_;
};

}  // namespace gantry::block::crypto
