// The information replies that INFO and GO share.

#pragma once

#include <optional>
#include <string>

#include "nbd/handshake/options.h"

namespace gantry::nbd {

enum class InfoPurpose : uint8_t { kInfo, kGo };

/// Sends the INFO replies for the export that `payload` names; the caller sends the ACK. nullopt: refused, the error
/// reply is out.
std::optional<std::string> send_export_info(Handshake& hs, Payload payload, OptionOutput& out, InfoPurpose purpose);

}  // namespace gantry::nbd
