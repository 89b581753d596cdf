// Handshake: the option phase of one connection as a pure state machine. No I/O: bytes in, bytes out.

#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "nbd/meta_context.h"
#include "nbd/protocol.h"

namespace gantry::nbd {

/// What a client is told about an export.
struct ExportFacts {
    std::string name;
    std::string description;
    uint64_t size = 0;
    uint16_t flags = 0;  // transmission flags; Handshake::transmission_flags() adds what depends on the connection
    uint32_t minimum_block = 1;
    uint32_t preferred_block = 4096;
    uint32_t maximum_payload = kMaxPayload;
    std::shared_ptr<const ContextList> contexts = base_contexts();
};

/// The exports as the handshake sees them.
class ExportDirectory {
  public:
    virtual ~ExportDirectory() = default;
    virtual std::optional<ExportFacts> find(std::string_view name) const = 0;
    /// Name and description of every visible export.
    struct Listed {
        std::string name, description;
    };
    virtual std::vector<Listed> list() const = 0;
};

/// What happens after an option.
enum class HandshakeStep : uint8_t {
    kContinue,  // send the output, next option
    kEnter,     // send the output, then transmission with result()
    kStartTls,  // send the output, then the TLS handshake, enter_tls(), next option
    kClose,     // send the output, then close
};

/// spec/nbd.md section 4.1.
enum class TlsMode : uint8_t {
    kNone,      // there are no credentials
    kOptional,  // STARTTLS is there for who wants it
    kRequired,  // nothing else works before it
};

/// What transmission needs to know.
struct Negotiated {
    std::string export_name;
    bool structured = false;  // or extended
    bool extended = false;    // headers
    ContextList contexts;
};

/// The replies of one option.
class OptionOutput {
  public:
    OptionOutput(uint32_t option, std::vector<uint8_t>& out) : option_(option), out_(out) {}
    void reply(uint32_t type, std::span<const uint8_t> payload = {});
    /// `text` is cut to what the protocol allows.
    void error(uint32_t type, std::string_view text);
    void ack() { reply(kRepAck); }
    /// Bytes outside of an option reply (the answer to EXPORT_NAME).
    void raw(std::span<const uint8_t> bytes) { out_.insert(out_.end(), bytes.begin(), bytes.end()); }

  private:
    uint32_t option_;
    std::vector<uint8_t>& out_;
};

/// Own loop of its connection only.
class Handshake {
  public:
    explicit Handshake(const ExportDirectory& exports, TlsMode tls = TlsMode::kNone) : exports_(exports), tls_(tls) {}

    /// False: the connection ends (unknown bits).
    [[nodiscard]] bool client_flags(uint32_t flags);
    /// One option with its whole payload (at most kMaxOptionPayload bytes). Appends the answer to `out`.
    HandshakeStep option(uint32_t number, std::span<const uint8_t> payload, std::vector<uint8_t>& out);
    /// An option whose payload (over kMaxOptionPayload bytes) was skipped.
    HandshakeStep oversized_option(uint32_t number, std::vector<uint8_t>& out);
    /// After kEnter.
    const Negotiated& result() const { return result_; }

    // For the option handlers (opt_*.cc).
    const ExportDirectory& exports() const { return exports_; }
    /// Structured replies or more.
    bool structured() const { return structured_ || extended_; }
    void set_structured() { structured_ = true; }
    bool extended() const { return extended_; }
    void set_extended() { extended_ = true; }
    TlsMode tls() const { return tls_; }
    /// Inside TLS.
    bool secure() const { return secure_; }
    /// The TLS handshake is done: nothing that was said in the clear counts any more.
    void enter_tls() {
        secure_ = true;
        structured_ = extended_ = false;
        selection_.clear();
    }
    bool no_zeroes() const { return no_zeroes_; }
    ContextSelection& selection() { return selection_; }
    /// Fixes the result for `export_name`; contexts chosen for another export do not count.
    HandshakeStep enter(std::string export_name);
    /// The transmission flags on this connection of the export that the client calls `name`.
    uint16_t transmission_flags(std::string_view name, const ExportFacts& facts) const;

  private:
    /// The selection was made for this very export: another one may have taken its name since.
    bool selected(std::string_view name, const ExportFacts& facts) const {
        return selection_.export_name == name && selection_.offered == facts.contexts;
    }
    bool refuse_in_the_clear(uint32_t number, OptionOutput& output, HandshakeStep& step) const;

    const ExportDirectory& exports_;
    const TlsMode tls_;
    bool secure_ = false;
    bool fixed_ = false;
    bool no_zeroes_ = false;
    bool structured_ = false;
    bool extended_ = false;
    ContextSelection selection_;
    Negotiated result_;
};

}  // namespace gantry::nbd
