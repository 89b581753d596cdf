// NbdScriptServer: an NBD server for tests of clients. It says what it is told to say, right or wrong; blocking, on a
// thread of its own.

#pragma once

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "nbd/protocol.h"
#include "runtime/unique_fd.h"
#include "tests/support/temp_dir.h"

namespace gantry::test {

using Wire = std::vector<uint8_t>;

template <class T>
void append(Wire& out, T value) {
    const size_t at = out.size();
    out.resize(at + sizeof value);
    nbd::store_big(out.data() + at, value);
}

/// What a well-behaved script offers.
struct ScriptExport {
    uint64_t size = 1 << 20;
    uint16_t flags = nbd::kHasFlags | nbd::kSendFlush | nbd::kSendFua | nbd::kSendTrim | nbd::kSendWriteZeroes |
                     nbd::kSendCache | nbd::kSendFastZero;
    bool structured = true;
    bool extended = false;
    bool context = true;  // whatever is asked for, with number 7
    bool go = true;       // else EXPORT_NAME alone
    std::vector<uint32_t> block_sizes = {};
};

/// One connection, from the server's side. Functions throw Gone when the client has left.
class ScriptPeer {
  public:
    struct Gone {};
    struct Option {
        uint32_t number = 0;
        Wire payload;
    };
    struct Request {
        uint16_t flags = 0, command = 0;
        uint64_t cookie = 0, offset = 0, length = 0;
        Wire data;
    };

    explicit ScriptPeer(int fd) : fd_(fd) {
        const timeval limit{20, 0};
        ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
    }

    void send(const Wire& bytes) const {
        for (size_t sent = 0; sent < bytes.size();) {
            const ssize_t n = ::send(fd_, bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
            if (n <= 0) throw Gone();
            sent += static_cast<size_t>(n);
        }
    }
    Wire receive(size_t size) const {
        Wire bytes(size);
        for (size_t have = 0; have < size;) {
            const ssize_t n = ::recv(fd_, bytes.data() + have, size - have, 0);
            if (n <= 0) throw Gone();
            have += static_cast<size_t>(n);
        }
        return bytes;
    }
    /// Until the client closes.
    void wait_for_end() const {
        char scratch[4096];
        while (::recv(fd_, scratch, sizeof scratch, 0) > 0) {
        }
    }

    // ---- Negotiation ----

    void greet(uint16_t flags = 3) const {
        Wire out;
        append(out, nbd::kNbdMagic);
        append(out, nbd::kOptionMagic);
        append(out, flags);
        send(out);
        receive(4);
    }
    Option option() const {
        const Wire header = receive(16);
        Option out;
        out.number = nbd::load_big<uint32_t>(header.data() + 8);
        out.payload = receive(nbd::load_big<uint32_t>(header.data() + 12));
        return out;
    }
    void reply(uint32_t option, uint32_t type, const Wire& payload = {}) const {
        Wire out;
        append(out, nbd::kOptionReplyMagic);
        append(out, option);
        append(out, type);
        append(out, static_cast<uint32_t>(payload.size()));
        out.insert(out.end(), payload.begin(), payload.end());
        send(out);
    }
    static Wire export_info(uint64_t size, uint16_t flags) {
        Wire out;
        append(out, static_cast<uint16_t>(nbd::kInfoExport));
        append(out, size);
        append(out, flags);
        return out;
    }
    /// From the greeting to transmission.
    void negotiate(const ScriptExport& offer = {}) {
        extended_ = offer.extended;
        structured_ = offer.structured || offer.extended;
        greet();
        for (;;) {
            const Option asked = option();
            switch (asked.number) {
                case nbd::kOptExtendedHeaders:
                    reply(asked.number, offer.extended ? nbd::kRepAck : nbd::kRepErrUnsup);
                    break;
                case nbd::kOptStructuredReply:
                    reply(asked.number, offer.structured ? nbd::kRepAck : nbd::kRepErrUnsup);
                    break;
                case nbd::kOptSetMetaContext:
                    offer_context(asked, offer.context);
                    break;
                case nbd::kOptExportName: {
                    Wire out;
                    append(out, offer.size);
                    append(out, offer.flags);
                    send(out);
                    return;
                }
                case nbd::kOptGo:
                    if (!offer.go) {
                        reply(asked.number, nbd::kRepErrUnsup);
                        break;
                    }
                    reply(asked.number, nbd::kRepInfo, export_info(offer.size, offer.flags));
                    if (!offer.block_sizes.empty()) {
                        Wire sizes;
                        append(sizes, static_cast<uint16_t>(nbd::kInfoBlockSize));
                        for (const uint32_t size : offer.block_sizes) append(sizes, size);
                        reply(asked.number, nbd::kRepInfo, sizes);
                    }
                    reply(asked.number, nbd::kRepAck);
                    return;
                default:
                    reply(asked.number, nbd::kRepErrUnsup);
            }
        }
    }

    // ---- Transmission ----

    Request request() const {
        const Wire header = receive(extended_ ? nbd::kExtendedRequestSize : nbd::kRequestSize);
        const nbd::RequestHeader h = nbd::decode_request(header.data(), extended_);
        Request out{h.flags, h.command, h.cookie, h.offset, h.length, {}};
        if (h.magic != (extended_ ? nbd::kExtendedRequestMagic : nbd::kRequestMagic)) {
            throw std::runtime_error("a request has a wrong magic number");
        }
        if (out.command == nbd::kCmdWrite) out.data = receive(out.length);
        return out;
    }
    static Wire simple(uint64_t cookie, uint32_t error, const Wire& data = {}) {
        Wire out;
        append(out, nbd::kSimpleReplyMagic);
        append(out, error);
        append(out, cookie);
        out.insert(out.end(), data.begin(), data.end());
        return out;
    }
    Wire chunk(const Request& rq, uint16_t flags, uint16_t type, const Wire& payload) const {
        Wire out;
        append(out, extended_ ? nbd::kExtendedReplyMagic : nbd::kStructuredReplyMagic);
        append(out, flags);
        append(out, type);
        append(out, rq.cookie);
        if (extended_) {
            append(out, rq.offset);
            append(out, static_cast<uint64_t>(payload.size()));
        } else {
            append(out, static_cast<uint32_t>(payload.size()));
        }
        out.insert(out.end(), payload.begin(), payload.end());
        return out;
    }
    static Wire data_payload(uint64_t offset, size_t length, uint8_t byte) {
        Wire out;
        append(out, offset);
        out.insert(out.end(), length, byte);
        return out;
    }
    static Wire hole_payload(uint64_t offset, uint32_t length) {
        Wire out;
        append(out, offset);
        append(out, length);
        return out;
    }
    static Wire error_payload(uint32_t error, std::string_view text) {
        Wire out;
        append(out, error);
        append(out, static_cast<uint16_t>(text.size()));
        out.insert(out.end(), text.begin(), text.end());
        return out;
    }
    /// Context 7.
    Wire status_payload(const std::vector<std::pair<uint64_t, uint64_t>>& extents, uint32_t context = 7) const {
        Wire out;
        append(out, context);
        if (extended_) append(out, static_cast<uint32_t>(extents.size()));
        for (const auto& [length, flags] : extents) {
            if (extended_) {
                append(out, length);
                append(out, flags);
            } else {
                append(out, static_cast<uint32_t>(length));
                append(out, static_cast<uint32_t>(flags));
            }
        }
        return out;
    }
    /// Success: of READ, bytes of `byte`; of BLOCK_STATUS, all of it data.
    void answer(const Request& rq, uint8_t byte = 0x5a) const {
        const Wire zeroes;
        if (rq.command == nbd::kCmdRead && structured_) {
            send(chunk(rq, nbd::kChunkDone, nbd::kChunkOffsetData, data_payload(rq.offset, rq.length, byte)));
        } else if (rq.command == nbd::kCmdRead) {
            send(simple(rq.cookie, 0, Wire(rq.length, byte)));
        } else if (rq.command == nbd::kCmdBlockStatus) {
            send(chunk(rq, nbd::kChunkDone, extended_ ? nbd::kChunkBlockStatusExt : nbd::kChunkBlockStatus,
                       status_payload({{rq.length, 0}})));
        } else if (extended_) {
            send(chunk(rq, nbd::kChunkDone, nbd::kChunkNone, {}));
        } else {
            send(simple(rq.cookie, 0));
        }
    }
    void fail(const Request& rq, uint32_t error, std::string_view text = "") const {
        if (structured_) {
            send(chunk(rq, nbd::kChunkDone, nbd::kChunkError, error_payload(error, text)));
        } else {
            send(simple(rq.cookie, error));
        }
    }
    /// Answers everything until DISC or the end.
    void serve(uint8_t byte = 0x5a) const {
        for (;;) {
            const Request rq = request();
            if (rq.command == nbd::kCmdDisc) return;
            answer(rq, byte);
        }
    }

  private:
    void offer_context(const Option& asked, bool offer) const {
        if (offer) {
            // The name of the export, the number of queries (one), the query.
            const auto name = nbd::load_big<uint32_t>(asked.payload.data());
            Wire payload;
            append(payload, uint32_t{7});
            payload.insert(payload.end(), asked.payload.begin() + 4 + name + 8, asked.payload.end());
            reply(asked.number, nbd::kRepMetaContext, payload);
        }
        reply(asked.number, nbd::kRepAck);
    }
    const int fd_;
    bool structured_ = false, extended_ = false;
};

/// Each connection is served by `script(peer, number)` on a thread of its own; number counts them from 0.
class NbdScriptServer {
  public:
    using Script = std::function<void(ScriptPeer&, int number)>;

