#include "tests/support/power_cut.h"

#include <algorithm>
#include <cstring>
#include <map>

#include "runtime/check.h"
#include "runtime/timer.h"

namespace gantry::test {

namespace {

constexpr uint64_t kMaxBytes = uint64_t{256} << 20;

struct Published {
    std::mutex mutex;
    std::map<std::string, std::shared_ptr<JournalDisk>, std::less<>> by_name;
};
Published& published() {
    static Published all;
    return all;
}

}  // namespace

void JournalDisk::publish(std::string name, std::shared_ptr<JournalDisk> disk) {
    std::lock_guard lock(published().mutex);
    published().by_name[std::move(name)] = std::move(disk);
}
void JournalDisk::forget(std::string_view name) {
    std::lock_guard lock(published().mutex);
    if (auto it = published().by_name.find(name); it != published().by_name.end()) published().by_name.erase(it);
}
std::shared_ptr<JournalDisk> JournalDisk::named(std::string_view name) {
    std::lock_guard lock(published().mutex);
    auto it = published().by_name.find(name);
    return it == published().by_name.end() ? nullptr : it->second;
}

JournalDisk::JournalDisk(StampClock& clock, std::vector<uint8_t> contents)
    : clock_(clock), initial_(std::move(contents)), now_(initial_) {}

std::vector<uint8_t> JournalDisk::contents() const {
    std::lock_guard lock(mutex_);
    return now_;
}
uint64_t JournalDisk::size() const {
    std::lock_guard lock(mutex_);
    return now_.size();
}
void JournalDisk::read(uint64_t offset, void* to, size_t length) const {
    std::lock_guard lock(mutex_);
    std::memset(to, 0, length);
    if (offset < now_.size()) std::memcpy(to, now_.data() + offset, std::min<uint64_t>(length, now_.size() - offset));
}

void JournalDisk::apply(std::vector<uint8_t>& disk, const Op& op, const std::vector<bool>* sectors) {
    switch (op.kind) {
        case Op::Kind::kFlush:
            return;
        case Op::Kind::kTruncate:
            if (!sectors || (*sectors)[0]) disk.resize(op.length);
            return;
        case Op::Kind::kWrite:
        case Op::Kind::kZero:
            break;
    }
    const uint64_t end = op.offset + op.length;
    const uint64_t first = op.offset / kSector;
    for (uint64_t at = op.offset; at < end;) {
        const uint64_t next = std::min(end, (at / kSector + 1) * kSector);
        if (!sectors || (*sectors)[at / kSector - first]) {
            if (disk.size() < next) disk.resize(next);
            if (op.kind == Op::Kind::kZero) {
                std::memset(disk.data() + at, 0, next - at);
            } else {
                std::memcpy(disk.data() + at, op.bytes.data() + (at - op.offset), next - at);
            }
        }
        at = next;
    }
}

void JournalDisk::write(Stamp begun, uint64_t offset, std::vector<uint8_t> bytes) {
    CHECK(offset + bytes.size() <= kMaxBytes, "a write to a journal disk");
    std::lock_guard lock(mutex_);
    const uint64_t length = bytes.size();
    ops_.push_back({Op::Kind::kWrite, begun, clock_.next(), offset, length, std::move(bytes)});
    apply(now_, ops_.back(), nullptr);
}
void JournalDisk::zero(Stamp begun, uint64_t offset, uint64_t length, bool grow) {
    std::lock_guard lock(mutex_);
    if (!grow) length = offset >= now_.size() ? 0 : std::min<uint64_t>(length, now_.size() - offset);
    CHECK(offset + length <= kMaxBytes, "zeroing a journal disk");
    ops_.push_back({Op::Kind::kZero, begun, clock_.next(), offset, length, {}});
    apply(now_, ops_.back(), nullptr);
}
void JournalDisk::truncate(Stamp begun, uint64_t size) {
    CHECK(size <= kMaxBytes, "the size of a journal disk");
    std::lock_guard lock(mutex_);
    ops_.push_back({Op::Kind::kTruncate, begun, clock_.next(), 0, size, {}});
    apply(now_, ops_.back(), nullptr);
}
void JournalDisk::flushed(Stamp begun) {
    std::lock_guard lock(mutex_);
    ops_.push_back({Op::Kind::kFlush, begun, clock_.next(), 0, 0, {}});
}

std::vector<uint8_t> JournalDisk::after_cut(Stamp t, Loss loss, std::mt19937_64& random) const {
    std::lock_guard lock(mutex_);
    Stamp stable_until = 0;  // what ended before it is stable
    for (const Op& op : ops_) {
        if (op.kind == Op::Kind::kFlush && op.ended <= t) stable_until = std::max(stable_until, op.begun);
    }
    std::vector<uint8_t> disk = initial_;
    for (const Op& op : ops_) {
        if (op.begun > t || op.kind == Op::Kind::kFlush) continue;
        if (op.ended < stable_until || (loss == Loss::kNothing && op.ended <= t)) {
            apply(disk, op, nullptr);
            continue;
        }
        if (loss == Loss::kAll) continue;
        const uint64_t sectors = op.kind == Op::Kind::kTruncate || op.length == 0
                                     ? 1
                                     : (op.offset + op.length - 1) / kSector - op.offset / kSector + 1;
        std::vector<bool> there(sectors, (random() & 1) != 0);
        if (loss == Loss::kTorn && (random() & 3) != 0) {
            for (size_t i = 0; i < sectors; i++) there[i] = (random() & 1) != 0;
        }
        apply(disk, op, &there);
    }
    return disk;
}

std::vector<Stamp> JournalDisk::moments() const {
    std::lock_guard lock(mutex_);
    std::vector<Stamp> all;
    for (const Op& op : ops_) all.push_back(op.ended);
    return all;
}
size_t JournalDisk::operations() const {
    std::lock_guard lock(mutex_);
    return ops_.size();
}
size_t JournalDisk::flushes() const {
    std::lock_guard lock(mutex_);
    return static_cast<size_t>(std::ranges::count(ops_, Op::Kind::kFlush, &Op::kind));
}

namespace {

using block::Request;
using block::WriteFlags;

class JournalNode final : public block::Node {
  public:
    JournalNode(const block::OpenContext& context, std::shared_ptr<JournalDisk> disk)
        : Node("journal", context.node_name(), context.flags()), disk_(std::move(disk)) {
        limits_.can_grow_by_write = true;
        limits_.supports_zeroes = true;
        set_size(disk_->size());
    }

