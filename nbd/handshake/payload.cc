#include "nbd/handshake/payload.h"

#include <fmt/format.h>

namespace gantry::nbd {

namespace {

/// Takes fields from the front; never past the end.
class Cursor {
  public:
    explicit Cursor(std::span<const uint8_t> bytes) : rest_(bytes) {}
    template <class T>
    bool take(T& value) {
        if (rest_.size() < sizeof(T)) return false;
        value = load_big<T>(rest_.data());
        rest_ = rest_.subspan(sizeof(T));
        return true;
    }
    /// A counted string (u32 length).
    bool take_string(std::string_view& text) {
        uint32_t length = 0;
        if (!take(length) || length > rest_.size()) return false;
        text = {reinterpret_cast<const char*>(rest_.data()), length};
        rest_ = rest_.subspan(length);
        return true;
    }
    size_t left() const { return rest_.size(); }

  private:
    std::span<const uint8_t> rest_;
};

}  // namespace

std::optional<InfoRequest> parse_info_request(std::span<const uint8_t> payload, std::string_view& why) {
    Cursor in(payload);
    InfoRequest request;
    uint16_t count = 0;
    if (!in.take_string(request.name) || !in.take(count)) {
        why = "the export name does not fit the option's length";
        return std::nullopt;
    }
    if (request.name.size() > kMaxString) {
        why = "the export name is too long";
        return std::nullopt;
    }
    if (in.left() != size_t{count} * sizeof(uint16_t)) {
        why = "the number of information requests does not fit the option's length";
        return std::nullopt;
    }
    for (uint16_t type = 0; in.take(type);) {
        if (type == kInfoName) request.wants_name = true;
        if (type == kInfoBlockSize) request.wants_block_size = true;
    }
    return request;
}

std::optional<ContextRequest> parse_context_request(std::span<const uint8_t> payload, std::string_view& why) {
    Cursor in(payload);
    ContextRequest request;
    uint32_t count = 0;
    if (!in.take_string(request.name) || !in.take(count)) {
        why = "the export name does not fit the option's length";
        return std::nullopt;
    }
    if (request.name.size() > kMaxString) {
        why = "the export name is too long";
        return std::nullopt;
    }
    if (count > in.left() / sizeof(uint32_t)) {
        why = "more queries announced than the option's length can hold";
        return std::nullopt;
    }
    request.queries.reserve(count);
    for (uint32_t i = 0; i < count; ++i) {
        std::string_view query;
        if (!in.take_string(query)) {
            why = "a query does not fit the option's length";
            return std::nullopt;
        }
        // Longer than any name can be: matches nothing, but a list with it is not an empty list.
        request.queries.push_back(query.size() <= kMaxString ? query : std::string_view());
    }
    if (in.left() != 0) {
        why = "bytes left over after the last query";
        return std::nullopt;
    }
    return request;
}

std::string quote(std::string_view text) {
    constexpr size_t kShown = 80;
    std::string out = "'";
    for (const char c : text.substr(0, kShown)) {
        const auto byte = static_cast<unsigned char>(c);
        if (byte < 0x20 || byte >= 0x7f) {
            out += fmt::format("\\x{:02x}", byte);
        } else {
            out += c;
        }
    }
    out += text.size() > kShown ? "...'" : "'";
    return out;
}

}  // namespace gantry::nbd
