// Session: one QMP client (spec/qmp.md section 1).

#pragma once

#include <deque>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qmp/descriptors.h"
#include "qmp/services.h"
#include "runtime/io.h"
#include "runtime/sync.h"
#include "runtime/task_scope.h"
#include "runtime/unique_fd.h"
#include "schema/json_dialect.h"

namespace gantry::qmp {

/// Reads requests, runs them one at a time in order, writes replies and events. Main loop only.
class Session {
  public:
    /// `in` and `out` may be the same descriptor; non-blocking. `owns`: closes them at the end.
    Session(Services& services, int in, int out, bool pretty);
    ~Session();

    /// Serves the client until it leaves or close() is called.
    Task<void> run();
    /// Queues an event line when the client has left negotiation.
    void send_event(const json::object& event);
    /// No further command begins; one that runs goes on, events still go out.
    void hold_commands();
    bool executing() const { return executing_; }
    /// What this client has passed under a name, given away; invalid: nothing.
    UniqueFd take_descriptor(std::string_view name) { return descriptors_.take(name); }
    /// Ends run() soon; what is queued for the client is still written if it takes it at once.
    void close();

  private:
    struct Request {
        std::string name;
        json::object arguments;
        json::value id;
        bool has_id = false;
        std::optional<Error> malformed;  // answered in its turn, like a command
        UniqueFd passed;                 // came with it
    };

    Task<void> read_input();
    /// read(2), or recvmsg(2) on a unix socket, where descriptors may come along. -errno.
    ssize_t receive(std::span<char> into);
    Task<void> execute_requests();
    Task<void> write_output();
    /// Writes chunk_; false when the client is gone or close() was called and it takes no more.
    Task<bool> write_chunk();
    void handle_message(Result<json::value> message);
    /// Fills `request`; an error is for the client. `oob` is set for exec-oob.
    Result<> parse_request(const json::object& message, Request& request, bool& oob) const;
    Task<void> execute_one(Request request);
    Result<json::value> negotiate(const json::object& arguments);
    void reply(const Request& request, Result<json::value> result);
    void reply_error(const Request& request, const Error& error);
    void queue_line(const json::object& line);
    size_t queued_bytes() const { return output_.size() + chunk_.size(); }

    MonitorDescriptors descriptors_;
    std::vector<UniqueFd> arrived_;  // with the last message that brought some; for the next command that takes one
    Services services_;              // with descriptors_
    int in_;
    bool in_is_socket_ = true;
    int out_;
    bool pretty_;
    bool negotiated_ = false;
    bool oob_ = false;
    bool closing_ = false;
    bool held_ = false;  // no further command begins
    bool executing_ = false;
    bool input_done_ = false;               // nothing more comes
    bool replies_done_ = false;             // and everything that came is answered
    CancellableIo* input_wait_ = nullptr;   // while read_input() sleeps
    CancellableIo* output_wait_ = nullptr;  // while write_chunk() sleeps
    schema::JsonReader reader_;
    std::deque<Request> requests_;
    WaitQueue requests_changed_;
    std::string output_;         // not yet being written
    std::string chunk_;          // being written
    WaitQueue output_changed_;   // more to write, or the end
    WaitQueue output_consumed_;  // the client has read something
    TaskScope scope_;
};

}  // namespace gantry::qmp