    explicit NbdScriptServer(Script script) : script_(std::move(script)) {
        listener_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::strncpy(address.sun_path, path().c_str(), sizeof address.sun_path - 1);
        if (::bind(listener_.get(), reinterpret_cast<const sockaddr*>(&address), sizeof address) != 0 ||
            ::listen(listener_.get(), 64) != 0) {
            throw std::runtime_error("cannot listen on " + path());
        }
        thread_ = std::thread([this] { run(); });
    }
    ~NbdScriptServer() {
        ::shutdown(listener_.get(), SHUT_RDWR);
        thread_.join();
        for (const auto& one : served_) ::shutdown(one->fd.get(), SHUT_RDWR);
        for (const auto& one : served_) one->thread.join();
    }

    std::string path() const { return dir_.file("server.sock"); }
    /// Connections that have come.
    int connections() const { return connections_; }

  private:
    struct Served {
        UniqueFd fd;
        std::thread thread;
    };
    void run() {
        for (;;) {
            UniqueFd fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC));
            if (!fd) break;
            auto one = std::make_unique<Served>();
            one->fd = std::move(fd);
            one->thread = std::thread([this, fd = one->fd.get(), number = connections_++] { serve(fd, number); });
            served_.push_back(std::move(one));
        }
    }
    void serve(int fd, int number) {
        ScriptPeer peer(fd);
        try {
            script_(peer, number);
        } catch (const ScriptPeer::Gone&) {
        }
        ::shutdown(fd, SHUT_RDWR);
    }

    TempDir dir_;
    Script script_;
    UniqueFd listener_;
    std::atomic<int> connections_{0};
    std::vector<std::unique_ptr<Served>> served_;  // of thread_
    std::thread thread_;
};

}  // namespace gantry::test
