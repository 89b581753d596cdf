// Parsing inside the closed box of an option's payload, and quoting what a client sent.

#pragma once

#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nbd/protocol.h"

namespace gantry::nbd {

/// INFO and GO.
struct InfoRequest {
    std::string_view name;
    bool wants_name = false;
    bool wants_block_size = false;
};

/// LIST_META_CONTEXT and SET_META_CONTEXT.
struct ContextRequest {
    std::string_view name;
    std::vector<std::string_view> queries;
};

/// nullopt with `why` (a static text) when the payload is malformed in any way, bytes left over included.
/// The views point into `payload`.
std::optional<InfoRequest> parse_info_request(std::span<const uint8_t> payload, std::string_view& why);
std::optional<ContextRequest> parse_context_request(std::span<const uint8_t> payload, std::string_view& why);

/// A client's string for an error text: at most 80 bytes of it, quoted, ASCII (other bytes as \xNN).
std::string quote(std::string_view text);

}  // namespace gantry::nbd
