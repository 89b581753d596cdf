#include "exports/unix_address.h"

#include <grp.h>
#include <sys/socket.h>
#include <sys/un.h>

#include <cerrno>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <optional>

#include "runtime/socket.h"
#include "schema/options.h"

namespace gantry::exports {

namespace {

/// "Name" sockets live outside of the file system; without `tight` the name is padded to the whole of sun_path.
Result<UniqueFd> listen_abstract(const std::string& name, bool tight) {
    sockaddr_un un{};
    un.sun_family = AF_UNIX;
    if (name.size() + 1 > sizeof un.sun_path) {
        return fail(ErrorKind::kInvalid, "abstract socket name '{}' is too long; at most {} bytes", name,
                    sizeof un.sun_path - 1);
    }
    std::memcpy(un.sun_path + 1, name.data(), name.size());
    const size_t used = offsetof(sockaddr_un, sun_path) + 1 + name.size();
    UniqueFd fd(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) return fail_errno(errno, "cannot create a socket");
    const auto length = static_cast<socklen_t>(tight ? used : sizeof un);
    if (::bind(fd.get(), reinterpret_cast<const sockaddr*>(&un), length) != 0) {
        return fail_errno(errno, "Failed to bind abstract socket '{}'", name);
    }
    if (::listen(fd.get(), SOMAXCONN) != 0) return fail_errno(errno, "cannot listen on abstract socket '{}'", name);
    return fd;
}

Result<mode_t> socket_mode(const std::string& text) {
    unsigned mode = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), mode, 8);
    if (error != std::errc() || end != text.data() + text.size() || mode == 0 || mode > 0777) {
        return fail(ErrorKind::kInvalid, "mode '{}' is not an octal number from 1 to 0777", text);
    }
    return static_cast<mode_t>(mode);
}

/// By name or number.
Result<gid_t> group_number(const std::string& text) {
    gid_t gid = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), gid);
    if (!text.empty() && error == std::errc() && end == text.data() + text.size()) return gid;
    std::vector<char> memory(16384);
    group entry{};
    group* found = nullptr;
    if (::getgrnam_r(text.c_str(), &entry, memory.data(), memory.size(), &found) != 0 || !found) {
        return fail(ErrorKind::kNotFound, "group '{}' is not known; give a name or a number", text);
    }
    return found->gr_gid;
}

}  // namespace

Result<UniqueFd> listen_unix_address(const json::object& object) {
    const schema::Options address(object);
    const std::string path = address.str("path");
    if (address.flag("abstract")) return listen_abstract(path, address.flag("tight", true));
    mode_t mode = 0;
    if (address.has("mode")) {
        TRY(mode, socket_mode(address.str("mode")));
    }
    std::optional<gid_t> group;
    if (address.has("group")) {
        TRY(group, group_number(address.str("group")));
    }
    return listen_unix(path, mode, SOMAXCONN, group);
}

}  // namespace gantry::exports
