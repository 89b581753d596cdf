#include "cli/qmp_client.h"

#include <fmt/format.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <filesystem>

namespace gantry::cli {

Result<QmpClient> QmpClient::connect(const std::string& socket_path) {
    QmpClient client;
    client.path_ = socket_path;
    sockaddr_un addr{};
    addr.sun_family = AF_UNIX;
    if (socket_path.size() >= sizeof addr.sun_path) {
        return fail(ErrorKind::kInvalid, "Control socket '{}': the path is longer than {} bytes", socket_path,
                    sizeof addr.sun_path - 1);
    }
    std::memcpy(addr.sun_path, socket_path.data(), socket_path.size());
    client.fd_.reset(::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0));
    if (!client.fd_) return fail_errno(errno, "Control socket '{}'", socket_path);
    if (::connect(client.fd_.get(), reinterpret_cast<sockaddr*>(&addr), sizeof addr) != 0) {
        int e = errno;
        if (e == ECONNREFUSED)
            return fail_errno(e, "Control socket '{}' (nobody serves it: the daemon is gone)", socket_path);
        return fail_errno(e, "Control socket '{}'", socket_path);
    }
    TRY(json::object greeting, client.receive());
    const json::value* qmp = greeting.if_contains("QMP");
    if (!qmp || !qmp->is_object()) return fail(ErrorKind::kInvalid, "'{}' does not speak QMP", socket_path);
    if (const json::value* v = qmp->get_object().if_contains("version"); v && v->is_object())
        client.version_ = v->get_object();
    TRY(json::value ignored, client.execute("qmp_capabilities", {}));
    (void)ignored;
    return client;
}

Result<json::object> QmpClient::receive() {
    std::array<char, 65536> buffer;
    for (;;) {
        if (auto message = reader_.next()) {
            if (!*message) return std::unexpected(std::move(*message).error().context(fmt::format("'{}'", path_)));
            if ((*message)->is_object()) return std::move((*message)->get_object());
            return fail(ErrorKind::kInvalid, "'{}' sent something that is no QMP message", path_);
        }
        pollfd p{fd_.get(), POLLIN, 0};
        int ready = ::poll(&p, 1, kTimeoutSeconds * 1000);
        if (ready < 0 && errno == EINTR) continue;
        if (ready == 0) return fail(ErrorKind::kTimedOut, "'{}' gave no answer within {} s", path_, kTimeoutSeconds);
        ssize_t n = ::read(fd_.get(), buffer.data(), buffer.size());
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(errno, "Reading from '{}'", path_);
        if (n == 0) return fail(ErrorKind::kIo, "'{}' closed the connection", path_);
        reader_.feed(std::string_view(buffer.data(), static_cast<size_t>(n)));
    }
}

Result<json::value> QmpClient::execute(std::string_view command, json::object arguments) {
    json::object request{{"execute", command}};
    if (!arguments.empty()) request["arguments"] = std::move(arguments);
    std::string text = schema::to_json(request) + "\n";
    for (size_t at = 0; at < text.size();) {
        ssize_t n = ::send(fd_.get(), text.data() + at, text.size() - at, MSG_NOSIGNAL);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) return fail_errno(errno, "Writing to '{}'", path_);
        at += static_cast<size_t>(n);
    }
    for (;;) {
        TRY(json::object message, receive());
        if (json::value* value = message.if_contains("return")) return std::move(*value);
        if (const json::value* error = message.if_contains("error"); error && error->is_object()) {
            const json::value* desc = error->get_object().if_contains("desc");
            return fail(ErrorKind::kInvalid, "{}",
                        desc && desc->is_string() ? std::string(desc->get_string()) : "unknown error");
        }
        // An event.
    }
}

std::string control_directory() {
    if (const char* dir = ::getenv("RUNTIME_DIRECTORY"); dir && *dir) {
        std::string_view first = dir;
        return std::string(first.substr(0, first.find(':')));
    }
    if (const char* dir = ::getenv("XDG_RUNTIME_DIR"); dir && *dir) return std::string(dir) + "/gantry";
    if (::geteuid() == 0) return "/run/gantry";
    std::error_code ignored;
    return fmt::format("{}/gantry-{}", std::filesystem::temp_directory_path(ignored).string(), ::geteuid());
}

std::vector<std::string> find_control_sockets() {
    namespace fs = std::filesystem;
    std::vector<std::string> out;
    std::error_code error;
    fs::recursive_directory_iterator it(control_directory(), fs::directory_options::skip_permission_denied, error), end;
    for (; !error && it != end; it.increment(error)) {
        if (it.depth() > 1) it.disable_recursion_pending();
        if (it->path().extension() == ".qmp" && it->is_socket(error)) out.push_back(it->path().string());
    }
    std::ranges::sort(out);
    return out;
}

}  // namespace gantry::cli