    Task<Result<>> do_read(Request&, uint64_t offset, IoVec iov) override {
        co_await yield_turn();
        for (uint32_t i = 0; i < iov.count; offset += iov.data[i++].iov_len)
            disk_->read(offset, iov.data[i].iov_base, iov.data[i].iov_len);
        co_return Result<>();
    }
    Task<Result<>> do_write(Request&, uint64_t offset, IoVec iov, WriteFlags) override {
        const Stamp begun = disk_->clock().next();
        std::vector<uint8_t> bytes(iov.bytes);
        copy_from_iovec(iov, 0, bytes.data(), iov.bytes);
        co_await yield_turn();
        disk_->write(begun, offset, std::move(bytes));
        co_return Result<>();
    }
    Task<Result<>> do_write_zeroes(Request&, uint64_t offset, uint64_t length, WriteFlags) override {
        const Stamp begun = disk_->clock().next();
        co_await yield_turn();
        disk_->zero(begun, offset, length, true);
        co_return Result<>();
    }
    Task<Result<>> do_discard(Request&, uint64_t offset, uint64_t length) override {
        const Stamp begun = disk_->clock().next();
        co_await yield_turn();
        disk_->zero(begun, offset, length, false);
        co_return Result<>();
    }
    Task<Result<>> do_flush(Request&) override {
        const Stamp begun = disk_->clock().next();
        co_await yield_turn();
        disk_->flushed(begun);
        co_return Result<>();
    }
    Task<Result<>> do_resize(uint64_t new_size) override {
        const Stamp begun = disk_->clock().next();
        co_await yield_turn();
        disk_->truncate(begun, new_size);
        set_size(new_size);
        co_return Result<>();
    }

  private:
    std::shared_ptr<JournalDisk> disk_;
};

Task<Result<std::shared_ptr<block::Node>>> open_journal(block::OpenContext& context) {
    const std::string name = context.options().str("disk");
    auto disk = JournalDisk::named(name);
    if (!disk) co_return fail(ErrorKind::kNotFound, "there is no journal disk '{}'", name);
    co_return std::make_shared<JournalNode>(context, std::move(disk));
}

}  // namespace

constinit const block::Driver kJournalDriver{.name = "journal", .open = open_journal, .is_protocol = true};

}  // namespace gantry::test
