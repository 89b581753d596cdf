// Connection: whole messages over a unix stream socket, which may split and join them anywhere.

#pragma once

#include <span>
#include <string>

#include "exports/vhost_user/message.h"
#include "runtime/task.h"

namespace gantry::vhost_user {

/// Main loop only; one coroutine reads and answers.
class Connection {
  public:
    explicit Connection(UniqueFd fd);
    ~Connection();
    Connection(const Connection&) = delete;

    /// Who is at the other end.
    const std::string& peer() const { return peer_; }
    /// The next message, whose header has been checked. kShutdown: the other end has closed; kInvalid: it sends what
    /// is no message; errno.
    Task<Result<Message>> next();
    /// Sends all of it, and `fd` with its first byte unless that is -1. The other end must take it.
    Task<Result<>> send(std::vector<std::byte> bytes, int fd = -1);
    /// next() and send() fail from now on.
    void cut();
    /// The other end has closed, though next() may not have come across that yet.
    bool hung_up() const;

  private:
    Task<Result<>> receive_rest(std::byte* to, size_t size);

    UniqueFd fd_;
    std::string peer_;
};

/// Sends one message without payload on `fd`, a socket that somebody else has given us, if there is room. False, with
/// errno: it could not be sent.
bool send_notice(int fd, uint32_t request);

}  // namespace gantry::vhost_user
