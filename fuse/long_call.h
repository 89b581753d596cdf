// LongCall: a call that takes many steps and may be interrupted between them.

#pragma once

#include "fuse/service.h"

namespace gantry::fuse {

/// Lives in the frame of the call. INTERRUPT finds it by the number of the request.
struct FileService::LongCall {
    LongCall(FileService& service, uint64_t unique);
    ~LongCall();
    LongCall(const LongCall&) = delete;
    bool interrupted() const {
        return interrupted_.load(std::memory_order_relaxed) || service_.hurry_.load(std::memory_order_relaxed);
    }
    /// Any thread.
    static void interrupt(FileService& service, uint64_t unique);

  private:
    FileService& service_;
    const uint64_t unique_;
    std::atomic<bool> interrupted_{false};
    LongCall* next_ = nullptr;
    LongCall** link_ = nullptr;  // who points here
};

}  // namespace gantry::fuse
