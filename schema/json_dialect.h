// JSON as QMP speaks it: a reader that survives any input, and the writer of replies (spec: QMP "JSON dialect").

#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/error.h"
#include "schema/value.h"

namespace gantry::schema {

struct JsonLimits {
    size_t token_bytes = size_t{64} << 20;  // all token text of one message
    size_t tokens = size_t{1} << 21;        // per message
    size_t nesting = 1024;
};

/// Finds JSON values in a byte stream. Feed bytes as they come, then call next() until it has nothing more.
/// Every error is one result; afterwards reading goes on at the next bracket, brace, comma, colon or line.
/// One thread at a time.
class JsonReader {
  public:
    explicit JsonReader(JsonLimits limits = {}) : limits_(limits) {}

    /// Keeps `bytes` for next(); nothing is looked at before that.
    void feed(std::string_view bytes);
    /// The next complete value or error (kInvalid, "JSON parse error, ..."; kTooLarge for the limits), if the bytes fed
    /// so far hold one.
    std::optional<Result<json::value>> next();
    /// The input is over: what is unfinished becomes an error. Then next() gives it.
    void finish();

    /// Bytes fed and not looked at yet.
    size_t pending_bytes() const { return input_.size() - at_; }
    /// Forgets everything.
    void reset();

  private:
    enum class Lex : uint8_t {
        kStart,
        kRecover,
        kKeyword,
        kString,
        kEscape,
        kMinus,
        kZero,
        kDigits,
        kPoint,
        kFraction,
        kExponent,
        kExponentSign,
        kExponentDigits,
    };
    enum class TokenType : uint8_t {
        kOpenBrace,
        kCloseBrace,
        kOpenBracket,
        kCloseBracket,
        kColon,
        kComma,
        kInteger,
        kFloat,
        kKeyword,
        kString,
    };
    struct Token {
        TokenType type;
        uint32_t offset;  // into text_
        uint32_t length;
    };
    friend class JsonParser;

    using Message = std::optional<Result<json::value>>;
    Message step(char c, bool& consumed);
    Message emit(TokenType type);
    Message stray();
    Message over_limit(std::string_view what);
    void drop_message();

    JsonLimits limits_;
    std::string input_;
    size_t at_ = 0;
    bool finished_ = false;
    Lex state_ = Lex::kStart;
    char quote_ = 0;
    std::string text_;        // token text of the message being read
    size_t token_start_ = 0;  // of the token being read
    std::vector<Token> tokens_;
    int64_t braces_ = 0;
    int64_t brackets_ = 0;
};

/// One whole value, nothing after it but white space (command line, files).
Result<json::value> parse_json(std::string_view text);

enum class JsonLayout : uint8_t { kOneLine, kPretty };

/// Appends `value` as pure ASCII: ", " and ": " between things, everything else escaped as upper-case \uXXXX; bytes
/// that are not UTF-8 become U+FFFD. kPretty: 4 spaces per level. No line end.
void write_json(std::string& out, const json::value& value, JsonLayout layout = JsonLayout::kOneLine);
std::string to_json(const json::value& value, JsonLayout layout = JsonLayout::kOneLine);

}  // namespace gantry::schema
