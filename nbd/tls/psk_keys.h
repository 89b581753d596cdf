// The file of pre-shared keys.

#pragma once

#include <map>
#include <string>
#include <string_view>

#include "block/crypto/secret_bytes.h"
#include "runtime/error.h"

namespace gantry::nbd {

using PskKeys = std::map<std::string, block::crypto::SecretBytes, std::less<>>;

/// Lines "identity:hexkey"; empty lines and lines that begin with # do not count, nor a second line for an identity.
/// `path` is for the error, which names the line and never the key.
Result<PskKeys> parse_psk_keys(std::string_view text, const std::string& path);

}  // namespace gantry::nbd
