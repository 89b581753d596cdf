#include "fuse/reply_error.h"

#include <cerrno>

namespace gantry::fuse {

int reply_errno(int errno_value) {
    switch (errno_value) {
        case EPERM:
        case EACCES:
        case EROFS:
        case EIO:
        case ENOMEM:
        case EINVAL:
        case ENOSPC:
        case EDQUOT:
        case EFBIG:
        case EBUSY:
        case EINTR:
        case ENXIO:
        case ETIMEDOUT:
        case EUCLEAN:
        case EOPNOTSUPP:
            return errno_value;
        case ENOSYS:
        case ENOTTY:
            return EOPNOTSUPP;
        case EOVERFLOW:
            return EFBIG;
        default:
            return EIO;
    }
}

int reply_errno(const Error& error) { return reply_errno(error.errno_value()); }

}  // namespace gantry::fuse
