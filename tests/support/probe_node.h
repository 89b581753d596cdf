// ProbeNode: a node outside any graph that records what the request layer asks of it. Header only.

#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "block/align.h"
#include "block/node.h"
#include "runtime/sync.h"

namespace gantry::test {

/// Calls are logged as "R 0+512", "W 512+512 fua", "Z 0+4096 unmap", "D 0+4096", "F". Any loop.
class ProbeNode : public block::Node {
  public:
    explicit ProbeNode(uint64_t size, block::NodeFlags flags = {}, block::Limits limits = {})
        : Node("probe", "probe", flags), bytes_(size + (1 << 20)) {
        set_size(size);
        set_read_only(flags.read_only);
        limits_ = limits;
        gate_.set();
    }

    Task<Result<>> do_read(block::Request&, uint64_t offset, IoVec iov) override {
        CO_CHECK(co_await enter("R", offset, iov.bytes, ""));
        CO_CHECK(shape(offset, iov));
        std::lock_guard lock(mutex_);
        copy_to_iovec(iov, 0, bytes_.data() + offset, iov.bytes);
        co_return Result<>();
    }
    Task<Result<>> do_write(block::Request&, uint64_t offset, IoVec iov, block::WriteFlags flags) override {
        CO_CHECK(co_await enter("W", offset, iov.bytes, flag_text(flags)));
        CO_CHECK(shape(offset, iov));
        std::lock_guard lock(mutex_);
        copy_from_iovec(iov, 0, bytes_.data() + offset, iov.bytes);
        co_return Result<>();
    }
    Task<Result<>> do_write_zeroes(block::Request&, uint64_t offset, uint64_t length,
                                   block::WriteFlags flags) override {
        CO_CHECK(co_await enter("Z", offset, length, flag_text(flags)));
        std::lock_guard lock(mutex_);
        std::memset(bytes_.data() + offset, 0, length);
        co_return Result<>();
    }
    Task<Result<>> do_discard(block::Request&, uint64_t offset, uint64_t length) override {
        return enter("D", offset, length, "");
    }
    Task<Result<>> do_flush(block::Request&) override { return enter("F", 0, 0, ""); }
    Task<Result<>> do_preload(block::Request&, uint64_t offset, uint64_t length) override {
        return enter("P", offset, length, "");
    }
    int do_try_read(block::Request&, uint64_t offset, const IoVec& iov) override {
        std::lock_guard lock(mutex_);
        copy_to_iovec(iov, 0, bytes_.data() + offset, iov.bytes);
        return 0;
    }
    int do_try_write(block::Request&, uint64_t offset, const IoVec& iov, block::WriteFlags) override {
        std::lock_guard lock(mutex_);
        copy_from_iovec(iov, 0, bytes_.data() + offset, iov.bytes);
        return 0;
    }

    /// The calls since the last asking, joined with ", ".
    std::string log() {
        std::lock_guard lock(mutex_);
        return std::exchange(log_, {});
    }
    uint8_t* bytes() { return bytes_.data(); }
    size_t capacity() const { return bytes_.size(); }
    AsyncEvent& gate() { return gate_; }
    int at_gate() const { return at_gate_.load(); }
    void allow(bool read, bool write) { allow_fast_paths(read, write); }

    /// Asked at every call ("R", "W", ...): an error fails it.
    std::function<Result<>(std::string_view verb, uint64_t offset, uint64_t length)> fault;

  private:
    static std::string flag_text(block::WriteFlags flags) {
        std::string text;
        if (has(flags, block::WriteFlags::kFua)) text += " fua";
        if (has(flags, block::WriteFlags::kMayUnmap)) text += " unmap";
        if (has(flags, block::WriteFlags::kNoFallback)) text += " fast";
        if (has(flags, block::WriteFlags::kSerialising)) text += " serialising";
        return text;
    }
    Task<Result<>> enter(std::string verb, uint64_t offset, uint64_t length, std::string flags) {
        {
            std::lock_guard lock(mutex_);
            if (!log_.empty()) log_ += ", ";
            log_ += verb == "F" ? verb : verb + " " + std::to_string(offset) + "+" + std::to_string(length) + flags;
        }
        if (!gate_.is_set()) {
            at_gate_++;
            co_await gate_.wait();
            at_gate_--;
        }
        if (fault) co_return fault(verb, offset, length);
        co_return Result<>();
    }
    /// A driver trusts what the request layer promises; here a broken promise fails the request.
    Result<> shape(uint64_t offset, const IoVec& iov) const {
        const block::Limits& l = limits_;
        const bool good = ((offset | iov.bytes) & (std::max(l.request_alignment, 1u) - 1)) == 0 &&
                          (l.memory_alignment <= 1 || block::memory_aligned(iov, l.memory_alignment)) &&
                          iov.count <= l.max_iov && (!l.max_transfer || iov.bytes <= l.max_transfer) &&
                          offset + iov.bytes <= bytes_.size();
        if (!good)
            return fail(ErrorKind::kInvalid, "a driver got {} bytes at {} against its limits", iov.bytes, offset);
        return {};
    }

    std::vector<uint8_t> bytes_;
    std::mutex mutex_;
    std::string log_;
    AsyncEvent gate_;
    std::atomic<int> at_gate_{0};
};

}  // namespace gantry::test
