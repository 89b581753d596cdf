// Error and Result: how expected failures travel.

#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <expected>
#include <memory>
#include <string>
#include <string_view>

namespace gantry {

/// What a caller may branch on. The text is for the operator.
enum class ErrorKind : uint8_t {
    kInvalid,      // an argument or option makes no sense
    kNotFound,     // named thing does not exist
    kExists,       // name is taken
    kBusy,         // in use, try again when it is free
    kPermission,   // permission conflict, lock held, access denied
    kReadOnly,     // a write to something read-only
    kNoSpace,      // ENOSPC, EDQUOT, EFBIG
    kIo,           // the medium or the remote side failed
    kCorrupt,      // the image contradicts itself
    kUnsupported,  // cannot be done here
    kTooLarge,     // over a limit
    kNoMemory,     // an allocation asked for by input was refused
    kCancelled,    // given up on request
    kTimedOut,     // a deadline passed
    kShutdown,     // going away
};

/// The classes of the QMP protocol (spec/qmp.md section 3).
enum class QmpClass : uint8_t { kGenericError, kCommandNotFound, kDeviceNotFound, kDeviceNotActive, kKvmMissingCap };

/// A failure: kind, errno (0 if none fits), QMP class and a sentence. One pointer wide; success costs nothing.
class [[nodiscard]] Error {
  public:
    Error(ErrorKind kind, std::string message, int errno_value = 0)
        : rep_(new Rep{kind, QmpClass::kGenericError, errno_value, std::move(message)}) {}
    Error(Error&&) noexcept = default;
    Error& operator=(Error&&) noexcept = default;
    Error(const Error& other) : rep_(new Rep(*other.rep_)) {}
    Error& operator=(const Error& other) {
        if (this != &other) rep_.reset(new Rep(*other.rep_));
        return *this;
    }

    /// `what` + ": " + strerror(e), with the kind that belongs to `e` (positive errno).
    static Error from_errno(int e, std::string_view what);

    /// Prepends "context: ".
    Error&& context(std::string_view text) &&;
    Error&& with_class(QmpClass c) && {
        rep_->qmp_class = c;
        return std::move(*this);
    }

    ErrorKind kind() const { return rep_->kind; }
    /// Positive errno; when the error has none, the one that fits its kind. Never 0.
    int errno_value() const;
    QmpClass qmp_class() const { return rep_->qmp_class; }
    const std::string& message() const { return rep_->message; }

  private:
    struct Rep {
        ErrorKind kind;
        QmpClass qmp_class;
        int errno_value;
        std::string message;
    };
    std::unique_ptr<Rep> rep_;
};

template <class T = void>
using Result = std::expected<T, Error>;

/// `return fail(ErrorKind::kInvalid, "size {} is not a multiple of {}", size, unit);`
template <class... Args>
std::unexpected<Error> fail(ErrorKind kind, fmt::format_string<Args...> format, Args&&... args) {
    return std::unexpected(Error(kind, fmt::format(format, std::forward<Args>(args)...)));
}

/// The same for a failed system call: "<text>: <strerror(e)>".
template <class... Args>
std::unexpected<Error> fail_errno(int e, fmt::format_string<Args...> format, Args&&... args) {
    return std::unexpected(Error::from_errno(e, fmt::format(format, std::forward<Args>(args)...)));
}

/// strerror without its race.
std::string errno_text(int e);

}  // namespace gantry

#define GANTRY_CONCAT_(a, b) a##b
#define GANTRY_CONCAT(a, b) GANTRY_CONCAT_(a, b)

/// Plain functions: `TRY(auto x, f());` binds the value or returns the error; `CHECK_OK(f());` for Result<void>.
#define TRY_IMPL_(ret, tmp, decl, expr)              \
    auto tmp = (expr);                               \
    if (!tmp) [[unlikely]]                           \
        ret std::unexpected(std::move(tmp).error()); \
    decl = std::move(*tmp)
#define CHECK_OK_IMPL_(ret, tmp, expr)        \
    if (auto tmp = (expr); !tmp) [[unlikely]] \
    ret std::unexpected(std::move(tmp).error())

#define TRY(decl, expr) TRY_IMPL_(return, GANTRY_CONCAT(try_, __LINE__), decl, expr)
#define CHECK_OK(expr) CHECK_OK_IMPL_(return, GANTRY_CONCAT(ok_, __LINE__), expr)
/// The same in coroutines: `CO_TRY(auto x, co_await f());` and `CO_CHECK(co_await f());`.
#define CO_TRY(decl, expr) TRY_IMPL_(co_return, GANTRY_CONCAT(try_, __LINE__), decl, expr)
#define CO_CHECK(expr) CHECK_OK_IMPL_(co_return, GANTRY_CONCAT(ok_, __LINE__), expr)
