// TlsStream: TLS over one socket. GnuTLS works on memory; every system call is made here, on the calling loop.

#pragma once

#include <sys/uio.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "nbd/tls/credentials.h"
#include "runtime/buffer.h"
#include "runtime/task.h"

namespace gantry::nbd {

/// One loop at a time: after handshake() the stream may move to another loop. One coroutine may receive while another
/// one sends. The descriptor belongs to the caller; it is a connected, non-blocking stream socket.
class TlsStream {
  public:
    /// `hostname`: what a client verifies in the server's certificate, a name or an address; x509 clients that verify
    /// need one ("No hostname for certificate validation").
    static Result<std::unique_ptr<TlsStream>> create(std::shared_ptr<const TlsCredentials> credentials,
                                                     std::string hostname = {});
    ~TlsStream();
    TlsStream(const TlsStream&) = delete;

    /// Handshake and verification of the peer. Cryptography runs on the blocking pool. Ends early when the socket is
    /// shut down. On failure an alert was sent as far as the socket took it; the connection is of no use. The text says
    /// what is wrong with which certificate, or what the peer complained about; kShutdown: the peer just left. Once,
    /// before anything else.
    Task<Result<>> handshake(int fd);

    /// At most `size` bytes; waits for at least one. 0: the peer said good-bye (close_notify). -errno: ECONNABORTED
    /// when it left without, EPROTO for a bad record.
    Task<int> recv(int fd, void* data, size_t size);
    /// The same without waiting: -EAGAIN when a record is not complete.
    int try_recv(int fd, void* data, size_t size);
    /// Encrypts bytes of the list in full records (a list is not padded to records: gather before), at most `limit`
    /// bytes; how many were taken, or -EPROTO. They wait in unsent() for flush().
    int encrypt(const iovec* iov, size_t count, size_t limit);
    /// Encrypted bytes not sent yet.
    size_t unsent() const { return out_end_ - out_pos_; }
    /// Sends what is encrypted without waiting: 0 all, -EAGAIN the socket is full, -errno.
    int try_flush(int fd);
    /// Encrypts and sends the whole list, waiting as long as it takes: its length, or -errno. In turns: other
    /// coroutines run in between.
    Task<int> send(int fd, const iovec* iov, size_t count);
    Task<int> send(int fd, const void* data, size_t size);

    /// close_notify, waiting at most a second for room in the socket. Nothing is sent after it.
    Task<void> bye(int fd);

    /// After the handshake: the distinguished name of a verified certificate (RFC 4514), the PSK identity (server
    /// only); empty: not known.
    const std::string& peer_name() const { return peer_name_; }
    /// For people: "TLS1.3 AES-128-GCM".
    const std::string& summary() const { return summary_; }

    /// Nothing is buffered and nothing under way: memory that can be had again is given back.
    void release_buffers();

    /// For nbd/tls/ alone.
    struct Session;

  private:
    friend struct Session;
    TlsStream();
    int try_fill(int fd);
    Task<int> fill(int fd);
    Task<int> drain(int fd);

    std::unique_ptr<Session> session_;
    Buffer in_;  // received, not decrypted: [in_pos_, in_end_)
    size_t in_pos_ = 0, in_end_ = 0;
    bool in_eof_ = false;
    bool dry_ = false;  // the last try_recv() left nothing to be had without waiting
    Buffer out_;        // encrypted, not sent: [out_pos_, out_end_)
    size_t out_pos_ = 0, out_end_ = 0;
    std::string peer_name_, summary_;
};

}  // namespace gantry::nbd
