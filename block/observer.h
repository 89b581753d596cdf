// Observer: events of the block layer, implemented by qmp. Main loop only (raisers on other loops post).

#pragma once

#include <cstdint>
#include <optional>
#include <string_view>

#include "runtime/error.h"

namespace gantry::block {

class Node;
class Job;

class Observer {
  public:
    virtual ~Observer() = default;
    virtual void job_status_changed(const Job& job, std::string_view status) {}
    /// A named event that carries a job's progress (BLOCK_JOB_COMPLETED, BLOCK_JOB_READY, ...). `error` empty: none.
    virtual void job_event(const Job& job, std::string_view event, std::string_view error) {}
    /// operation: "read" or "write"; action: "report", "ignore" or "stop".
    virtual void io_error(std::string_view user, const Node& node, std::string_view operation, std::string_view action,
                          bool nospace, std::string_view reason) {}
    virtual void image_corrupted(const Node& node, std::string_view msg, std::optional<uint64_t> offset,
                                 std::optional<uint64_t> size, bool fatal) {}
};

}  // namespace gantry::block
