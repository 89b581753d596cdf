#include "exports/vduse/record.h"

#include <sys/stat.h>

#include <cstring>

#include "runtime/log.h"

namespace gantry::vduse {

namespace {

constexpr std::string_view kNamePrefix = "vduse-";

}  // namespace

Record::Record(exports::Keeper* keeper, const std::string& export_id, uint16_t queues, uint16_t queue_size)
    : keeper_(keeper), name_(std::string(kNamePrefix) + export_id), queues_(queues), queue_size_(queue_size) {}

Result<std::shared_ptr<virtio::InflightFile>> Record::inherit(bool packed) {
    const std::vector<int> left = keeper_ ? keeper_->look(name_) : std::vector<int>();
    if (left.empty()) return nullptr;
    const uint64_t size = virtio::InflightFile::size_of(queues_, queue_size_, packed);
    struct stat st{};
    if (left.size() != 1 || ::fstat(left.front(), &st) != 0 || !S_ISREG(st.st_mode) ||
        static_cast<uint64_t>(st.st_size) != size) {
        return fail(ErrorKind::kInvalid,
                    "'{}', what was kept of its requests in flight, is not of {} queue(s) of {} descriptors", name_,
                    queues_, queue_size_);
    }
    std::vector<UniqueFd> taken = keeper_->take(name_);
    if (taken.size() != 1) return nullptr;
    TRY(file_, virtio::InflightFile::adopt(std::move(taken.front()), 0, size, queues_, queue_size_, packed));
    inherited_ = true;
    return file_;
}

std::shared_ptr<virtio::InflightFile> Record::begin(bool packed) {
    if (file_ && file_->packed() == packed) {
        std::memset(file_->mapping()->data(), 0, file_->mapping()->size());
        return file_;
    }
    drop();
    if (!keeper_ || !keeper_->active()) {
        why_not_ = keeper_ ? keeper_->why_inactive() : "nobody keeps descriptors";
        return nullptr;
    }
    auto file = virtio::InflightFile::create(queues_, queue_size_, packed);
    if (file) {
        const int fd = (*file)->fd();
        const Result<> put = keeper_->put(name_, std::span(&fd, 1));
        if (put) {
            why_not_.clear();
            file_ = std::move(*file);
            return file_;
        }
        why_not_ = put.error().message();
    } else {
        why_not_ = file.error().message();
    }
    log::warn("'{}': requests in flight do not survive a restart: {}", name_, why_not_);
    return nullptr;
}

void Record::forget() {
    if (!file_) return drop();
    for (size_t i = 0; i < queues_; ++i) file_->forget(i);
}

void Record::drop() {
    if (keeper_) {
        keeper_->take(name_).clear();
        keeper_->drop(name_);
    }
    file_.reset();
    inherited_ = false;
}

void give_up_records(exports::Keeper& keeper, Kernel& kernel) {
    std::vector<std::string> names = keeper.waiting();
    std::erase_if(names, [](const std::string& name) { return !name.starts_with(kNamePrefix); });
    if (names.empty() || kernel.any_left()) return;
    for (const std::string& name : names) {
        log::info("'{}' of the process before this one is not wanted any more", name);
        keeper.take(name).clear();
        keeper.drop(name);
    }
}

}  // namespace gantry::vduse
