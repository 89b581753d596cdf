// CreateTarget: a node while an image is made of it.

#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "block/graph.h"
#include "block/image_operations.h"

namespace gantry::block {

/// Main loop. Between open() and close() nobody else writes to the node; its requests take part in drains. Takes the
/// graph's lock in open(), empty(), grow() and close().
class CreateTarget {
  public:
    explicit CreateTarget(Graph& graph) : graph_(graph) {}
    /// close() was awaited if open() succeeded.
    ~CreateTarget();
    CreateTarget(const CreateTarget&) = delete;

    /// A node's name, or a definition that lives as long as this. `user` for refusals of others: "job 'j'".
    Task<Result<>> open(json::value reference, std::string user);
    bool is_open() const { return root_ != nullptr; }
    Task<void> close();

    Node& node() const { return root_->node(); }
    uint64_t size() const { return root_->node().size(); }

    /// The node holds nothing but zeroes and is `bytes` long, or longer where it cannot be resized (a device): there
    /// everything below `zeroes` is zeroed, the rest is as it was. kNoSpace: too short and cannot grow.
    Task<Result<>> empty(uint64_t bytes, uint64_t zeroes);
    /// At least `bytes` long; what is added reads as zeroes.
    Task<Result<>> grow(uint64_t bytes);
    /// Every byte read as zero after empty().
    bool all_zero() const { return all_zero_; }

    Task<Result<>> write(uint64_t offset, std::span<const uint8_t> from, std::string_view what);
    Task<Result<>> write_zeroes(uint64_t offset, uint64_t bytes, WriteFlags flags, std::string_view what);
    Task<Result<>> flush();

    /// Takes space for [offset, +bytes), which reads as zeroes already: kFalloc reserves it, kFull writes it; the
    /// others do nothing. Tells `progress` (done bytes of all); kCancelled when that says so.
    Task<Result<>> preallocate(uint64_t offset, uint64_t bytes, Preallocation mode, Progress progress);

  private:
    Task<Result<>> reserve(uint64_t offset, uint64_t bytes);

    Graph& graph_;
    std::unique_ptr<Root> root_;
    Channel* channel_ = nullptr;
    bool all_zero_ = false;
};

}  // namespace gantry::block
