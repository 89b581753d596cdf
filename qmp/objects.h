// Objects: what object-add makes. Today iothreads.

#pragma once

#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "exports/export.h"
#include "runtime/error.h"
#include "runtime/runtime.h"
#include "schema/value.h"

namespace gantry::qmp {

/// Main loop only.
class Objects {
  public:
    Objects(Runtime& runtime, exports::Registry& exports) : runtime_(runtime), exports_(exports) {}
    ~Objects() { clear(); }

    /// object-add with validated options (qom-type, id, properties).
    Result<> add(const json::object& options);
    /// object-del: `object 'X' not found`, `object 'X' is in use, can not be deleted`.
    Result<> remove(std::string_view id);
    /// Stops every iothread; no export is left.
    void clear();

    struct IoThread {
        Loop* loop = nullptr;
        int64_t poll_max_ns = 32768, poll_grow = 0, poll_shrink = 0, aio_max_batch = 0;
    };
    const std::map<std::string, IoThread, std::less<>>& iothreads() const { return iothreads_; }

  private:
    Runtime& runtime_;
    exports::Registry& exports_;
    std::map<std::string, IoThread, std::less<>> iothreads_;
};

}  // namespace gantry::qmp
