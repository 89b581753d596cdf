// Session: one front end, from its connection to its end, with everything that it has told.

#pragma once

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "exports/vhost_user/connection.h"
#include "exports/vhost_user/device.h"
#include "exports/virtio/dirty_log.h"
#include "exports/virtio/inflight.h"
#include "schema/value.h"

namespace gantry::vhost_user {

/// Main loop only. Requests are handled one after another, each wholly; nothing of it waits for the front end but
/// reading the next message and sending a reply.
class Session {
  public:
    Session(Device& device, UniqueFd socket);
    ~Session();
    Session(const Session&) = delete;

    /// Serves until the connection ends, then stops every queue; the front end's memory is let go.
    Task<void> run();
    /// Ends the connection; run() ends soon.
    void cut();
    /// The front end has gone, or was sent away; what it asked for may still be at work.
    bool leaving() const { return ended_ || connection_.hung_up(); }
    const std::string& peer() const { return connection_.peer(); }
    /// What the front end did that ended the connection; empty: it has closed it.
    const std::string& violation() const { return violation_; }

    /// The device has another size: the front end is told.
    void config_changed();
    /// A queue makes no sense any more: whom the front end has named is told.
    void queue_broke(size_t index);

    /// What operators see; session_details.cc.
    json::object details() const;

  private:
    /// What a front end has said of one ring. It is running when a queue serves it.
    struct RingState {
        uint32_t size = 0;
        uint32_t base = 0;
        std::optional<uint32_t> ended_at;  // a reset has stopped it there, and nobody has said where to begin again
        std::optional<VringAddress> address;
        bool started = false;  // by SET_VRING_KICK, until GET_VRING_BASE
        bool running = false;
        bool has_run = false;  // whatever its region had noted before is answered when it is stopped
        bool enabled = false;
        UniqueFd kick;  // until it runs
        UniqueFd call, error;
    };
    struct Reply {
        std::vector<std::byte> payload;
        int fd = -1;
        bool sent = false;  // a reply of the request's own
    };
    using Answer = Result<Reply>;

    Task<Result<>> serve(Message message);
    Task<Answer> handle(Message message);
    Task<Answer> handle_reported(const RequestRule& rule, Message message);
    template <class T>
    static Reply reply(const T& value) {
        const auto bytes = bytes_of(value);
        return Reply{{bytes.begin(), bytes.end()}, -1, true};
    }
    Result<RingState*> ring(uint64_t index);
    void report_wait(std::chrono::seconds passed) const;
    void end_with(std::string violation);

    // session_features.cc: features, status, reset
    Task<Result<>> set_features(uint64_t chosen);
    Result<> set_protocol_features(uint64_t chosen);
    Task<Result<>> set_status(uint64_t status);
    uint64_t status() const;
    Task<void> reset();
    void forget_config();
    uint64_t features() const { return device_.blk().chosen_features(); }

    // session_config.cc: configuration space, back-end channel
    Reply get_config(const Message& message) const;
    Task<Result<>> set_config(Message message);
    Task<void> settle_queues();
    Result<> set_backend_channel(Message message);

    // session_memory.cc: regions
    Task<Result<>> set_memory(Message message);
    Task<Result<>> add_region(Message message);
    Task<Result<>> remove_region(Message message);
    Task<Result<>> change_memory(std::vector<virtio::Region> regions);
    std::vector<virtio::Region> regions() const;

    // session_rings.cc: from SET_VRING_NUM to GET_VRING_BASE
    Result<> set_size(VringState state);
    Result<> set_base(VringState state);
    Task<Result<>> set_address(VringAddress address);
    Task<Answer> get_base(VringState state);
    Task<Result<>> set_kick(uint64_t value, UniqueFd fd);
    Task<Result<>> set_call(uint64_t value, UniqueFd fd);
    Result<> set_error(uint64_t value, UniqueFd fd);
    Task<Result<>> set_enabled(VringState state);
    Task<void> disable_all();
    Result<virtio::RingPlace> place(const VringAddress& address, const virtio::RingShape& shape,
                                    const virtio::GuestMemory& memory) const;
    virtio::RingShape shape(const RingState& ring) const;
    Task<Result<>> start_if_ready(size_t index);
    Task<Result<>> start(size_t index);
    Task<void> stop(size_t index);
    Task<void> stop_all();
    bool any_running() const;

    // session_inflight.cc: what outlives a process, and what migration sees
    Answer get_inflight(const Message& message);
    Result<> set_inflight(Message message);
    void note_write_cache();
    void recall_write_cache();
    Task<Result<>> set_log(Message message);
    Task<void> apply_log(size_t index);
    Task<void> apply_log_to_all();
    std::shared_ptr<virtio::DirtyLog> active_log() const;
    uint64_t ring_log_address(const RingState& ring) const;

    Device& device_;
    Connection connection_;
    std::string violation_;
    bool ended_ = false;
    unsigned refusals_ = 0;
    std::string_view handling_;  // the message that is being answered

    bool features_chosen_ = false;
    bool features_refused_ = false;
    bool has_protocol_features_ = false;  // VHOST_USER_F_PROTOCOL_FEATURES was chosen: rings begin disabled
    bool log_all_ = false;
    bool config_written_ = false;
    uint64_t protocol_features_ = 0;
    uint8_t status_ = 0;
    std::vector<RingState> rings_;
    std::shared_ptr<const virtio::GuestMemory> memory_;  // null: none yet
    std::shared_ptr<virtio::InflightFile> inflight_;
    std::shared_ptr<virtio::DirtyLog> log_;
    UniqueFd backend_channel_;
};

}  // namespace gantry::vhost_user
