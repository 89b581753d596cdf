#include "runtime/fd_sets.h"

#include <fcntl.h>

#include <algorithm>
#include <cerrno>
#include <charconv>

namespace gantry {

FdSets& FdSets::process() {
    static FdSets sets;
    return sets;
}

void FdSets::forget_unused() const {
    std::erase_if(sets_,
                  [](const auto& item) { return item.second.members.empty() && item.second.use.use_count() == 1; });
}

Result<std::pair<int64_t, int>> FdSets::add(UniqueFd fd, std::optional<int64_t> id, std::optional<std::string> opaque) {
    if (id && *id < 0) return fail(ErrorKind::kInvalid, "Parameter 'fdset-id' expects a non-negative value");
    const std::lock_guard lock(m_);
    forget_unused();
    if (!id) {
        id = 0;
        for (const auto& [taken, entry] : sets_) {
            if (taken != *id) break;
            ++*id;
        }
    }
    const int number = fd.get();
    sets_[*id].members.push_back({std::move(fd), std::move(opaque)});
    return std::pair(*id, number);
}

Result<> FdSets::remove(int64_t id, std::optional<int64_t> fd) {
    const std::lock_guard lock(m_);
    const auto it = sets_.find(id);
    if (it != sets_.end()) {
        const auto gone = std::erase_if(it->second.members, [&](const Passed& p) { return !fd || p.fd.get() == *fd; });
        forget_unused();
        if (gone > 0 || !fd) return {};
    }
    return fail(ErrorKind::kNotFound, "File descriptor named 'fdset-id:{}{}' not found", id,
                fd ? fmt::format(", fd:{}", *fd) : std::string());
}

std::vector<FdSets::Set> FdSets::list() const {
    const std::lock_guard lock(m_);
    forget_unused();
    std::vector<Set> all;
    for (const auto& [id, entry] : sets_) {
        Set& set = all.emplace_back();
        set.id = id;
        for (const Passed& p : entry.members) set.members.push_back({p.fd.get(), p.opaque});
    }
    return all;
}

Result<FdSets::Opened> FdSets::open(std::string_view path, int flags) const {
    const int mode = flags & O_ACCMODE;
    const auto refuse = [&](int e, std::string_view hint) {
        const Error plain = Error::from_errno(e, fmt::format("Could not dup FD for {} flags {:x}", path, mode));
        return std::unexpected(
            Error(plain.kind(), fmt::format("{}{}{}", plain.message(), hint.empty() ? "" : "; ", hint), e));
    };
    const std::string_view digits = path.substr(std::string_view("/dev/fdset/").size());
    int64_t id = -1;
    const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), id);
    const std::lock_guard lock(m_);
    const auto it = sets_.find(id);
    if (error != std::errc() || end != digits.data() + digits.size() || it == sets_.end()) {
        return refuse(ENOENT, "add-fd makes a set");
    }
    for (const Passed& p : it->second.members) {
        const int have = ::fcntl(p.fd.get(), F_GETFL);
        if (have < 0 || (have & O_ACCMODE) != mode) continue;
        UniqueFd copy(::fcntl(p.fd.get(), F_DUPFD_CLOEXEC, 3));
        if (!copy) return refuse(errno, "");
        // The reference sets it on the description, too.
        if ((flags & O_DIRECT) != (have & O_DIRECT) &&
            ::fcntl(copy.get(), F_SETFL, (have & ~O_DIRECT) | (flags & O_DIRECT)) != 0) {
            return refuse(errno, "");
        }
        return Opened{std::move(copy), it->second.use};
    }
    return refuse(EACCES, mode == O_RDONLY ? "add a descriptor that is opened read-only to the set"
                                           : "add a descriptor that is opened for reading and writing to the set");
}

}  // namespace gantry
