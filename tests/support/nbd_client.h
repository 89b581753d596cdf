// NbdClient: a blocking raw NBD client for tests: says exactly what it is told to, right or wrong.

#pragma once

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include <cstring>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "nbd/protocol.h"
#include "runtime/unique_fd.h"

namespace gantry::test {

using Bytes = std::vector<uint8_t>;

template <class T>
void put(Bytes& out, T value) {
    uint8_t raw[sizeof(T)];
    nbd::store_big(raw, value);
    out.insert(out.end(), raw, raw + sizeof raw);
}
inline void put_text(Bytes& out, std::string_view text) { out.insert(out.end(), text.begin(), text.end()); }

/// INFO/GO payload.
inline Bytes info_payload(std::string_view name, std::vector<uint16_t> requests = {}) {
    Bytes p;
    put(p, static_cast<uint32_t>(name.size()));
    put_text(p, name);
    put(p, static_cast<uint16_t>(requests.size()));
    for (uint16_t r : requests) put(p, r);
    return p;
}
/// LIST/SET_META_CONTEXT payload.
inline Bytes context_payload(std::string_view name, std::vector<std::string> queries) {
    Bytes p;
    put(p, static_cast<uint32_t>(name.size()));
    put_text(p, name);
    put(p, static_cast<uint32_t>(queries.size()));
    for (const std::string& q : queries) {
        put(p, static_cast<uint32_t>(q.size()));
        put_text(p, q);
    }
    return p;
}

class NbdClient {
  public:
    struct OptionReply {
        uint32_t option = 0, type = 0;
        Bytes payload;
        std::string text() const { return {payload.begin(), payload.end()}; }
    };
    /// A reply or a chunk of one.
    struct Reply {
        bool structured = false;
        uint32_t error = 0;
        uint16_t flags = 0, type = 0;
        uint64_t cookie = 0;
        Bytes payload;  // of a chunk
        bool done() const { return !structured || (flags & nbd::kChunkDone); }
    };

