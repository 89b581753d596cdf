// VhostUserExport: a node as a virtio-blk device of virtual machines, over a unix socket.

#pragma once

#include <memory>
#include <string>

#include "exports/export.h"
#include "exports/vhost_user/device.h"
#include "exports/vhost_user/listen.h"
#include "exports/vhost_user/session.h"
#include "runtime/io.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::vhost_user {

struct VhostUserOptions {
    json::object address;
    virtio::BlkShape shape;  // not complete()
};

/// Main loop only. One front end at a time, any number one after another; nothing that one does ends the export.
class VhostUserExport final : public exports::Export {
  public:
    static Result<std::unique_ptr<exports::Export>> create(exports::ExportContext context);
    VhostUserExport(exports::ExportContext context, VhostUserOptions options);
    ~VhostUserExport() override;

    std::string_view type() const override { return "vhost-user-blk"; }
    /// The node may be resized: the front end is told.
    block::EdgePerms perms() const override;
    Task<Result<>> start() override;
    bool has_clients() const override { return session_ != nullptr; }
    Task<bool> let_go() override;
    Task<void> stop() override;
    void on_resize(uint64_t new_size) override;
    json::object details() const override;

  private:
    Task<void> accept_front_ends();
    Task<void> serve(UniqueFd socket);
    void turn_away(UniqueFd socket);
    void close_entrance();
    /// A line about a front end; a few in a second, whatever they do.
    bool may_warn();

    VhostUserOptions options_;
    Entrance entrance_;
    std::unique_ptr<Device> device_;
    std::unique_ptr<Session> session_;
    WaitQueue session_ended_;
    TaskScope scope_;
    CancellableIo* waiting_ = nullptr;
    Timer pause_;
    bool stopping_ = false;
    Clock::time_point warning_second_{};
    unsigned warnings_ = 0;
};

extern const exports::ExportType kVhostUserExportType;

}  // namespace gantry::vhost_user
