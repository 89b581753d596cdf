#include "qmp/session.h"

#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <cstring>

#include "qmp/command.h"
#include "qmp/monitor.h"
#include "runtime/log.h"
#include "runtime/timer.h"
#include "schema/schema.h"
#include "schema/unserved.h"
#include "schema/validate.h"

namespace gantry::qmp {

namespace {

constexpr size_t kMaxQueuedRequests = 8;               // then we stop reading, as the reference does
constexpr size_t kPauseAtOutput = size_t{1} << 20;     // then nothing more is executed until the client has read
constexpr size_t kMaxPassed = 16;                      // descriptors of one message; the kernel closes what is more
constexpr size_t kMaxQueuedOutput = size_t{64} << 20;  // events alone can get here: the client is dropped

std::string_view class_name(QmpClass c) {
    switch (c) {
        case QmpClass::kGenericError:
            return "GenericError";
        case QmpClass::kCommandNotFound:
            return "CommandNotFound";
        case QmpClass::kDeviceNotFound:
            return "DeviceNotFound";
        case QmpClass::kDeviceNotActive:
            return "DeviceNotActive";
        case QmpClass::kKvmMissingCap:
            return "KVMMissingCap";
    }
    return "GenericError";
}

/// The descriptors of a message, instead of those that nobody has asked for.
void take_passed(msghdr& message, std::vector<UniqueFd>& arrived) {
    std::vector<UniqueFd> came;
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c; c = CMSG_NXTHDR(&message, c)) {
        if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
        const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
        for (size_t i = 0; i < count; i++) {
            int fd;
            std::memcpy(&fd, CMSG_DATA(c) + i * sizeof fd, sizeof fd);
            came.emplace_back(fd);
        }
    }
    if (!came.empty()) arrived = std::move(came);
}

std::unexpected<Error> not_found(std::string text) {
    return std::unexpected(Error(ErrorKind::kNotFound, std::move(text)).with_class(QmpClass::kCommandNotFound));
}

}  // namespace

Session::Session(Services& services, int in, int out, bool pretty)
    : services_(services), in_(in), out_(out), pretty_(pretty) {
    services_.descriptors = &descriptors_;
    services_.resolve_fd = [this, shared = services.resolve_fd](std::string_view name) -> Result<UniqueFd> {
        if (UniqueFd own = descriptors_.take(name)) return own;
        return shared(name);
    };
}

Session::~Session() = default;

Task<void> Session::run() {
    queue_line({{"QMP", {{"version", version_info()}, {"capabilities", json::array{"oob"}}}}});
    scope_.spawn(execute_requests());
    scope_.spawn(write_output());
    co_await read_input();
    input_done_ = true;
    requests_changed_.notify_all();
    co_await scope_.join();
}

Task<void> Session::read_input() {
    auto chunk = std::make_unique<std::array<char, 16384>>();
    while (!closing_) {
        if (requests_.size() >= kMaxQueuedRequests) {
            co_await requests_changed_.wait();
            continue;
        }
        CancellableIo wait(io_poll(in_, POLLIN | POLLRDHUP));
        input_wait_ = &wait;
        int events = co_await wait;
        input_wait_ = nullptr;
        if (events < 0 || closing_) break;
        const ssize_t n = receive(*chunk);
        if (n == -EAGAIN || n == -EINTR) continue;
        if (n <= 0) break;
        reader_.feed(std::string_view(chunk->data(), static_cast<size_t>(n)));
        while (!closing_) {
            while (requests_.size() >= kMaxQueuedRequests && !closing_) co_await requests_changed_.wait();
            auto message = reader_.next();
            if (!message) break;
            handle_message(std::move(*message));
        }
        // Out-of-band answers are not bounded by the queue of requests; and whoever sends without pause takes turns.
        while (queued_bytes() > kPauseAtOutput && !closing_) co_await output_consumed_.wait();
        co_await sleep_for(std::chrono::nanoseconds(0));
    }
}

ssize_t Session::receive(std::span<char> into) {
    if (in_is_socket_) {
        iovec iov{into.data(), into.size()};
        alignas(cmsghdr) char control[CMSG_SPACE(kMaxPassed * sizeof(int))];
        msghdr message{};
        message.msg_iov = &iov;
        message.msg_iovlen = 1;
        message.msg_control = control;
        message.msg_controllen = sizeof control;
        const ssize_t n = ::recvmsg(in_, &message, MSG_CMSG_CLOEXEC);
        if (n >= 0) {
            take_passed(message, arrived_);
            return n;
        }
        if (errno != ENOTSOCK) return -errno;
        in_is_socket_ = false;
    }
    const ssize_t n = ::read(in_, into.data(), into.size());
    return n < 0 ? -errno : n;
}

void Session::handle_message(Result<json::value> message) {
    Request request;
    bool oob = false;
    if (!message) {
        request.malformed = std::move(message).error();
    } else if (!message->is_object()) {
        request.malformed = Error(ErrorKind::kInvalid, "QMP input must be a JSON object");
    } else {
        const json::object& object = message->get_object();
        if (const json::value* id = object.if_contains("id")) {
            request.id = *id;
            request.has_id = true;
        }
        if (auto parsed = parse_request(object, request, oob); !parsed) request.malformed = std::move(parsed).error();
    }
    if (oob && !request.malformed) {
        // Nothing may run out of band: the answer overtakes what is queued.
        if (schema::find_command(request.name)) {
            reply_error(request, Error(ErrorKind::kUnsupported,
                                       fmt::format("The command {} does not support OOB", request.name)));
        } else {
            reply_error(request, not_found(fmt::format("The command {} has not been found", request.name)).error());
        }
        return;
    }
    if (!arrived_.empty() && (request.name == "getfd" || request.name == "add-fd")) {
        request.passed = std::move(arrived_.front());
        arrived_.clear();
    }
    requests_.push_back(std::move(request));
    requests_changed_.notify_all();
}

