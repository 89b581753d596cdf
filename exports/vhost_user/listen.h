// Where front ends come in: a unix socket that is made, or one that was passed.

#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "runtime/error.h"
#include "runtime/socket.h"
#include "runtime/unique_fd.h"
#include "schema/value.h"

namespace gantry::vhost_user {

/// One of both descriptors; `file` removes what was made in the file system.
struct Entrance {
    UniqueFd listening;
    UniqueFd connected;  // one front end, and no other ever
    SocketFile file;
    std::string name;  // for people: the path, or what the socket says of itself
};

/// Checks what needs no resources. kInvalid: another kind of address than unix or fd.
Result<> check_entrance(const json::object& address);
/// `address`: a validated SocketAddress. `resolve` finds descriptors of type fd. Errors leave nothing behind.
Result<Entrance> open_entrance(const json::object& address,
                               const std::function<Result<UniqueFd>(std::string_view)>& resolve);

}  // namespace gantry::vhost_user
