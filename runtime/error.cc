#include "runtime/error.h"

#include <cerrno>
#include <cstring>

namespace gantry {

namespace {

ErrorKind kind_of_errno(int e) {
    switch (e) {
        case EINVAL:
        case EDOM:
        case ENAMETOOLONG:
        case EISDIR:
        case ENOTDIR:
        case ELOOP:
            return ErrorKind::kInvalid;
        case ENOENT:
        case ENODEV:
        case ENXIO:
            return ErrorKind::kNotFound;
        case EEXIST:
            return ErrorKind::kExists;
        case EBUSY:
        case EAGAIN:
        case ETXTBSY:
        case EADDRINUSE:
            return ErrorKind::kBusy;
        case EPERM:
        case EACCES:
            return ErrorKind::kPermission;
        case EROFS:
            return ErrorKind::kReadOnly;
        case ENOSPC:
        case EDQUOT:
        case EFBIG:
            return ErrorKind::kNoSpace;
        case EUCLEAN:
            return ErrorKind::kCorrupt;
        case ENOTSUP:
        case ENOSYS:
        case ENOTTY:
        case EAFNOSUPPORT:
        case EPROTONOSUPPORT:
            return ErrorKind::kUnsupported;
        case E2BIG:
        case EOVERFLOW:
        case EMSGSIZE:
        case ERANGE:
            return ErrorKind::kTooLarge;
        case ENOMEM:
        case EMFILE:
        case ENFILE:
            return ErrorKind::kNoMemory;
        case ECANCELED:
            return ErrorKind::kCancelled;
        case ETIMEDOUT:
            return ErrorKind::kTimedOut;
        case ESHUTDOWN:
            return ErrorKind::kShutdown;
        default:
            return ErrorKind::kIo;
    }
}

int errno_of_kind(ErrorKind kind) {
    switch (kind) {
        case ErrorKind::kInvalid:
            return EINVAL;
        case ErrorKind::kNotFound:
            return ENOENT;
        case ErrorKind::kExists:
            return EEXIST;
        case ErrorKind::kBusy:
            return EBUSY;
        case ErrorKind::kPermission:
            return EPERM;
        case ErrorKind::kReadOnly:
            return EROFS;
        case ErrorKind::kNoSpace:
            return ENOSPC;
        case ErrorKind::kIo:
        case ErrorKind::kCorrupt:
            return EIO;
        case ErrorKind::kUnsupported:
            return ENOTSUP;
        case ErrorKind::kTooLarge:
            return EOVERFLOW;
        case ErrorKind::kNoMemory:
            return ENOMEM;
        case ErrorKind::kCancelled:
            return ECANCELED;
        case ErrorKind::kTimedOut:
            return ETIMEDOUT;
        case ErrorKind::kShutdown:
            return ESHUTDOWN;
    }
    return EIO;
}

}  // namespace

Error Error::from_errno(int e, std::string_view what) {
    return Error(kind_of_errno(e), fmt::format("{}: {}", what, errno_text(e)), e);
}

Error&& Error::context(std::string_view text) && {
    rep_->message = fmt::format("{}: {}", text, rep_->message);
    return std::move(*this);
}

int Error::errno_value() const { return rep_->errno_value > 0 ? rep_->errno_value : errno_of_kind(rep_->kind); }

std::string errno_text(int e) {
    const char* text = ::strerrordesc_np(e);
    return text ? std::string(text) : fmt::format("Unknown error {}", e);
}

}  // namespace gantry
