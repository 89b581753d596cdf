// FuseExport: what it leaves to the process after this one, and what it takes from the one before.

#include <poll.h>
#include <sys/stat.h>

#include "fuse/export.h"
#include "fuse/saved.h"
#include "runtime/log.h"
#include "runtime/own_mounts.h"

namespace gantry::fuse {

namespace {

constexpr auto kPause = std::chrono::seconds(1);

/// What makes these bytes those of one image, for as long as this machine runs: the formats, the part that is shown,
/// and the file. Filters, whether a command line names them or a job puts them there, show the same bytes.
std::string image_of(block::Node& root) {
    std::string text;
    block::Node* node = &root;
    while (!node->children().empty()) {
        const block::Child* file = nullptr;
        for (const auto& child : node->children()) {
            if (child->role == block::ChildRole::kFile || child->role == block::ChildRole::kFiltered)
                file = child.get();
        }
        if (!file) return text + node->filename();
        if (file->role == block::ChildRole::kFile) text += fmt::format("{}:", node->driver());
        for (const std::string_view part : {"offset", "snapshot"}) {
            const json::value* value = node->options().if_contains(part);
            if (value) text += fmt::format("{} {}:", part, boost::json::serialize(*value));
        }
        node = file->node.get();
    }
    const auto file = node->passthrough();
    struct stat st{};
    if (!file || ::fstat(file->fd, &st) != 0) return text + node->filename();
    if (S_ISBLK(st.st_mode)) return text + fmt::format("device {}", st.st_rdev);
    return text + fmt::format("file {} on {}", st.st_ino, st.st_dev);
}

}  // namespace

/// Clients must not find themselves on another file, nor with rights that nobody gave them. Empty: it fits.
std::string FuseExport::misfit(const Legacy& legacy) const {
    const json::object& state = legacy.state;
    // The process before this one may have died in the middle of a removal.
    pollfd connection{legacy.devices.front().get(), POLLIN, 0};
    if (::poll(&connection, 1, 0) < 0 || (connection.revents & POLLERR))
        return "its connection to the kernel has ended";
    const uint64_t device = number_in(members_in(state, "mount"), "device");
    const auto place = place_of(options_.mountpoint, true);
    if (!place || place->device != device)
        return fmt::format("it was mounted elsewhere than '{}'", options_.mountpoint);
    if (!legacy.agreed.has(kHasResend)) return "this kernel does not send requests again";
    if (options_.transport == Transport::kUring) return "it served over /dev/fuse, and x-transport=uring is wanted";
    if (const json::value* image = state.if_contains("image");
        !image || !image->is_string() || image->get_string() != image_of(root().node())) {
        return fmt::format("it showed another image than node '{}' has now", root().node().name());
    }
    if (flag_in(state, "writable") != writable()) return writable() ? "it was read-only" : "it was writable";
    if (flag_in(state, "cached") != options_.cached) return "x-cached is another";
    if (state.contains("passthrough") != options_.passthrough) return "x-passthrough is another";
    if (flag_in(members_in(state, "mount"), "allow-other") ? options_.allow_other == AllowOther::kOff
                                                           : options_.allow_other == AllowOther::kOn) {
        return "allow-other is another";
    }
    const uint64_t size = number_in(state, "size"), now = root().node().size();
    const bool was_coming = state.contains("coming-size") && number_in(state, "coming-size") == now;
    if (size != now && !was_coming && !(options_.growable && now > size)) {
        return fmt::format("it was {} bytes long, and node '{}' has {}", size, root().node().name(), now);
    }
    return {};
}

Task<void> FuseExport::inherit() {
    if (!context_.keeper) co_return;
    std::optional<Legacy> found = take_legacy(*context_.keeper, id());
    if (!found) co_return;
    if (const std::string why = misfit(*found); !why.empty()) {
        log::warn("export '{}': clients of the process before this one lose their file: {}", id(), why);
        co_await give_up_legacy(*context_.keeper, id(), std::move(*found));
        co_return;
    }
    auto legacy = std::make_unique<Legacy>(std::move(*found));
    auto mount = co_await Mount::adopt(members_in(legacy->state, "mount"), std::move(legacy->devices.front()),
                                       std::move(legacy->covered));
    kept_ = KeptExport::inherit(*context_.keeper, id(), std::move(legacy->file));
    if (!mount) {
        log::info("{}", mount.error().message());
        kept_->end();
        kept_.reset();
        co_return;
    }
    mount_ = std::move(*mount);
    agreed_ = legacy->agreed;
    transport_reason_ = "taken over from the process before this one";
    for (size_t i = 1; i < legacy->devices.size(); ++i) clones_.push_back(std::move(legacy->devices[i]));
    legacy_ = std::move(legacy);
}

void FuseExport::keep() {
    size_ = root().node().size();
    set_image();
    if (!legacy_) {
        if (!context_.keeper || !context_.keeper->active()) {
            kept_reason_ = context_.keeper ? context_.keeper->why_inactive() : "nobody keeps descriptors";
            return;
        }
        if (agreed_.has(kOverIoUring)) {
            kept_reason_ = "requests over io_uring are lost with their process";
            return;
        }
        if (!agreed_.has(kHasResend)) {
            kept_reason_ = "this kernel does not send requests again (Linux 6.9 does)";
            return;
        }
        std::vector<int> devices{mount_->fd()};
        for (const UniqueFd& clone : clones_) devices.push_back(clone.get());
        auto kept = KeptExport::begin(*context_.keeper, id(), devices, mount_->covered_fd(), state());
        if (!kept) {
            kept_reason_ = kept.error().message();
            log::warn("export '{}' does not survive a restart: {}", id(), kept_reason_);
            return;
        }
        kept_ = std::move(*kept);
    } else {
        if (const Result<> loaded = service_->attributes().load(members_in(legacy_->state, "attributes")); !loaded) {
            log::warn("export '{}': {}", id(), loaded.error().message());
        }
        service_->adopt_open_files(number_in(legacy_->state, "open-files"));
        std::vector<int> more;
        for (size_t i = legacy_->devices.size() - 1; i < clones_.size(); ++i) more.push_back(clones_[i].get());
        if (!more.empty()) {
            if (const Result<> added = kept_->add(more); !added) {
                log::warn("export '{}': {} further queue(s) do not survive a restart: {}", id(), more.size(),
                          added.error().message());
            }
        }
        save_state();
        legacy_.reset();
        // Requests that the process before this one has read and not answered: from the beginning, by whoever is free.
        if (const Result<> resent = notify_resend(mount_->fd()); !resent) {
            log::error("export '{}': requests that were under way are lost: {}", id(), resent.error().message());
        }
        log::info("export '{}': file '{}' taken over from the process before this one", id(), mount_->path());
    }
    keeping_.spawn(keep_up_to_date());
}

bool FuseExport::set_image() {
    std::string now = image_of(root().node());
    const std::lock_guard lock(image_mutex_);
    if (now == image_) return false;
    image_ = std::move(now);
    return true;
}

json::object FuseExport::state() const {
    std::string image;
    {
        const std::lock_guard lock(image_mutex_);
        image = image_;
    }
    json::object state{{"version", 1},
                       {"image", image},
                       {"writable", writable()},
                       {"cached", options_.cached},
                       {"size", size_.load(std::memory_order_relaxed)},
                       {"open-files", service_->open_files()},
                       {"negotiated", agreed_.save()},
                       {"mount", mount_->save()},
                       {"attributes", service_->attributes().save()}};
    if (const uint64_t coming = coming_size_; coming != kNoSize) state["coming-size"] = coming;
    if (passthrough_) state["passthrough"] = passthrough_->save();
    return state;
}

/// Two that come at the same time: the later one writes what holds then.
void FuseExport::save_state() {
    const std::lock_guard lock(saving_mutex_);
    kept_->update(state());
}

void FuseExport::resizing(uint64_t size) {
    coming_size_ = size;
    if (kept_) save_state();
}

void FuseExport::size_changed(uint64_t size) {
    size_ = size;
    if (kept_) save_state();
}

/// What changes without anybody saying so.
Task<void> FuseExport::keep_up_to_date() {
    uint64_t open = service_->open_files();
    int64_t changed = service_->attributes().mtime_ns();
    while (!stopping_) {
        const bool expired = co_await keeping_pause_.after(kPause);
        if (!expired || stopping_) break;
        const bool other_image = set_image();
        if (!other_image && open == service_->open_files() && changed == service_->attributes().mtime_ns()) continue;
        open = service_->open_files();
        changed = service_->attributes().mtime_ns();
        save_state();
    }
}

bool FuseExport::leaves() const {
    if (!kept_) return false;
    switch (context_.keeper->leave()) {
        case exports::Keeper::Leave::kNothing:
            return false;
        case exports::Keeper::Leave::kInherited:
            return kept_->inherited();
        case exports::Keeper::Leave::kEverything:
            return true;
    }
    return false;
}

}  // namespace gantry::fuse
