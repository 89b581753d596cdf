#include "schema/json_dialect.h"

#include <charconv>
#include <cmath>
#include <limits>

#include "schema/unicode.h"

namespace gantry::schema {

namespace {

/// Control characters, and the two bytes that UTF-8 never uses and clients send to resynchronise.
bool is_control(char c) {
    const auto byte = static_cast<unsigned char>(c);
    return byte < 0x20 || byte >= 0xfe;
}
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_lower(char c) { return c >= 'a' && c <= 'z'; }

std::unexpected<Error> parse_error(std::string_view what) {
    return fail(ErrorKind::kInvalid, "JSON parse error, {}", what);
}

/// The four hex digits at the front of `text`; negative when they are not all there.
int32_t hex4(std::string_view text) {
    if (text.size() < 4) return -1;
    int32_t value = 0;
    for (char c : text.substr(0, 4)) {
        int digit = is_digit(c)              ? c - '0'
                    : (c >= 'a' && c <= 'f') ? c - 'a' + 10
                    : (c >= 'A' && c <= 'F') ? c - 'A' + 10
                                             : -1;
        if (digit < 0) return -1;
        value = value * 16 + digit;
    }
    return value;
}

/// `\uXXXX` (and its second half, if it is a pair) at the front of `text`; advances `at` past it.
Result<uint32_t> unicode_escape(std::string_view text, size_t& at) {
    const int32_t first = hex4(text.substr(at + 2));
    size_t length = 6;
    uint32_t code = first < 0 ? 0xd800 : static_cast<uint32_t>(first);
    if (first >= 0xd800 && first < 0xdc00 && text.substr(at + 6, 2) == "\\u") {
        const int32_t second = hex4(text.substr(at + 8));
        if (second >= 0xdc00 && second < 0xe000) {
            code = 0x10000 + ((static_cast<uint32_t>(first) - 0xd800) << 10) + (static_cast<uint32_t>(second) - 0xdc00);
            length = 12;
        }
    }
    if (!is_unicode_character(code)) {
        return fail(ErrorKind::kInvalid, "JSON parse error, {} is not a valid Unicode character",
                    text.substr(at, length));
    }
    at += length;
    return code;
}

/// The contents of a string token (quotes included).
Result<json::string> unquote(std::string_view token) {
    json::string out;
    std::string_view text = token.substr(1);  // the closing quote stays: error texts may show it
    size_t at = 0;
    while (at + 1 < text.size()) {
        if (text[at] != '\\') {
            const DecodedCharacter c = decode_utf8(text.substr(at, text.size() - 1 - at));
            if (!c.valid) return parse_error("invalid UTF-8 sequence in string");
            if (c.code == 0) {
                out.push_back('\0');
            } else {
                out.append(text.substr(at, c.length));
            }
            at += c.length;
            continue;
        }
        const char escape = text[at + 1];  // exists: a lone backslash cannot end a string token
        if (escape == 'u') {
            TRY(uint32_t code, unicode_escape(text, at));
            char buffer[4];
            out.append(std::string_view(buffer, encode_utf8(code, buffer)));
            continue;
        }
        constexpr std::string_view kNames = "\"'\\/bfnrt";
        constexpr std::string_view kBytes = "\"'\\/\b\f\n\r\t";
        const size_t which = kNames.find(escape);
        if (which == kNames.npos) return parse_error("invalid escape sequence in string");
        out.push_back(kBytes[which]);
        at += 2;
    }
    return out;
}

Result<json::value> number(std::string_view text, bool integral) {
    if (integral) {
        int64_t i = 0;
        if (auto r = std::from_chars(text.data(), text.data() + text.size(), i); r.ec == std::errc())
            return json::value(i);
        uint64_t u = 0;
        if (text[0] != '-') {
            auto r = std::from_chars(text.data(), text.data() + text.size(), u);
            if (r.ec == std::errc()) return json::value(u);
        }
    }
    double d = 0;
    const auto r = std::from_chars(text.data(), text.data() + text.size(), d);
    if (r.ec == std::errc::result_out_of_range) d = std::strtod(std::string(text).c_str(), nullptr);  // 0 or infinity
    if (!std::isfinite(d)) {
        return fail(ErrorKind::kInvalid, "JSON parse error, number '{}' is out of range; the largest is {}",
                    text.substr(0, 40), std::numeric_limits<double>::max());
    }
    return json::value(d);
}

}  // namespace

/// Recursive descent over the tokens of one message. Depth is bounded by JsonLimits::nesting.
class JsonParser {
  public:
    explicit JsonParser(const JsonReader& reader) : tokens_(reader.tokens_), text_(reader.text_) {}

