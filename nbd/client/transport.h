// Transport: the byte stream to a server, in the clear or through TLS.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "nbd/tls/stream.h"
#include "runtime/error.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"

namespace gantry::nbd::client {

/// Its own loop only. One coroutine receives while another one sends; both end when shut_down() is called. Destroyed
/// when neither is under way.
class Transport {
  public:
    /// A connected, non-blocking stream socket.
    explicit Transport(UniqueFd socket);
    ~Transport();
    Transport(const Transport&) = delete;

    int fd() const { return socket_.get(); }
    bool is_tls() const { return tls_ != nullptr; }
    /// Everything after this is encrypted. Nothing is read ahead of it: bytes that somebody sent behind the server's
    /// answer to STARTTLS end up in the TLS handshake, which fails.
    Task<Result<>> start_tls(std::shared_ptr<const TlsCredentials> credentials, std::string hostname);

    /// At least one byte into the list, as far as it goes; 0 at the end of the stream, -errno.
    Task<int> receive(const iovec* list, size_t count);
    /// Sends some bytes of the list; how many, or -errno.
    Task<int> send(const iovec* list, size_t count);
    /// The same without waiting; -EAGAIN.
    int try_send(const iovec* list, size_t count);

    /// Whole spans, for the negotiation. Errors: kIo with a text that begins in lower case.
    Task<Result<>> receive_all(std::span<uint8_t> into);
    Task<Result<>> send_all(std::span<const uint8_t> bytes);

    /// Says good-bye if there is a way to (TLS); bounded.
    Task<void> bye();
    /// Wakes whoever receives or sends; nothing can be sent any more.
    void shut_down();

  private:
    UniqueFd socket_;
    std::unique_ptr<TlsStream> tls_;
};

/// What a result <= 0 of receive() or send() means.
std::string stream_error(int result);

}  // namespace gantry::nbd::client
