#include "fuse/long_call.h"

namespace gantry::fuse {

FileService::LongCall::LongCall(FileService& service, uint64_t unique) : service_(service), unique_(unique) {
    const std::lock_guard lock(service_.long_calls_mutex_);
    next_ = service_.long_calls_;
    link_ = &service_.long_calls_;
    if (next_) next_->link_ = &next_;
    service_.long_calls_ = this;
}

FileService::LongCall::~LongCall() {
    const std::lock_guard lock(service_.long_calls_mutex_);
    *link_ = next_;
    if (next_) next_->link_ = link_;
}

void FileService::LongCall::interrupt(FileService& service, uint64_t unique) {
    const std::lock_guard lock(service.long_calls_mutex_);
    for (LongCall* call = service.long_calls_; call; call = call->next_) {
        // A resent request is the same one.
        if ((call->unique_ & ~kResent) == (unique & ~kResent)) call->interrupted_.store(true);
    }
}

}  // namespace gantry::fuse