    /// Throws when the server says nothing for 20 s or the connection ends early; see closed().
    explicit NbdClient(const std::string& path, int receive_buffer = 0) {
        fd_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
        const timeval limit{20, 0};
        ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof limit);
        ::setsockopt(fd_.get(), SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof limit);
        if (receive_buffer) ::setsockopt(fd_.get(), SOL_SOCKET, SO_RCVBUF, &receive_buffer, sizeof receive_buffer);
        sockaddr_un address{};
        address.sun_family = AF_UNIX;
        std::strncpy(address.sun_path, path.c_str(), sizeof address.sun_path - 1);
        if (::connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof address) != 0) {
            throw std::runtime_error("cannot connect to " + path);
        }
    }
    int fd() const { return fd_.get(); }
    void close() { fd_.reset(); }
    void half_close() { ::shutdown(fd_.get(), SHUT_WR); }

    // ---- Bytes ----

    void send(const Bytes& bytes) {
        size_t sent = 0;
        while (sent < bytes.size()) {
            const ssize_t n = ::send(fd_.get(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
            if (n <= 0) throw std::runtime_error("the server does not take our bytes");
            sent += static_cast<size_t>(n);
        }
    }
    /// Like send(), for servers that may have hung up.
    bool try_send(const Bytes& bytes) {
        size_t sent = 0;
        while (sent < bytes.size()) {
            const ssize_t n = ::send(fd_.get(), bytes.data() + sent, bytes.size() - sent, MSG_NOSIGNAL);
            if (n <= 0) return false;
            sent += static_cast<size_t>(n);
        }
        return true;
    }
    Bytes receive(size_t size) {
        Bytes bytes(size);
        size_t have = 0;
        while (have < size) {
            const ssize_t n = ::recv(fd_.get(), bytes.data() + have, size - have, 0);
            if (n <= 0) throw std::runtime_error(n == 0 ? "the server closed the connection" : "the server is silent");
            have += static_cast<size_t>(n);
        }
        return bytes;
    }
    /// True when the server ends the connection without another byte.
    bool closed() {
        uint8_t byte;
        const ssize_t n = ::recv(fd_.get(), &byte, 1, 0);
        return n == 0 || (n < 0 && errno == ECONNRESET);
    }
    /// The same, whatever it still sends before.
    bool ends() {
        uint8_t bytes[4096];
        for (;;) {
            const ssize_t n = ::recv(fd_.get(), bytes, sizeof bytes, 0);
            if (n == 0 || (n < 0 && errno == ECONNRESET)) return true;
            if (n < 0) return false;
        }
    }
    template <class T>
    static T at(const Bytes& bytes, size_t offset) {
        return nbd::load_big<T>(bytes.data() + offset);
    }

    // ---- Handshake ----

    NbdClient& greet(uint32_t flags = nbd::kFlagFixedNewstyle | nbd::kFlagNoZeroes) {
        const Bytes greeting = receive(nbd::kGreetingSize);
        if (at<uint64_t>(greeting, 0) != nbd::kNbdMagic || at<uint64_t>(greeting, 8) != nbd::kOptionMagic) {
            throw std::runtime_error("not a newstyle greeting");
        }
        Bytes out;
        put(out, flags);
        send(out);
        return *this;
    }
    static Bytes option_bytes(uint32_t option, const Bytes& payload = {}) {
        Bytes out;
        put(out, nbd::kOptionMagic);
        put(out, option);
        put(out, static_cast<uint32_t>(payload.size()));
        out.insert(out.end(), payload.begin(), payload.end());
        return out;
    }
    OptionReply option_reply() {
        const Bytes header = receive(nbd::kOptionReplySize);
        if (at<uint64_t>(header, 0) != nbd::kOptionReplyMagic) throw std::runtime_error("not an option reply");
        return {at<uint32_t>(header, 8), at<uint32_t>(header, 12), receive(at<uint32_t>(header, 16))};
    }
    /// All replies to one option; the last is the final one.
    std::vector<OptionReply> option(uint32_t option, const Bytes& payload = {}) {
        send(option_bytes(option, payload));
        std::vector<OptionReply> replies;
        do {
            replies.push_back(option_reply());
        } while (replies.back().type != nbd::kRepAck && !(replies.back().type & 0x80000000));
        return replies;
    }
    uint32_t final_type(uint32_t number, const Bytes& payload = {}) { return option(number, payload).back().type; }

    struct Entered {
        uint64_t size = 0;
        uint16_t flags = 0;
        uint32_t minimum = 0, preferred = 0, maximum = 0;
    };
    /// Greeting to transmission with GO.
    Entered enter(std::string_view name, bool structured = false, bool contexts = false) {
        greet();
        if (structured && final_type(nbd::kOptStructuredReply) != nbd::kRepAck)
            throw std::runtime_error("no structured replies");
        if (contexts) {
            const auto replies = option(nbd::kOptSetMetaContext, context_payload(name, {"base:allocation"}));
            if (replies.size() != 2) throw std::runtime_error("no base:allocation");
        }
        return go(name);
    }
    Entered go(std::string_view name) {
        Entered entered;
        const auto replies = option(nbd::kOptGo, info_payload(name, {nbd::kInfoBlockSize}));
        if (replies.back().type != nbd::kRepAck) throw std::runtime_error("GO refused: " + replies.back().text());
        for (const OptionReply& r : replies) {
            if (r.type != nbd::kRepInfo) continue;
            const auto info = at<uint16_t>(r.payload, 0);
            if (info == nbd::kInfoExport) {
                entered.size = at<uint64_t>(r.payload, 2);
                entered.flags = at<uint16_t>(r.payload, 10);
            } else if (info == nbd::kInfoBlockSize) {
                entered.minimum = at<uint32_t>(r.payload, 2);
                entered.preferred = at<uint32_t>(r.payload, 6);
                entered.maximum = at<uint32_t>(r.payload, 10);
            }
        }
        return entered;
    }

    // ---- Transmission ----

    static Bytes request_bytes(uint16_t command, uint64_t cookie, uint64_t offset, uint32_t length, uint16_t flags = 0,
                               const Bytes& payload = {}) {
        Bytes out(nbd::kRequestSize);
        nbd::encode_request(out.data(), {nbd::kRequestMagic, flags, command, cookie, offset, length});
        out.insert(out.end(), payload.begin(), payload.end());
        return out;
    }
    void request(uint16_t command, uint64_t cookie, uint64_t offset, uint32_t length, uint16_t flags = 0,
                 const Bytes& payload = {}) {
        send(request_bytes(command, cookie, offset, length, flags, payload));
    }
    /// One simple reply (without data) or one chunk.
    Reply reply() {
        Bytes header = receive(nbd::kSimpleReplySize);
        Reply r;
        const auto magic = at<uint32_t>(header, 0);
        if (magic == nbd::kSimpleReplyMagic) {
            r.error = at<uint32_t>(header, 4);
            r.cookie = at<uint64_t>(header, 8);
            return r;
        }
        if (magic != nbd::kStructuredReplyMagic) throw std::runtime_error("not a reply");
        const Bytes rest = receive(nbd::kChunkHeaderSize - nbd::kSimpleReplySize);
        r.structured = true;
        r.flags = at<uint16_t>(header, 4);
        r.type = at<uint16_t>(header, 6);
        r.cookie = at<uint64_t>(header, 8);
        r.payload = receive(at<uint32_t>(rest, 0));
        if (r.type & 0x8000) r.error = at<uint32_t>(r.payload, 0);
        return r;
    }
    /// The error of a request without data in its answer.
    uint32_t command(uint16_t command, uint64_t offset, uint32_t length, uint16_t flags = 0,
                     const Bytes& payload = {}) {
        request(command, 77, offset, length, flags, payload);
        const Reply r = reply();
        if (r.cookie != 77) throw std::runtime_error("wrong cookie");
        return r.error;
    }
    uint32_t write(uint64_t offset, const Bytes& data, uint16_t flags = 0) {
        return command(nbd::kCmdWrite, offset, static_cast<uint32_t>(data.size()), flags, data);
    }
    /// A simple READ: data, or the error as nullopt.
    std::optional<Bytes> read(uint64_t offset, uint32_t length) {
        if (command(nbd::kCmdRead, offset, length) != 0) return std::nullopt;
        return receive(length);
    }
    /// All chunks of one structured reply.
    std::vector<Reply> chunks() {
        std::vector<Reply> all;
        do {
            all.push_back(reply());
        } while (!all.back().done());
        return all;
    }
    /// The data of a structured READ, put together; throws on an error chunk, overlap or gap.
    Bytes structured_data(uint64_t offset, uint32_t length) {
        Bytes data(length);
        std::vector<bool> seen(length);
        for (const Reply& chunk : chunks()) {
            if (chunk.type == nbd::kChunkNone) continue;
            const bool hole = chunk.type == nbd::kChunkOffsetHole;
            if (!hole && chunk.type != nbd::kChunkOffsetData) throw std::runtime_error("not a content chunk");
            const uint64_t begin = at<uint64_t>(chunk.payload, 0) - offset;
            const size_t size = hole ? at<uint32_t>(chunk.payload, 8) : chunk.payload.size() - 8;
            if (size == 0 || begin > length || size > length - begin) throw std::runtime_error("chunk out of range");
            for (size_t i = 0; i < size; ++i) {
                if (seen[begin + i]) throw std::runtime_error("chunks overlap");
                seen[begin + i] = true;
                if (!hole) data[begin + i] = chunk.payload[8 + i];
            }
        }
        for (const bool s : seen) {
            if (!s) throw std::runtime_error("chunks leave a gap");
        }
        return data;
    }
    void disconnect() { request(nbd::kCmdDisc, 0, 0, 0); }

  private:
    UniqueFd fd_;
};

}  // namespace gantry::test
