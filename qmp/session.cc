#include "qmp/session.h"

#include <poll.h>
#include <unistd.h>

#include <array>

#include "qmp/command.h"
#include "runtime/log.h"
#include "schema/schema.h"
#include "schema/unserved.h"
#include "schema/validate.h"

namespace gantry::qmp {

namespace {

constexpr size_t kMaxQueuedRequests = 8;               // then we stop reading, as the reference does
constexpr size_t kMaxQueuedOutput = size_t{64} << 20;  // a client that never reads is dropped beyond this

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

std::unexpected<Error> not_found(std::string text) {
    return std::unexpected(Error(ErrorKind::kNotFound, std::move(text)).with_class(QmpClass::kCommandNotFound));
}

}  // namespace

Session::Session(Services& services, int in, int out, bool pretty)
    : services_(services), in_(in), out_(out), pretty_(pretty) {}

Session::~Session() = default;

Task<void> Session::run() {
    queue_line({{"QMP", {{"version", version_info()}, {"capabilities", json::array{"oob"}}}}});
    scope_.spawn(execute_requests());
    scope_.spawn(write_output());
    co_await read_input();
    input_done_ = true;
    requests_changed_.notify_all();
    output_changed_.notify_all();
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
        ssize_t n = ::read(in_, chunk->data(), chunk->size());
        if (n < 0 && (errno == EAGAIN || errno == EINTR)) continue;
        if (n <= 0) break;
        reader_.feed(std::string_view(chunk->data(), static_cast<size_t>(n)));
        while (!closing_) {
            while (requests_.size() >= kMaxQueuedRequests && !closing_) co_await requests_changed_.wait();
            auto message = reader_.next();
            if (!message) break;
            handle_message(std::move(*message));
        }
    }
}

void Session::handle_message(Result<json::value> message) {
    Request request;
    if (!message) {
        reply_error(request, message.error());
        return;
    }
    if (!message->is_object()) {
        reply_error(request, Error(ErrorKind::kInvalid, "QMP input must be a JSON object"));
        return;
    }
    const json::object& object = message->get_object();
    if (const json::value* id = object.if_contains("id")) {
        request.id = *id;
        request.has_id = true;
    }
    bool oob = false;
    if (auto parsed = parse_request(object, request, oob); !parsed) {
        reply_error(request, parsed.error());
        return;
    }
    if (oob) {
        // Nothing may run out of band: the answer overtakes what is queued.
        if (schema::find_command(request.name)) {
            reply_error(request, Error(ErrorKind::kUnsupported,
                                       fmt::format("The command {} does not support OOB", request.name)));
        } else {
            reply_error(request, not_found(fmt::format("The command {} has not been found", request.name)).error());
        }
        return;
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
        while (requests_.empty() && !input_done_ && !closing_) co_await requests_changed_.wait();
        if (requests_.empty() || closing_) break;
        Request request = std::move(requests_.front());
        requests_.pop_front();
        requests_changed_.notify_all();
        co_await execute_one(std::move(request));
    }
    input_done_ = true;
    output_changed_.notify_all();
}

Task<void> Session::execute_one(Request request) {
    if (request.name == "qmp_capabilities") {
        auto result = negotiate(request.arguments);
        reply(request, std::move(result));
        co_return;
    }
    if (!negotiated_) {
        reply(request, not_found("Expecting capabilities negotiation with 'qmp_capabilities'"));
        co_return;
    }
    Result<json::value> result = co_await execute(services_, request.name, std::move(request.arguments));
    reply(request, std::move(result));
}

Result<json::value> Session::negotiate(const json::object& arguments) {
    if (negotiated_) return not_found("Capabilities negotiation is already complete, command ignored");
    TRY(json::object valid, schema::validate_arguments(*schema::find_command("qmp_capabilities"), arguments));
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
    if (output_.size() > kMaxQueuedOutput) {
        log::warn("monitor: client does not read its replies, disconnecting queued_bytes={}", output_.size());
        close();
        return;
    }
    schema::write_json(output_, line, pretty_ ? schema::JsonLayout::kPretty : schema::JsonLayout::kOneLine);
    output_ += "\r\n";
    output_changed_.notify_all();
}

Task<void> Session::write_output() {
    for (;;) {
        while (output_.empty() && !input_done_ && !closing_) co_await output_changed_.wait();
        if (output_.empty()) break;
        std::string chunk = std::exchange(output_, {});
        size_t written = 0;
        while (written < chunk.size()) {
            ssize_t n = ::write(out_, chunk.data() + written, chunk.size() - written);
            if (n > 0) {
                written += static_cast<size_t>(n);
            } else if (errno == EAGAIN && !closing_) {
                int events = co_await io_poll(out_, POLLOUT);
                if (events < 0 || (events & (POLLERR | POLLHUP))) break;
            } else if (errno != EINTR) {
                break;
            }
        }
        if (written < chunk.size()) {
            close();
            break;
        }
    }
}

void Session::close() {
    if (closing_) return;
    closing_ = true;
    if (input_wait_) input_wait_->cancel();
    requests_changed_.notify_all();
    output_changed_.notify_all();
}

}  // namespace gantry::qmp
