// The block driver "nbd": a node that is an export of an NBD server (spec/nbd.md section 14).

#pragma once

#include <atomic>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "block/driver.h"
#include "block/node.h"
#include "nbd/client/config.h"
#include "nbd/client/link.h"

namespace gantry::nbd {

/// The row for the driver table.
extern const block::Driver kNbdDriver;

namespace client {

/// Connections are dealt over the I/O loops. A request goes over one of its own loop unless that has much more to do
/// than another one, on whose loop it runs meanwhile.
class NbdNode final : public block::Node {
  public:
    NbdNode(std::string name, const block::NodeFlags& flags, std::shared_ptr<const ClientConfig> config,
            const Negotiated& first, std::vector<std::shared_ptr<Link>> links);
    ~NbdNode() override;

    Task<Result<>> do_read(block::Request& rq, uint64_t offset, IoVec iov) override;
    Task<Result<>> do_write(block::Request& rq, uint64_t offset, IoVec iov, block::WriteFlags flags) override;
    Task<Result<>> do_write_zeroes(block::Request& rq, uint64_t offset, uint64_t length,
                                   block::WriteFlags flags) override;
    Task<Result<>> do_discard(block::Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<>> do_flush(block::Request& rq) override;
    Task<Result<>> do_preload(block::Request& rq, uint64_t offset, uint64_t length) override;
    Task<Result<block::BlockStatus>> do_block_status(block::Request& rq, uint64_t offset, uint64_t length) override;

    Task<Result<size_t>> do_block_statuses(block::Request& rq, uint64_t offset, uint64_t length,
                                           std::span<block::BlockStatus> out) override;

    Task<void> quiesce() override;
    Task<void> close() override;
    void cancel_in_flight() override;
    Task<Result<>> prepare_reopen(const json::object& options, const block::NodeFlags& flags) override;
    void commit_reopen() override;
    Task<Result<>> reopened(bool committed) override;
    std::string filename() const override;
    bool is_tuning(std::string_view option) const override;
    Task<Result<block::ImageInfo>> image_info() override;

  private:
    void take_limits();
    block::BlockStatus status_of(uint64_t offset, uint64_t length, uint64_t flags) const;
    void note_change(block::WriteFlags flags);
    Link& pick(const Loop& loop) const;
    Task<Result<>> send(Operation& op);
    void ask_lost_links();

    const std::shared_ptr<const ClientConfig> config_;
    const Negotiated export_;
    const std::vector<std::shared_ptr<Link>> links_;
    std::atomic<Clock::time_point> asked_lost_{};  // when ask_lost_links() last did so
    std::atomic<bool> dirty_{false};               // changed since the last flush began
    std::atomic<bool> closing_{false};             // the graph is about to close this node
    bool reopens_writable_ = false;                // between prepare and commit
};

}  // namespace client

}  // namespace gantry::nbd
