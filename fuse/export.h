// FuseExport: a node as one regular file.

#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "exports/export.h"
#include "fuse/classic.h"
#include "fuse/mount.h"
#include "fuse/passthrough.h"
#include "fuse/restart.h"
#include "fuse/ring.h"
#include "fuse/service.h"
#include "fuse/session.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::fuse {

/// How requests come.
enum class Transport : uint8_t { kClassic, kUring, kAuto };

struct FuseOptions {
    std::string mountpoint;
    bool growable = false;
    AllowOther allow_other = AllowOther::kAuto;
    Transport transport = Transport::kClassic;
    bool passthrough = false;
    bool honour_o_trunc = false;
    bool cached = false;
};

/// Main loop only; its queues run on the loops of the export.
class FuseExport final : public exports::Export {
  public:
    static Result<std::unique_ptr<exports::Export>> create(exports::ExportContext context);
    FuseExport(exports::ExportContext context, FuseOptions options);
    ~FuseExport() override;

    std::string_view type() const override { return "fuse"; }
    block::EdgePerms perms() const override;
    Task<Result<>> start() override;
    bool has_clients() const override { return service_ && service_->open_files() > 0; }
    Task<bool> let_go() override;
    Task<void> stop() override;
    void on_resize(uint64_t new_size) override;
    json::object details() const override;

  private:
    Task<Result<>> open_session();
    Result<> open_passthrough();
    // export_restart.cc
    /// Takes over what a process before this one has left, if that fits: mount_, agreed_, clones_ and kept_ are set
    /// then.
    Task<void> inherit();
    std::string misfit(const Legacy& legacy) const;
    /// Leaves everything with the keeper, or says in kept_reason_ why not.
    void keep();
    json::object state() const;  // any thread
    void save_state();           // the same; while there is kept_
    Task<void> keep_up_to_date();
    void size_changed(uint64_t size);
    void resizing(uint64_t size);
    bool set_image();  // whether it is another one than before
    /// Whether the end of this export is none for its clients.
    bool leaves() const;
    Result<> open_queues();
    Task<Result<>> start_queues();
    Task<void> run_queue(ClassicQueue* queue);
    Task<void> run_ring(RingQueue* queue);
    Task<void> tell_kernel(bool pages);
    Task<Result<>> resize(uint64_t size, bool grow_only);
    void queue_ended(QueueEnd end);
    /// Why requests do not come over io_uring; empty: nothing speaks against it.
    std::string against_uring() const;

    FuseOptions options_;
    std::unique_ptr<Mount> mount_;
    Negotiated agreed_;
    std::string transport_reason_;
    std::vector<UniqueFd> clones_;
    std::unique_ptr<FileService> service_;
    ClassicQueues queues_;
    std::vector<std::unique_ptr<RingQueue>> rings_;
    TaskScope scope_;                     // queues
    TaskScope notices_;                   // to the kernel
    std::optional<uint64_t> asked_size_;  // a resize that the kernel asked for is under way
    bool stopping_ = false;

    std::unique_ptr<Passthrough> passthrough_;
    std::atomic<uint64_t> size_{0};  // of the node, as the next process should find it
    static constexpr uint64_t kNoSize = ~uint64_t{0};
    std::atomic<uint64_t> coming_size_{kNoSize};  // or so: a resize is under way
    std::mutex saving_mutex_;
    mutable std::mutex image_mutex_;
    std::string image_;  // that the next process must find, too
    std::unique_ptr<KeptExport> kept_;
    std::string kept_reason_;         // why not
    std::unique_ptr<Legacy> legacy_;  // between inherit() and keep()
    TaskScope keeping_;
    Timer keeping_pause_;
};

extern const exports::ExportType kFuseExportType;

}  // namespace gantry::fuse
