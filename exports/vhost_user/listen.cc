#include "exports/vhost_user/listen.h"

#include <sys/socket.h>

#include <cstring>

#include "exports/unix_address.h"
#include "schema/options.h"

namespace gantry::vhost_user {

namespace {

constexpr std::string_view kUnix = "unix:";

}  // namespace

Result<> check_entrance(const json::object& address) {
    const std::string type = schema::Options(address).str("type");
    if (type != "unix" && type != "fd") {
        return fail(ErrorKind::kInvalid,
                    "Only socket address types 'unix' and 'fd' are supported; '{}' cannot carry descriptors", type);
    }
    return {};
}

Result<Entrance> open_entrance(const json::object& object,
                               const std::function<Result<UniqueFd>(std::string_view)>& resolve) {
    const schema::Options address(object);
    Entrance out;
    if (address.str("type") == "unix") {
        TRY(out.listening, exports::listen_unix_address(object));
        const bool abstract = address.flag("abstract");
        // The path that it is bound to, should the working directory change.
        if (!abstract) out.file = SocketFile(local_name(out.listening.get()).substr(kUnix.size()));
        out.name = (abstract ? "@" : "") + address.str("path");
        return out;
    }
    const std::string name = address.str("str");
    if (!resolve) return fail(ErrorKind::kUnsupported, "file descriptor '{}' cannot be looked up here", name);
    TRY(UniqueFd fd, resolve(name));
    const std::string local = local_name(fd.get());
    if (!local.starts_with(kUnix)) {
        return fail(ErrorKind::kInvalid, "file descriptor '{}' is not a unix socket; a front end needs one", name);
    }
    const bool listening = check_listening_socket(fd.get()).has_value();
    if (!listening) {
        if (const auto connected = check_connected_socket(fd.get()); !connected) {
            return fail(ErrorKind::kInvalid, "file descriptor '{}' is neither a listening nor a connected socket: {}",
                        name, connected.error().message());
        }
    }
    CHECK_OK(set_nonblocking(fd.get()));
    CHECK_OK(set_cloexec(fd.get()));
    out.name = local == kUnix ? fmt::format("fd:{}", name) : local.substr(kUnix.size());
    (listening ? out.listening : out.connected) = std::move(fd);
    return out;
}

}  // namespace gantry::vhost_user
