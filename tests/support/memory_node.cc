#include "tests/support/memory_node.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include "runtime/check.h"
#include "runtime/timer.h"

namespace gantry::test {

using block::EdgePerms;
using block::NodeFlags;
using block::OpenContext;
using block::Request;
using block::WriteFlags;

namespace {

struct Disks {
    std::mutex mutex;
    std::map<std::string, std::shared_ptr<MemoryDisk>, std::less<>> by_name;
};

Disks& disks() {
    static Disks all;
    return all;
}

}  // namespace

std::shared_ptr<MemoryDisk> MemoryDisk::named(std::string_view name) {
    Disks& all = disks();
    std::lock_guard lock(all.mutex);
    auto& slot = all.by_name[std::string(name)];
    if (!slot) slot = std::make_shared<MemoryDisk>();
    return slot;
}

void MemoryDisk::forget(std::string_view name) {
    Disks& all = disks();
    std::lock_guard lock(all.mutex);
    all.by_name.erase(std::string(name));
}

MemoryDisk::MemoryDisk() : fd_(::memfd_create("gantry-test-disk", MFD_CLOEXEC)) {
    CHECK(fd_.get() >= 0 && ::ftruncate(fd_.get(), kCapacity) == 0, "memory for a test disk");
    void* mapped = ::mmap(nullptr, kCapacity, PROT_READ | PROT_WRITE, MAP_SHARED, fd_.get(), 0);
    CHECK(mapped != MAP_FAILED, "address space for a test disk");
    base_ = static_cast<uint8_t*>(mapped);
    gate_.set();
}

MemoryDisk::~MemoryDisk() { ::munmap(base_, kCapacity); }

void MemoryDisk::resize(uint64_t size) {
    CHECK(size <= kCapacity, "a test disk's size");
    std::lock_guard lock(mutex_);
    const uint64_t old = size_.load();
    if (size < old) std::memset(base_ + size, 0, old - size);
    size_ = size;
}

void MemoryDisk::read(uint64_t offset, void* to, size_t length) const {
    CHECK(offset <= kCapacity && length <= kCapacity - offset, "a read of a test disk");
    std::lock_guard lock(mutex_);
    std::memcpy(to, base_ + offset, length);
}

void MemoryDisk::write(uint64_t offset, const void* from, size_t length, bool grow) {
    CHECK(offset <= kCapacity && length <= kCapacity - offset, "a write to a test disk");
    std::lock_guard lock(mutex_);
    std::memcpy(base_ + offset, from, length);
    if (grow && offset + length > size_) size_ = offset + length;
}

void MemoryDisk::zero(uint64_t offset, uint64_t length, bool grow) {
    CHECK(offset <= kCapacity && length <= kCapacity - offset, "zeroing a test disk");
    std::lock_guard lock(mutex_);
    std::memset(base_ + offset, 0, length);
    if (grow && offset + length > size_) size_ = offset + length;
}

std::vector<uint8_t> MemoryDisk::bytes(uint64_t offset, size_t length) const {
    std::vector<uint8_t> copy(length);
    read(offset, copy.data(), length);
    return copy;
}

void MemoryDisk::set_fault(std::function<int(Op, uint64_t, uint64_t)> fault) {
    std::lock_guard lock(mutex_);
    has_fault_ = fault != nullptr;
    fault_ = std::move(fault);
}

int MemoryDisk::fault(Op op, uint64_t offset, uint64_t length) const {
    if (!has_fault_) return 0;
    std::lock_guard lock(mutex_);
    return fault_ ? fault_(op, offset, length) : 0;
}

MemoryNode::MemoryNode(const OpenContext& context, std::shared_ptr<MemoryDisk> disk)
    : Node("memory", context.node_name(), context.flags()), disk_(std::move(disk)), latency_ns_(0) {
    const schema::Options o = context.options();
    latency_ns_ = o.integer("latency-ns");
    limits_.request_alignment = static_cast<uint32_t>(o.size("request-alignment", 1));
    limits_.memory_alignment = static_cast<uint32_t>(o.size("memory-alignment", 1));
    limits_.discard_alignment = static_cast<uint32_t>(o.size("discard-alignment", 1));
    limits_.zeroes_alignment = static_cast<uint32_t>(o.size("zeroes-alignment", 1));
    limits_.max_transfer = o.size("max-transfer");
    limits_.can_grow_by_write = o.flag("growable");
    limits_.supports_fua = o.flag("fua");
    limits_.supports_zeroes = !o.flag("no-zeroes");
    set_size(disk_->size());
    const bool inline_io = !o.flag("no-inline");
    allow_fast_paths(inline_io, inline_io);
}

Task<Result<>> MemoryNode::enter(MemoryDisk::Op op, uint64_t offset, uint64_t length) {
    disk_->counts_[static_cast<size_t>(op)].fetch_add(1);
    if (!disk_->gate_.is_set()) {
        disk_->at_gate_.fetch_add(1);
        co_await disk_->gate_.wait();
        disk_->at_gate_.fetch_sub(1);
    }
    const int64_t latency = latency_ns_;
    if (latency != 0) co_await sleep_for(std::chrono::nanoseconds(latency));
    const int error = disk_->fault(op, offset, length);
    if (error != 0) co_return fail_errno(error, "memory node '{}': operation at {}", name(), offset);
    co_return Result<>();
}

int MemoryNode::enter_inline(MemoryDisk::Op op) {
    if (latency_ns_ != 0 || disk_->has_fault() || !disk_->gate_.is_set()) return -EAGAIN;
    disk_->counts_[static_cast<size_t>(op)].fetch_add(1);
    return 0;
}

Task<Result<>> MemoryNode::do_read(Request&, uint64_t offset, IoVec iov) {
    CO_CHECK(co_await enter(MemoryDisk::Op::kRead, offset, iov.bytes));
    for (uint32_t i = 0; i < iov.count; offset += iov.data[i++].iov_len)
        disk_->read(offset, iov.data[i].iov_base, iov.data[i].iov_len);
    co_return Result<>();
}

Task<Result<>> MemoryNode::do_write(Request&, uint64_t offset, IoVec iov, WriteFlags) {
    CO_CHECK(co_await enter(MemoryDisk::Op::kWrite, offset, iov.bytes));
    if (offset > MemoryDisk::kCapacity || iov.bytes > MemoryDisk::kCapacity - offset)
        co_return fail(ErrorKind::kNoSpace, "memory node '{}' is full", name());
    for (uint32_t i = 0; i < iov.count; offset += iov.data[i++].iov_len)
        disk_->write(offset, iov.data[i].iov_base, iov.data[i].iov_len, limits_.can_grow_by_write);
    co_return Result<>();
}

Task<Result<>> MemoryNode::do_write_zeroes(Request&, uint64_t offset, uint64_t length, WriteFlags) {
    if (!limits_.supports_zeroes)
        co_return fail(ErrorKind::kUnsupported, "memory node '{}' has no write-zeroes", name());
    CO_CHECK(co_await enter(MemoryDisk::Op::kZeroes, offset, length));
    if (offset > MemoryDisk::kCapacity || length > MemoryDisk::kCapacity - offset)
        co_return fail(ErrorKind::kNoSpace, "memory node '{}' is full", name());
    disk_->zero(offset, length, limits_.can_grow_by_write);
    co_return Result<>();
}

Task<Result<>> MemoryNode::do_discard(Request&, uint64_t offset, uint64_t length) {
    CO_CHECK(co_await enter(MemoryDisk::Op::kDiscard, offset, length));
    disk_->zero(offset, std::min(length, size() - std::min(offset, size())));
    co_return Result<>();
}

Task<Result<>> MemoryNode::do_flush(Request&) { return enter(MemoryDisk::Op::kFlush, 0, 0); }

int MemoryNode::do_try_read(Request&, uint64_t offset, const IoVec& iov) {
    if (int r = enter_inline(MemoryDisk::Op::kRead); r != 0) return r;
    for (uint32_t i = 0; i < iov.count; offset += iov.data[i++].iov_len)
        disk_->read(offset, iov.data[i].iov_base, iov.data[i].iov_len);
    return 0;
}

int MemoryNode::do_try_write(Request&, uint64_t offset, const IoVec& iov, WriteFlags) {
    if (int r = enter_inline(MemoryDisk::Op::kWrite); r != 0) return r;
    for (uint32_t i = 0; i < iov.count; offset += iov.data[i++].iov_len)
        disk_->write(offset, iov.data[i].iov_base, iov.data[i].iov_len, limits_.can_grow_by_write);
    return 0;
}

Task<Result<>> MemoryNode::do_resize(uint64_t new_size) {
    if (new_size > MemoryDisk::kCapacity)
        co_return fail(ErrorKind::kNoSpace, "memory node '{}' cannot grow that far", name());
    disk_->resize(new_size);
    set_size(new_size);
    co_return Result<>();
}

Task<void> MemoryNode::quiesce() {
    CHECK(!quiesced_, "quiesce() and unquiesce() alternate");
    quiesced_ = true;
    disk_->events.push_back("quiesce");
    co_return;
}

void MemoryNode::unquiesce() {
    CHECK(quiesced_, "quiesce() and unquiesce() alternate");
    quiesced_ = false;
    disk_->events.push_back("unquiesce");
}

Task<void> MemoryNode::close() {
    disk_->events.push_back("close");
    co_return;
}

Task<Result<>> MemoryNode::prepare_perms(EdgePerms) {
    disk_->events.push_back("prepare_perms");
    if (!disk_->perms_error.empty())
        co_return fail(ErrorKind::kPermission, "{}", std::exchange(disk_->perms_error, {}));
    co_return Result<>();
}
void MemoryNode::commit_perms(EdgePerms) { disk_->events.push_back("commit_perms"); }
void MemoryNode::abort_perms() { disk_->events.push_back("abort_perms"); }

Task<Result<>> MemoryNode::prepare_reopen(const json::object& options, const NodeFlags& flags) {
    CO_CHECK(co_await Node::prepare_reopen(options, flags));
    disk_->events.push_back("prepare_reopen");
    if (!disk_->reopen_error.empty()) co_return fail(ErrorKind::kInvalid, "{}", std::exchange(disk_->reopen_error, {}));
    next_latency_ns_ = schema::Options(options).integer("latency-ns");
    co_return Result<>();
}
void MemoryNode::commit_reopen() {
    disk_->events.push_back("commit_reopen");
    latency_ns_ = next_latency_ns_;
}
void MemoryNode::abort_reopen() { disk_->events.push_back("abort_reopen"); }

std::string MemoryNode::filename() const { return "memory://" + schema::Options(options()).str("disk"); }

Result<block::Node::Passthrough> MemoryNode::passthrough() { return Passthrough{.fd = disk_->fd(), .offset = 0}; }

namespace {

Task<Result<std::shared_ptr<block::Node>>> open_memory(OpenContext& context) {
    const schema::Options o = context.options();
    auto disk = o.has("disk") ? MemoryDisk::named(o.str("disk")) : std::make_shared<MemoryDisk>();
    if (o.has("size") && disk->size() == 0) disk->resize(o.size("size"));
    if (o.has("open-error")) co_return fail(ErrorKind::kIo, "{}", o.str("open-error"));
    co_return std::make_shared<MemoryNode>(context, std::move(disk));
}

constexpr std::string_view kReopenOptions[] = {"latency-ns"};

}  // namespace

constinit const block::Driver kMemoryDriver{
    .name = "memory", .open = open_memory, .reopen_options = kReopenOptions, .is_protocol = true};

}  // namespace gantry::test