    Result<json::value> value() {
        if (at_ == tokens_.size()) return parse_error("premature EOI");
        const Token token = tokens_[at_++];
        const std::string_view text = text_of(token);
        switch (token.type) {
            case Type::kOpenBrace:
                return object();
            case Type::kOpenBracket:
                return array();
            case Type::kString: {
                TRY(json::string string, unquote(text));
                return json::value(std::move(string));
            }
            case Type::kInteger:
            case Type::kFloat:
                return number(text, token.type == Type::kInteger);
            case Type::kKeyword:
                if (text == "true") return json::value(true);
                if (text == "false") return json::value(false);
                if (text == "null") return json::value(nullptr);
                return fail(ErrorKind::kInvalid, "JSON parse error, invalid keyword '{}'", text);
            default:
                return parse_error("expecting value");
        }
    }

  private:
    using Token = JsonReader::Token;
    using Type = JsonReader::TokenType;

    std::string_view text_of(const Token& token) const {
        return std::string_view(text_).substr(token.offset, token.length);
    }
    bool skip(Type type) {
        if (at_ == tokens_.size() || tokens_[at_].type != type) return false;
        at_++;
        return true;
    }
    std::unexpected<Error> expected(std::string_view what) const {
        return parse_error(at_ == tokens_.size() ? "premature EOI" : what);
    }

    Result<json::value> object() {
        json::object out;
        if (skip(Type::kCloseBrace)) return json::value(std::move(out));
        for (;;) {
            TRY(json::value key, value());
            if (!key.is_string()) return parse_error("key is not a string in object");
            if (!skip(Type::kColon)) return expected("missing : in object pair");
            TRY(json::value member, value());
            if (!out.emplace(key.get_string(), std::move(member)).second) return parse_error("duplicate key");
            if (skip(Type::kCloseBrace)) return json::value(std::move(out));
            if (!skip(Type::kComma)) return expected("expected separator in dict");
        }
    }

    Result<json::value> array() {
        json::array out;
        if (skip(Type::kCloseBracket)) return json::value(std::move(out));
        for (;;) {
            TRY(json::value element, value());
            out.push_back(std::move(element));
            if (skip(Type::kCloseBracket)) return json::value(std::move(out));
            if (!skip(Type::kComma)) return expected("expected separator in list");
        }
    }

