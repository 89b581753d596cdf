// VduseExport: a node as a disk on the kernel's vDPA bus.

#pragma once

#include <memory>
#include <optional>
#include <string>

#include "exports/export.h"
#include "exports/vduse/device.h"
#include "exports/vduse/queues.h"
#include "exports/vduse/record.h"
#include "exports/vduse/refusal.h"
#include "runtime/io.h"
#include "runtime/task_scope.h"
#include "runtime/timer.h"

namespace gantry::vduse {

/// Bits of the device status (VIRTIO 1.2, section 2.1).
inline constexpr uint8_t kDriverOk = 4, kFeaturesOk = 8;

struct VduseOptions {
    std::string name;
    virtio::BlkShape shape;  // not complete()
};

/// Main loop only; its queues run on the loops of the export.
///
/// The kernel waits for the answer to each message, and gives the device up for good when it waits too long. So what a
/// message asks for is done in the background, and waited for no longer than three quarters of that time:
/// * A reset is answered when no request is left. From a quarter of the time on, requests that wait for a server
///   elsewhere are cancelled, again and again. What is left at the end (local storage that hangs) could still write to
///   memory that the driver has for other things by then: the answer is a failure, which newer kernels overrule, and
///   DRIVER_OK is refused until those requests have ended.
/// * A change of memory is answered when nothing uses the old mappings, else with a failure: the kernel then keeps the
///   driver from its new memory, and the queues break when they are used.
class VduseExport final : public exports::Export {
  public:
    static Result<std::unique_ptr<exports::Export>> create(exports::ExportContext context);
    /// The same over another kernel (tests).
    static Result<std::unique_ptr<exports::Export>> create_over(Kernel& kernel, exports::ExportContext context);
    VduseExport(Kernel& kernel, exports::ExportContext context, VduseOptions options);
    ~VduseExport() override;

    std::string_view type() const override { return "vduse-blk"; }
    Task<Result<>> start() override;
    /// let_go() tells, and stop() cancels requests by itself: not while an attached device is waited for, since others
    /// use the node.
    bool has_clients() const override { return false; }
    Task<bool> let_go() override;
    Task<void> stop() override;
    void on_resize(uint64_t new_size) override;
    json::object details() const override;

  private:
    uint64_t offered() const;
    Task<Result<>> go_on(DeviceShape described);
    Task<void> remove_device();
    /// Whether the end of this export leaves the device to a process after this one.
    bool leaves() const;
    std::string user() const;

    // messages.cc
    Task<void> serve_messages();
    Task<void> end_messages();
    Task<void> handle(vduse_dev_request message);
    Task<bool> set_status(uint8_t status);
    Task<bool> driver_ok();
    Task<bool> reset();
    Task<bool> queue_state(uint32_t index, vduse_dev_response* response);
    Task<bool> update_memory();
    Task<bool> finished_in_time(bool cancel);
    void begin(Task<void> work);
    Task<void> in_background(Task<void> work);
    Task<void> start_queues(Begin how);
    Task<void> stop_queues();
    Task<void> find_position(uint32_t index);
    Result<uint64_t> chosen_features() const;
    Task<void> stop_refusing();

    Kernel& kernel_;
    const VduseOptions options_;
    std::unique_ptr<virtio::BlkDevice> blk_;
    std::unique_ptr<virtio::BlkService> service_;
    std::unique_ptr<Device> device_;
    std::unique_ptr<Record> record_;
    std::unique_ptr<Queues> queues_;
    std::unique_ptr<Refusal> refusal_;  // while it is removed and attached
    Positions positions_;               // of queues that do not run because it is being removed
    uint8_t status_ = 0;                // as the driver has set it last
    bool broken_ = false;               // the kernel has given it up
    bool removing_ = false;
    bool begun_anew_ = false;  // no driver's start of before this process can be under way
    bool messages_end_ = false;
    CancellableIo* polling_ = nullptr;

    bool busy_ = false;  // begin() is at work
    Result<> outcome_;
    uint32_t position_ = 0;
    Clock::time_point arrived_;  // the message that is being answered
    Timer patience_;
    Timer retry_;
    TaskScope scope_;    // serve_messages()
    TaskScope workers_;  // begin()
};

extern const exports::ExportType kVduseExportType;

}  // namespace gantry::vduse