Result<> Session::parse_request(const json::object& message, Request& request, bool& oob) const {
    const json::value* execute = nullptr;
    for (const auto& [key, value] : message) {
        if (key == "execute" || key == "exec-oob") {
            if (key == "exec-oob" && !oob_)
                return fail(ErrorKind::kInvalid, "QMP input member 'exec-oob' is unexpected");
            if (!value.is_string()) {
                return fail(ErrorKind::kInvalid, "QMP input member '{}' must be a string", std::string_view(key));
            }
            if (execute) return fail(ErrorKind::kInvalid, "QMP input member 'execute' clashes with 'exec-oob'");
            execute = &value;
            oob = key == "exec-oob";
        } else if (key == "arguments") {
            if (!value.is_object()) return fail(ErrorKind::kInvalid, "QMP input member 'arguments' must be an object");
            request.arguments = value.get_object();
        } else if (key != "id") {
            return fail(ErrorKind::kInvalid, "QMP input member '{}' is unexpected", std::string_view(key));
        }
    }
    if (!execute) return fail(ErrorKind::kInvalid, "QMP input lacks member 'execute'");
    request.name = std::string(execute->get_string());
    return {};
}

Task<void> Session::execute_requests() {
    for (;;) {
        while ((requests_.empty() || held_) && !input_done_ && !closing_) co_await requests_changed_.wait();
        while (queued_bytes() > kPauseAtOutput && !closing_) co_await output_consumed_.wait();
        if (requests_.empty() || closing_) break;
        if (held_) {
            if (input_done_) break;
            continue;
        }
        Request request = std::move(requests_.front());
        requests_.pop_front();
        requests_changed_.notify_all();
        executing_ = true;
        co_await execute_one(std::move(request));
        executing_ = false;
        if (held_) services_.monitors.command_done();
    }
    replies_done_ = true;
    output_changed_.notify_all();
}

Task<void> Session::execute_one(Request request) {
    if (request.malformed) {
        reply_error(request, *request.malformed);
        co_return;
    }
    if (request.name == "qmp_capabilities") {
        auto result = negotiate(request.arguments);
        reply(request, std::move(result));
        co_return;
    }
    if (!negotiated_) {
        reply(request, not_found("Expecting capabilities negotiation with 'qmp_capabilities'"));
        co_return;
    }
    descriptors_.passed = std::move(request.passed);
    Result<json::value> result = co_await execute(services_, request.name, std::move(request.arguments));
    descriptors_.passed.reset();
    reply(request, std::move(result));
}

Result<json::value> Session::negotiate(const json::object& arguments) {
    TRY(json::object valid, schema::validate_arguments(*schema::find_command("qmp_capabilities"), arguments));
    if (negotiated_) return not_found("Capabilities negotiation is already complete, command ignored");
    if (const json::value* enable = valid.if_contains("enable")) oob_ = !enable->get_array().empty();
    negotiated_ = true;
    return json::value(json::object());
}

void Session::reply(const Request& request, Result<json::value> result) {
    if (!result) {
        reply_error(request, result.error());
        return;
    }
    json::object line{{"return", std::move(*result)}};
    if (request.has_id) line["id"] = request.id;
    queue_line(line);
}

void Session::reply_error(const Request& request, const Error& error) {
    json::object line;
    if (request.has_id) line["id"] = request.id;
    line["error"] = {{"class", class_name(error.qmp_class())}, {"desc", error.message()}};
    queue_line(line);
}

void Session::send_event(const json::object& event) {
    if (negotiated_ && !closing_) queue_line(event);
}

void Session::queue_line(const json::object& line) {
    if (queued_bytes() > kMaxQueuedOutput) {
        log::warn("monitor: client does not read its events, disconnecting queued_bytes={}", queued_bytes());
        close();
        return;
    }
    if (pretty_) {
        for (char c : schema::to_json(line, schema::JsonLayout::kPretty)) {
            if (c == '\n') output_ += '\r';
            output_ += c;
        }
    } else {
        schema::write_json(output_, line);
    }
    output_ += "\r\n";
    output_changed_.notify_all();
}

Task<void> Session::write_output() {
    for (;;) {
        while (output_.empty() && !replies_done_ && !closing_) co_await output_changed_.wait();
        if (output_.empty()) break;
        chunk_ = std::exchange(output_, {});
        bool written = co_await write_chunk();
        chunk_.clear();
        output_consumed_.notify_all();
        if (!written) {
            close();
            break;
        }
    }
}

Task<bool> Session::write_chunk() {
    size_t written = 0;
    while (written < chunk_.size()) {
        ssize_t n = ::write(out_, chunk_.data() + written, chunk_.size() - written);
        if (n > 0) {
            written += static_cast<size_t>(n);
            continue;
        }
        if (n < 0 && errno == EINTR) continue;
        if (n == 0 || errno != EAGAIN || closing_) co_return false;
        CancellableIo wait(io_poll(out_, POLLOUT));
        output_wait_ = &wait;
        int events = co_await wait;
        output_wait_ = nullptr;
        if (closing_) continue;  // one last attempt: what fits still goes out
        if (events < 0 || (events & (POLLERR | POLLHUP))) co_return false;
    }
    co_return true;
}

void Session::hold_commands() { held_ = true; }

void Session::close() {
    if (closing_) return;
    closing_ = true;
    if (input_wait_) input_wait_->cancel();
    if (output_wait_) output_wait_->cancel();
    output_consumed_.notify_all();
    requests_changed_.notify_all();
    output_changed_.notify_all();
}

}  // namespace gantry::qmp
