#include "nbd/wire_error.h"

#include <cerrno>

namespace gantry::nbd {

WireError wire_error(int errno_value, bool fast_zero) {
    switch (errno_value) {
        case EPERM:
        case EROFS:
        case EACCES:
            return kWirePerm;
        case EIO:
        case ETIMEDOUT:
        case ENODEV:
        case ENXIO:
        case ENOMEDIUM:
        case EREMOTEIO:
        case EILSEQ:
        case ESTALE:
        case EUCLEAN:
        case EBADMSG:
        case ENODATA:
        case ENETDOWN:
        case ENETUNREACH:
        case EHOSTUNREACH:
        case ECONNABORTED:
        case ECONNRESET:
        case ECONNREFUSED:
        case ENOTCONN:
        case EPIPE:
        case ECANCELED:
            return kWireIo;
        case ENOMEM:
            return kWireNoMem;
        case ENOSPC:
        case EDQUOT:
        case EFBIG:
            return kWireNoSpace;
        case ESHUTDOWN:
            return kWireShutdown;
        case EOPNOTSUPP:
            return fast_zero ? kWireNotSup : kWireInval;
        default:
            return kWireInval;
    }
}

WireError wire_error(const Error& error, bool fast_zero) {
    switch (error.kind()) {
        case ErrorKind::kIo:
        case ErrorKind::kCorrupt:
            return kWireIo;
        case ErrorKind::kReadOnly:
        case ErrorKind::kPermission:
            return kWirePerm;
        case ErrorKind::kNoSpace:
            return kWireNoSpace;
        case ErrorKind::kNoMemory:
            return kWireNoMem;
        case ErrorKind::kShutdown:
            return kWireShutdown;
        case ErrorKind::kUnsupported:
            return fast_zero ? kWireNotSup : kWireInval;
        default:
            return wire_error(error.errno_value(), fast_zero);
    }
}

std::string_view wire_error_text(WireError error) {
    switch (error) {
        case kWireOk:
            return "success";
        case kWirePerm:
            return "operation not permitted";
        case kWireIo:
            return "input/output error";
        case kWireNoMem:
            return "out of memory";
        case kWireInval:
            return "invalid request";
        case kWireNoSpace:
            return "no space left on the export";
        case kWireOverflow:
            return "request too large";
        case kWireNotSup:
            return "not supported as a fast operation";
        case kWireShutdown:
            return "the server is shutting down";
    }
    return "unknown error";
}

}  // namespace gantry::nbd