    const std::vector<Token>& tokens_;
    const std::string& text_;
    size_t at_ = 0;
};

void JsonReader::feed(std::string_view bytes) {
    if (at_ > 0) {
        input_.erase(0, at_);
        at_ = 0;
    }
    input_.append(bytes);
}

void JsonReader::finish() { finished_ = true; }

void JsonReader::reset() { *this = JsonReader(limits_); }

void JsonReader::drop_message() {
    tokens_.clear();
    text_.clear();
    if (text_.capacity() > size_t{1} << 20) text_.shrink_to_fit();
    if (tokens_.capacity() > size_t{1} << 16) tokens_.shrink_to_fit();
    token_start_ = 0;
    braces_ = brackets_ = 0;
}

std::optional<Result<json::value>> JsonReader::next() {
    while (at_ < input_.size()) {
        const char c = input_[at_];
        bool consumed = true;
        Message message = step(c, consumed);
        if (consumed) at_++;
        if (message) return message;
    }
    if (!finished_) return std::nullopt;

    // A number or keyword ends with the input; anything else half read is an error.
    const Lex state = std::exchange(state_, Lex::kStart);
    Message message;
    switch (state) {
        case Lex::kStart:
        case Lex::kRecover:
            break;
        case Lex::kKeyword:
            message = emit(TokenType::kKeyword);
            break;
        case Lex::kZero:
        case Lex::kDigits:
            message = emit(TokenType::kInteger);
            break;
        case Lex::kFraction:
        case Lex::kExponentDigits:
            message = emit(TokenType::kFloat);
            break;
        default:
            message = stray();
    }
    if (message || tokens_.empty()) return message;
    message = JsonParser(*this).value();
    drop_message();
    return message;
}

/// One character. A token that only ends with the next character leaves it unconsumed.
std::optional<Result<json::value>> JsonReader::step(char c, bool& consumed) {
    const auto to = [&](Lex state) -> Message {
        if (text_.size() >= limits_.token_bytes) return over_limit("token size");
        text_.push_back(c);
        state_ = state;
        return {};
    };
    const auto bad = [&]() -> Message {
        text_.push_back(c);
        return stray();
    };
    const auto end = [&](TokenType type) -> Message {
        consumed = false;
        state_ = Lex::kStart;
        return emit(type);
    };
    const auto punctuation = [&](TokenType type) -> Message {
        text_.push_back(c);
        state_ = Lex::kStart;
        return emit(type);
    };

    switch (state_) {
        case Lex::kRecover:
            switch (c) {
                case '\n':
                case '\r':
                    state_ = Lex::kStart;
                    return {};
                case '{':
                case '}':
                case '[':
                case ']':
                case ',':
                case ':':
                    break;  // read as at the start
                default:
                    return is_control(c) && c != '\t' ? bad() : Message();
            }
            [[fallthrough]];
        case Lex::kStart:
            switch (c) {
                case ' ':
                case '\t':
                case '\n':
                case '\r':
                    return {};
                case '{':
                    return punctuation(TokenType::kOpenBrace);
                case '}':
                    return punctuation(TokenType::kCloseBrace);
                case '[':
                    return punctuation(TokenType::kOpenBracket);
                case ']':
                    return punctuation(TokenType::kCloseBracket);
                case ',':
                    return punctuation(TokenType::kComma);
                case ':':
                    return punctuation(TokenType::kColon);
                case '"':
                case '\'':
                    quote_ = c;
                    return to(Lex::kString);
                case '-':
                    return to(Lex::kMinus);
                case '0':
                    return to(Lex::kZero);
                default:
                    if (is_digit(c)) return to(Lex::kDigits);
                    return is_lower(c) ? to(Lex::kKeyword) : bad();
            }
        case Lex::kKeyword:
            return is_lower(c) ? to(Lex::kKeyword) : end(TokenType::kKeyword);
        case Lex::kString:
            if (is_control(c)) return bad();
            if (c != quote_) return to(c == '\\' ? Lex::kEscape : Lex::kString);
            if (auto over = to(Lex::kStart)) return over;
            return emit(TokenType::kString);
        case Lex::kEscape:
            return is_control(c) ? bad() : to(Lex::kString);
        case Lex::kMinus:
            return c == '0' ? to(Lex::kZero) : is_digit(c) ? to(Lex::kDigits) : bad();
        case Lex::kZero:
            if (is_digit(c)) return bad();
            [[fallthrough]];
        case Lex::kDigits:
            if (c == '.') return to(Lex::kPoint);
            if (c == 'e' || c == 'E') return to(Lex::kExponent);
            return is_digit(c) ? to(Lex::kDigits) : end(TokenType::kInteger);
        case Lex::kPoint:
            return is_digit(c) ? to(Lex::kFraction) : bad();
        case Lex::kFraction:
            if (c == 'e' || c == 'E') return to(Lex::kExponent);
            return is_digit(c) ? to(Lex::kFraction) : end(TokenType::kFloat);
        case Lex::kExponent:
            if (c == '+' || c == '-') return to(Lex::kExponentSign);
            [[fallthrough]];
        case Lex::kExponentSign:
            return is_digit(c) ? to(Lex::kExponentDigits) : bad();
        case Lex::kExponentDigits:
            return is_digit(c) ? to(Lex::kExponentDigits) : end(TokenType::kFloat);
    }
    return {};
}

/// A token is complete. When it completes a message, that is parsed; brackets and braces are counted apart, so one
/// closed by the other is found by the parser once both counts are back at zero, or at once when one goes below.
std::optional<Result<json::value>> JsonReader::emit(TokenType type) {
    switch (type) {
        case TokenType::kOpenBrace:
            braces_++;
            break;
        case TokenType::kCloseBrace:
            braces_--;
            break;
        case TokenType::kOpenBracket:
            brackets_++;
            break;
        case TokenType::kCloseBracket:
            brackets_--;
            break;
        default:
            break;
    }
    if (tokens_.size() >= limits_.tokens) return over_limit("token count");
    if (braces_ + brackets_ > static_cast<int64_t>(limits_.nesting)) return over_limit("nesting depth");
    tokens_.push_back({type, static_cast<uint32_t>(token_start_), static_cast<uint32_t>(text_.size() - token_start_)});
    token_start_ = text_.size();
    if (braces_ >= 0 && brackets_ >= 0 && braces_ + brackets_ > 0) return std::nullopt;
    Message message = JsonParser(*this).value();
    drop_message();
    return message;
}

std::optional<Result<json::value>> JsonReader::stray() {
    // The text ends at a NUL, as it does in the reference.
    std::string_view text = std::string_view(text_).substr(token_start_);
    text = text.substr(0, text.find('\0'));
    constexpr size_t kShown = 1024;
    Message message = text.size() <= kShown
                          ? fail(ErrorKind::kInvalid, "JSON parse error, stray '{}'", text)
                          : fail(ErrorKind::kInvalid, "JSON parse error, stray '{}...'", text.substr(0, kShown));
    drop_message();
    state_ = Lex::kRecover;
    return message;
}

std::optional<Result<json::value>> JsonReader::over_limit(std::string_view what) {
    Message message = fail(ErrorKind::kTooLarge, "JSON {} limit exceeded", what);
    const bool in_token = state_ != Lex::kStart;
    drop_message();
    if (in_token) state_ = Lex::kRecover;
    return message;
}

Result<json::value> parse_json(std::string_view text) {
    JsonReader reader;
    reader.feed(text);
    reader.finish();
    auto first = reader.next();
    if (!first) return parse_error("expecting value");
    if (!*first) return std::move(*first);
    if (reader.next()) return fail(ErrorKind::kInvalid, "Expecting at most one JSON value");
    return std::move(*first);
}

}  // namespace gantry::schema
