#include "nbd/connection.h"

#include <sys/socket.h>

#include <array>
#include <cerrno>

#include "nbd/authz/authz.h"
#include "nbd/export.h"
#include "nbd/server.h"
#include "runtime/cross_loop.h"
#include "runtime/io.h"
#include "runtime/log.h"
#include "runtime/socket.h"

namespace gantry::nbd {

namespace {

/// Options of one connection; nobody needs so many, and each costs the main loop time.
constexpr unsigned kMaxOptions = 4096;

/// The session on its loop; the descriptor is unknown to that loop afterwards.
Task<SessionResult> transmit_here(int fd, block::Channel* channel, SessionConfig config, SessionCounters* counters) {
    TlsStream* tls = config.tls;
    const SessionResult result = co_await serve_session(fd, *channel, std::move(config), *counters);
    if (tls) co_await tls->bye(fd);
    channel->loop().forget_fd(fd);
    co_return result;
}

/// The server ends: only ABORT is still served.
HandshakeStep refuse_option(uint32_t number, std::vector<uint8_t>& out) {
    if (number == kOptExportName) return HandshakeStep::kClose;  // has no way to tell an error
    OptionOutput output(number, out);
    if (number == kOptAbort) {
        output.ack();
        return HandshakeStep::kClose;
    }
    output.error(kRepErrShutdown, "the server is shutting down");
    return HandshakeStep::kContinue;
}

}  // namespace

Connection::Connection(Server& server, const ExportDirectory& exports, UniqueFd fd, ConnectionLimits limits)
    : server_(server),
      fd_(std::move(fd)),
      limits_(limits),
      peer_(peer_name(fd_.get())),
      handshake_(exports, limits_.tls.mode()) {}

Task<void> Connection::run() {
    if (limits_.handshake_max.count() > 0) scope_.spawn(enforce_time_limit());
    const bool entered = co_await negotiate();
    // Its time is part of the handshake's.
    if (!entered && tls_) co_await tls_->bye(fd_.get());
    time_limit_.cancel();
    co_await scope_.join();
    Loop::current().forget_fd(fd_.get());
    if (entered) co_await transmit();
    fd_.reset();
}

void Connection::cut() {
    if (fd_) ::shutdown(fd_.get(), SHUT_RDWR);
}

Task<void> Connection::enforce_time_limit() {
    const bool expired = co_await time_limit_.after(limits_.handshake_max);
    if (!expired) co_return;
    log::debug("NBD client {}: no handshake within {} s, disconnected", peer_, limits_.handshake_max.count());
    cut();
}

Task<bool> Connection::negotiate() {
    std::array<uint8_t, kGreetingSize> greeting;
    encode_greeting(greeting.data(), kFlagFixedNewstyle | kFlagNoZeroes);
    bool alive = co_await send(greeting);
    std::array<uint8_t, kClientFlagsSize> flags;
    if (alive) alive = co_await receive(flags);
    if (!alive) co_return false;
    if (!handshake_.client_flags(load_big<uint32_t>(flags.data()))) {
        violation_ = "unknown client flags";
        co_return false;
    }
    std::vector<uint8_t> payload, out;
    for (unsigned options = 0; options < kMaxOptions; ++options) {
        std::array<uint8_t, kOptionHeaderSize> bytes;
        alive = co_await receive(bytes);
        if (!alive) co_return false;
        const OptionHeader header = decode_option(bytes.data());
        if (header.magic != kOptionMagic) {
            violation_ = "an option has a wrong magic number";
            co_return false;
        }
        out.clear();
        HandshakeStep step;
        if (header.length > kMaxSkippedOption) {
            violation_ = "an option is too long";
            co_return false;
        }
        if (header.length > kMaxOptionPayload) {
            alive = co_await skip(header.length);
            if (!alive) co_return false;
            step = good_bye_ ? refuse_option(header.option, out) : handshake_.oversized_option(header.option, out);
        } else {
            payload.resize(header.length);
            alive = co_await receive(payload);
            if (!alive) co_return false;
            step = good_bye_ ? refuse_option(header.option, out) : handshake_.option(header.option, payload, out);
        }
        ++options_;
        if (step == HandshakeStep::kEnter) {
            // In the same turn as the answer was made: the export cannot be gone, and from now on its removal cuts us
            // off.
            export_ = server_.find(handshake_.result().export_name);
            CHECK(export_, "an export that was just found exists");
            loop_ = &export_->attach(*this);
        }
        alive = co_await send(out);
        if (step == HandshakeStep::kEnter) {
            if (alive) co_return true;
            export_->detach(*this);
            export_ = nullptr;
            co_return false;
        }
        if (!alive || step == HandshakeStep::kClose) co_return false;
        if (step == HandshakeStep::kStartTls) {
            alive = co_await start_tls();
            if (!alive) co_return false;
        }
        // A client that floods options takes turns with everybody else.
        if (options >= 16) co_await sleep_for(std::chrono::nanoseconds(0));
    }
    violation_ = "too many options";
    co_return false;
}

Task<bool> Connection::start_tls() {
    // What follows STARTTLS in the clear is still in the socket: it goes to the TLS engine and nowhere else.
    auto stream = TlsStream::create(limits_.tls.object->credentials());
    if (!stream) {
        log::error("NBD client {}: {}", peer_, stream.error().message());
        co_return false;
    }
    const Result<> shaken = co_await (*stream)->handshake(fd_.get());
    if (!shaken) {
        // Who just went away is no news.
        if (shaken.error().kind() == ErrorKind::kShutdown) co_return false;
        violation_ = shaken.error().message();
        co_return false;
    }
    if (!limits_.tls.authz.empty()) {
        const Result<> allowed = co_await authorize(limits_.tls.authz, (*stream)->peer_name());
        if (!allowed) {
            violation_ = allowed.error().message();
            co_await (*stream)->bye(fd_.get());
            co_return false;
        }
    }
    tls_ = std::move(*stream);
    handshake_.enter_tls();
    log::debug("NBD client {} speaks {}{}{}", peer_, tls_->summary(), tls_->peer_name().empty() ? "" : " as ",
               tls_->peer_name());
    co_return true;
}

Task<void> Connection::transmit() {
    NbdExport& exp = *export_;
    log::info("NBD client {} connected to export '{}'", peer_, exp.name());
    SessionConfig config;
    config.structured = handshake_.result().structured;
    config.extended = handshake_.result().extended;
    config.contexts = handshake_.result().contexts;
    config.read_only = !exp.writable();
    config.memory_limit = limits_.memory;
    config.tls = tls_.get();
    block::Channel* channel = co_await exp.root().channel(*loop_);
    const SessionResult result =
        co_await run_on(*loop_, transmit_here(fd_.get(), channel, std::move(config), &counters_));
    if (result.end == SessionEnd::kViolation) violation_ = result.detail;
    const char* how = result.end == SessionEnd::kDisconnect ? "" : " without saying good-bye";
    log::info("NBD client {} left export '{}'{}", peer_, exp.name(), how);
    exp.detach(*this);
    export_ = nullptr;
}

void Connection::say_good_bye() {
    good_bye_ = true;
    counters_.good_bye.store(true, std::memory_order_relaxed);
}

json::object Connection::details() const {
    json::object info{{"address", peer_}};
    if (export_) {
        info["export"] = export_->id();
        info["name"] = export_->name();
    }
    if (tls_ && !tls_->peer_name().empty()) info["tls-subject"] = tls_->peer_name();
    if (const auto peer = peer_credentials(fd_.get())) {
        info["pid"] = peer->pid;
        info["uid"] = peer->uid;
        info["gid"] = peer->gid;
    }
    info["requests"] = counters_.requests.load(std::memory_order_relaxed);
    info["bytes-read"] = counters_.bytes_read.load(std::memory_order_relaxed);
    info["bytes-written"] = counters_.bytes_written.load(std::memory_order_relaxed);
    info["in-flight"] = counters_.in_flight.load(std::memory_order_relaxed);
    info["seconds"] = std::chrono::duration_cast<std::chrono::seconds>(Clock::now() - since_).count();
    return info;
}

Task<int> Connection::receive_some(std::span<uint8_t> into) {
    int n = 0;
    if (tls_) {
        n = co_await tls_->recv(fd_.get(), into.data(), into.size());
    } else {
        n = co_await io_recv(fd_.get(), into.data(), into.size());
    }
    co_return n;
}

Task<bool> Connection::receive(std::span<uint8_t> into) {
    size_t have = 0;
    while (have < into.size()) {
        const int n = co_await receive_some(into.subspan(have));
        if (n == -EINTR) continue;
        if (n <= 0) co_return false;
        have += static_cast<size_t>(n);
    }
    co_return true;
}

Task<bool> Connection::skip(uint64_t bytes) {
    std::vector<uint8_t> scratch(64u << 10);
    while (bytes > 0) {
        const size_t ask = static_cast<size_t>(std::min<uint64_t>(bytes, scratch.size()));
        const int n = co_await receive_some(std::span(scratch).first(ask));
        if (n == -EINTR) continue;
        if (n <= 0) co_return false;
        bytes -= static_cast<uint64_t>(n);
        co_await sleep_for(std::chrono::nanoseconds(0));
    }
    co_return true;
}

Task<bool> Connection::send(std::span<const uint8_t> bytes) {
    size_t sent = 0;
    while (sent < bytes.size()) {
        int n = 0;
        if (tls_) {
            n = co_await tls_->send(fd_.get(), bytes.data() + sent, bytes.size() - sent);
        } else {
            n = co_await io_send(fd_.get(), bytes.data() + sent, bytes.size() - sent);
        }
        if (n == -EINTR) continue;
        if (n <= 0) co_return false;
        sent += static_cast<size_t>(n);
    }
    co_return true;
}

}  // namespace gantry::nbd
