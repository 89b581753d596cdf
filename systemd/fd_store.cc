#include "systemd/fd_store.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdlib>

#include "runtime/log.h"

namespace gantry::systemd {

namespace {

bool is_ours(std::string_view name) { return name.starts_with(FdStore::kPrefix); }

/// FDSTORE: how many descriptors the manager keeps for us; 0 when it does not say.
uint64_t room_in_store() {
    const char* text = ::getenv("FDSTORE");
    uint64_t room = 0;
    if (text) {
        const std::string_view view = text;
        auto [end, error] = std::from_chars(view.data(), view.data() + view.size(), room);
        if (error != std::errc() || end != view.data() + view.size()) room = 0;
    }
    ::unsetenv("FDSTORE");
    return room;
}

bool valid_name(std::string_view name) {
    return !name.empty() && name.size() <= FdStore::kMaxName &&
           std::ranges::all_of(name, [](char c) { return c > 0x20 && c < 0x7f && c != ':'; });
}

}  // namespace

FdStore::FdStore(Notifier& notifier, ActivationSockets& passed, Use use) : notifier_(notifier) {
    const uint64_t room = room_in_store();
    back_ = passed.take_others(is_ours);
    if (use == Use::kOff) {
        for (const std::string& name : waiting()) drop(name);
        back_.clear();
        why_inactive_ = "--fd-store=off";
    } else if (!notifier.active()) {
        why_inactive_ = "no service manager has started this process";
    } else if (use == Use::kAuto && room == 0 && back_.empty()) {
        why_inactive_ = "the service manager names no descriptor store (FileDescriptorStoreMax=)";
    } else {
        active_ = true;
    }
}

Result<> FdStore::put(std::string_view name, std::span<const int> fds) {
    if (!active_) return fail(ErrorKind::kUnsupported, "Descriptors cannot be stored: {}", why_inactive_);
    if (!valid_name(name)) {
        return fail(ErrorKind::kInvalid, "'{}' cannot name a stored descriptor: at most {} plain characters", name,
                    kMaxName);
    }
    return notifier_.send_descriptors(fmt::format("FDSTORE=1\nFDPOLL=0\nFDNAME={}{}\n", kPrefix, name), fds);
}

void FdStore::drop(std::string_view name) {
    const std::string full = fmt::format("{}{}", kPrefix, name);
    std::erase_if(back_, [&](const auto& passed) { return passed.name == full; });
    if (!notifier_.active()) return;
    if (const Result<> sent = notifier_.send_descriptors(fmt::format("FDSTOREREMOVE=1\nFDNAME={}\n", full), {});
        !sent) {
        log::warn("'{}' stays in the descriptor store: {}", full, sent.error().message());
    }
}

std::vector<UniqueFd> FdStore::take(std::string_view name) {
    std::vector<UniqueFd> taken;
    const std::string full = fmt::format("{}{}", kPrefix, name);
    for (auto& passed : back_) {
        if (passed.name == full) taken.push_back(std::move(passed.fd));
    }
    std::erase_if(back_, [&](const auto& passed) { return passed.name == full; });
    return taken;
}

std::vector<int> FdStore::look(std::string_view name) const {
    std::vector<int> fds;
    for (const auto& passed : back_) {
        if (passed.name.substr(kPrefix.size()) == name) fds.push_back(passed.fd.get());
    }
    return fds;
}

std::vector<std::string> FdStore::waiting() const {
    std::vector<std::string> names;
    for (const auto& passed : back_) {
        std::string name = passed.name.substr(kPrefix.size());
        if (std::ranges::find(names, name) == names.end()) names.push_back(std::move(name));
    }
    return names;
}

}  // namespace gantry::systemd
