// Events: what the block layer reports, as QMP events to every monitor (spec/qmp.md section 7).

#pragma once

#include "block/observer.h"
#include "schema/value.h"

namespace gantry::qmp {

class Monitors;

/// Main loop only.
class Events : public block::Observer {
  public:
    explicit Events(Monitors& monitors) : monitors_(monitors) {}

    void job_status_changed(const block::Job& job, std::string_view status) override;
    void job_event(const block::Job& job, std::string_view event, std::string_view error) override;
    void io_error(std::string_view user, const block::Node& node, std::string_view operation, std::string_view action,
                  bool nospace, std::string_view reason) override;
    void image_corrupted(const block::Node& node, std::string_view msg, std::optional<uint64_t> offset,
                         std::optional<uint64_t> size, bool fatal) override;
    void export_deleted(std::string_view id);

  private:
    /// Adds the wall-clock time and sends. `data` empty: the event has no members.
    void emit(std::string_view event, json::object data);
    Monitors& monitors_;
};

}  // namespace gantry::qmp
