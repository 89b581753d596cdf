// Stream sockets: listening, connecting, options, peers.

#pragma once

#include <sys/socket.h>
#include <sys/types.h>

#include <chrono>
#include <optional>
#include <string>
#include <vector>

#include "runtime/error.h"
#include "runtime/task.h"
#include "runtime/unique_fd.h"

namespace gantry {

/// The file of a unix socket that this process has bound; removed with the object, if it is still the same file.
class SocketFile {
  public:
    SocketFile() = default;
    explicit SocketFile(std::string path);
    SocketFile(SocketFile&& other) noexcept;
    SocketFile& operator=(SocketFile&& other) noexcept;
    ~SocketFile() { remove(); }
    void remove();

  private:
    std::string path_;  // empty: nothing to remove
    dev_t device_ = 0;
    ino_t inode_ = 0;
};

/// Which address families a host name may stand for; unset = either. Both false is kInvalid.
struct InetFamilies {
    std::optional<bool> ipv4;
    std::optional<bool> ipv6;
    bool numeric = false;  // host and port are numbers; nobody is asked for names
};

inline constexpr int kListenBacklog = 128;

/// All sockets made here are non-blocking and close-on-exec.

/// A listening unix socket at `path`, with exactly the permissions `mode` (0: what the umask leaves). A socket file
/// that nobody listens on is replaced; a live socket (kBusy) and any other file (kExists) are left alone. Blocks
/// briefly; any thread.
/// `group`: the file belongs to it from the moment on that anybody may connect.
Result<UniqueFd> listen_unix(const std::string& path, mode_t mode = 0, int backlog = kListenBacklog,
                             std::optional<gid_t> group = {});

/// Listening TCP sockets, one for each address of `host` (empty: every address of this machine). `port` is a number or
/// a service name; "0" picks one free port for all of them. kBusy when the port is taken. Own loop; names are looked up
/// on the pool.
Task<Result<std::vector<UniqueFd>>> listen_inet(std::string host, std::string port, InetFamilies families = {},
                                                int backlog = kListenBacklog);

/// A listening vsock socket. `cid`: a number, or "" or "-1" for any; `port`: a number, "-1" for a free one. kInvalid
/// for what is no number, kUnsupported where the kernel has no vsock.
Result<UniqueFd> listen_vsock(const std::string& cid, const std::string& port, int backlog = kListenBacklog);

/// Connects to a vsock listener (2 is the host, 1 this machine). `timeout` 0: as long as it takes.
Task<Result<UniqueFd>> connect_vsock(std::string cid, std::string port, std::chrono::nanoseconds timeout = {});

/// Connects to the listener at `path`. `timeout` 0: as long as it takes. kTimedOut, kNotFound, kIo (refused),
/// kPermission.
Task<Result<UniqueFd>> connect_unix(std::string path, std::chrono::nanoseconds timeout = {});

/// Connects to the first address of `host` that answers; TCP_NODELAY is set. The error is that of the last address
/// tried. `timeout` is for all addresses together, without the look-up of the name.
Task<Result<UniqueFd>> connect_inet(std::string host, std::string port, InetFamilies families = {},
                                    std::chrono::nanoseconds timeout = {});

Result<> set_nonblocking(int fd, bool on = true);
Result<> set_cloexec(int fd, bool on = true);
/// Does nothing for sockets that are not TCP.
Result<> set_tcp_nodelay(int fd, bool on = true);
/// Keepalive probes; zero values keep the system's setting.
struct Keepalive {
    std::chrono::seconds idle{0};
    std::chrono::seconds interval{0};
    int count = 0;
};
Result<> set_keepalive(int fd, bool on = true, Keepalive probes = {});
/// SO_SNDBUF/SO_RCVBUF, as far as the system's limits allow.
void set_buffer_sizes(int fd, int bytes);

/// Who is at the other end, for logs and query-*: "unix:pid=12,uid=0", "1.2.3.4:567", "[::1]:567", "vsock:3:567";
/// "unknown" when it cannot be said. Never fails.
std::string peer_name(int fd);
/// The process that connected a unix socket, as it was then; nothing for other sockets, and pid 0 for one of another
/// pid namespace.
struct PeerCredentials {
    pid_t pid = 0;
    uid_t uid = 0;
    gid_t gid = 0;
};
std::optional<PeerCredentials> peer_credentials(int fd);
/// The own address in the same form ("unix:/run/x.sock" for a unix socket).
std::string local_name(int fd);
/// The TCP port a socket is bound to; kInvalid for other sockets.
Result<uint16_t> local_port(int fd);

/// What `fd`, handed to us from outside, must be: a listening stream socket of the families unix, IPv4, IPv6 or vsock.
/// kInvalid with the reason otherwise. Changes nothing.
Result<> check_listening_socket(int fd);
/// The same for a connected stream socket.
Result<> check_connected_socket(int fd);

}  // namespace gantry
