#include "block/formats/image_reference.h"

#include <charconv>
#include <optional>

#include "block/node.h"
#include "schema/json_dialect.h"

namespace gantry::block {

namespace {

constexpr int kMaxNesting = 32;

struct Uri {
    std::string scheme, host, path, user;  // path with its leading slash; %XX decoded
    uint16_t port = 0;                     // 0: none
    std::string query;
};

int hex(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

std::string percent_decoded(std::string_view text) {
    std::string out;
    for (size_t i = 0; i < text.size(); i++) {
        if (text[i] == '%' && i + 2 < text.size() && hex(text[i + 1]) >= 0 && hex(text[i + 2]) >= 0) {
            out += static_cast<char>(hex(text[i + 1]) * 16 + hex(text[i + 2]));
            i += 2;
        } else {
            out += text[i];
        }
    }
    return out;
}

Result<uint16_t> parse_port(std::string_view text) {
    uint16_t port = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), port);
    if (error != std::errc() || end != text.data() + text.size() || port == 0) {
        return fail(ErrorKind::kInvalid, "'{}' is not a port number", text);
    }
    return port;
}

/// "host", "host:port", "[v6]:port".
Result<> split_authority(std::string_view text, Uri& uri) {
    if (const size_t at = text.rfind('@'); at != std::string_view::npos) {
        uri.user = percent_decoded(text.substr(0, at));
        text.remove_prefix(at + 1);
    }
    size_t colon = text.rfind(':');
    if (text.starts_with('[')) {
        const size_t close = text.find(']');
        if (close == std::string_view::npos) return fail(ErrorKind::kInvalid, "'{}' lacks the closing bracket", text);
        uri.host = text.substr(1, close - 1);
        colon = text.find(':', close);
    } else {
        uri.host = percent_decoded(text.substr(0, colon));
    }
    if (colon != std::string_view::npos) {
        TRY(uri.port, parse_port(text.substr(colon + 1)));
    }
    return {};
}

Result<Uri> parse_uri(std::string_view name) {
    Uri uri;
    const size_t colon = name.find("://");
    uri.scheme = name.substr(0, colon);
    std::string_view rest = name.substr(colon + 3);
    if (const size_t q = rest.find('?'); q != std::string_view::npos) {
        uri.query = rest.substr(q + 1);
        rest = rest.substr(0, q);
    }
    const size_t slash = rest.find('/');
    CHECK_OK(split_authority(rest.substr(0, slash), uri));
    if (slash != std::string_view::npos) uri.path = percent_decoded(rest.substr(slash));
    return uri;
}

std::optional<std::string> query_value(std::string_view query, std::string_view key) {
    while (!query.empty()) {
        const size_t end = query.find_first_of("&;");
        const std::string_view pair = query.substr(0, end);
        if (pair.size() > key.size() && pair.starts_with(key) && pair[key.size()] == '=') {
            return percent_decoded(pair.substr(key.size() + 1));
        }
        query = end == std::string_view::npos ? std::string_view() : query.substr(end + 1);
    }
    return std::nullopt;
}

json::object inet_server(std::string_view host, uint16_t port) {
    return {{"type", "inet"}, {"host", host}, {"port", fmt::format("{}", port)}};
}

json::object nbd_node(json::object server, std::string_view export_name) {
    json::object out{{"driver", "nbd"}, {"server", std::move(server)}};
    if (!export_name.empty()) out["export"] = export_name;
    return out;
}

Result<json::object> nbd_uri(std::string_view name) {
    TRY(const Uri uri, parse_uri(name));
    std::string_view export_name = uri.path;
    if (export_name.starts_with('/')) export_name.remove_prefix(1);
    if (uri.scheme == "nbd+unix") {
        const auto socket = query_value(uri.query, "socket");
        if (!socket || socket->empty()) return fail(ErrorKind::kInvalid, "'{}' names no socket", name);
        return nbd_node({{"type", "unix"}, {"path", *socket}}, export_name);
    }
    if (uri.scheme != "nbd" && uri.scheme != "nbd+tcp") {
        return fail(ErrorKind::kUnsupported, "Unknown protocol '{}'", uri.scheme);
    }
    return nbd_node(inet_server(uri.host.empty() ? "localhost" : uri.host, uri.port ? uri.port : 10809), export_name);
}

/// "nbd:unix:PATH[:exportname=X]", "nbd:HOST:PORT[:exportname=X]".
Result<json::object> nbd_old_form(std::string_view name) {
    std::string_view rest = name.substr(4);
    std::string_view export_name;
    if (const size_t at = rest.find(":exportname="); at != std::string_view::npos) {
        export_name = rest.substr(at + 12);
        rest = rest.substr(0, at);
    }
    if (rest.starts_with("unix:")) {
        if (rest.size() == 5) return fail(ErrorKind::kInvalid, "'{}' names no socket", name);
        return nbd_node({{"type", "unix"}, {"path", rest.substr(5)}}, export_name);
    }
    Uri uri;
    CHECK_OK(split_authority(rest, uri));
    if (uri.host.empty() || uri.port == 0) return fail(ErrorKind::kInvalid, "'{}' names no host and port", name);
    return nbd_node(inet_server(uri.host, uri.port), export_name);
}

Result<json::object> ssh_uri(std::string_view name) {
    TRY(const Uri uri, parse_uri(name));
    if (uri.host.empty() || uri.path.empty()) return fail(ErrorKind::kInvalid, "'{}' names no host and path", name);
    json::object out{{"driver", "ssh"},
                     {"server", {{"host", uri.host}, {"port", fmt::format("{}", uri.port ? uri.port : 22)}}},
                     {"path", uri.path}};
    if (!uri.user.empty()) out["user"] = uri.user;
    return out;
}

std::string_view protocol_of(std::string_view name) { return name.substr(0, name.find(':')); }

/// Puts `value` at the dotted `key`.
Result<> put_nested(json::object& into, std::string_view key, json::value value, int depth) {
    if (depth > kMaxNesting) return fail(ErrorKind::kInvalid, "the description is nested too deeply");
    const size_t dot = key.find('.');
    if (dot == std::string_view::npos) {
        if (json::value* there = into.if_contains(key); there && there->is_object() && value.is_object()) {
            for (auto& member : value.get_object()) {
                CHECK_OK(put_nested(there->get_object(), member.key(), std::move(member.value()), depth + 1));
            }
            return {};
        }
        into[key] = std::move(value);
        return {};
    }
    json::value& inner = into[key.substr(0, dot)];
    if (inner.is_null()) inner = json::object();
    if (!inner.is_object()) return fail(ErrorKind::kInvalid, "'{}' contradicts another member", key);
    return put_nested(inner.get_object(), key.substr(dot + 1), std::move(value), depth + 1);
}

Result<json::value> clean(json::value value, int depth);

Result<json::object> clean_object(json::object object, int depth) {
    if (depth > kMaxNesting) return fail(ErrorKind::kInvalid, "the description is nested too deeply");
    json::object out;
    for (auto& member : object) {
        const std::string_view key = member.key();
        const std::string_view last = key.substr(key.rfind('.') + 1);
        if (last == "node-name") continue;
        // What an image refers to is read, whatever it says itself.
        if (last == "read-only" || last == "auto-read-only") continue;
        const bool is_child = last == "file" || last == "backing" || last == "data-file" || last == "target" ||
                              last == "image" || last == "raw" || last == "test" || last == "log" || last == "header";
        if (is_child && member.value().is_string() && !member.value().get_string().empty()) {
            return fail(ErrorKind::kPermission,
                        "a name stored in an image may not refer to the node '{}' (member '{}')",
                        std::string_view(member.value().get_string()), key);
        }
        if (last == "children" && member.value().is_array()) {
            for (const json::value& child : member.value().get_array()) {
                if (child.is_string()) {
                    return fail(ErrorKind::kPermission,
                                "a name stored in an image may not refer to the node '{}' (member '{}')",
                                std::string_view(child.get_string()), key);
                }
            }
        }
        TRY(json::value cleaned, clean(std::move(member.value()), depth + 1));
        CHECK_OK(put_nested(out, key, std::move(cleaned), depth));
    }
    return out;
}

Result<json::value> clean(json::value value, int depth) {
    if (value.is_object()) {
        TRY(json::object object, clean_object(std::move(value.get_object()), depth));
        return json::value(std::move(object));
    }
    if (value.is_array()) {
        if (depth > kMaxNesting) return fail(ErrorKind::kInvalid, "the description is nested too deeply");
        for (json::value& element : value.get_array()) {
            TRY(element, clean(std::move(element), depth + 1));
        }
    }
    return value;
}

}  // namespace

bool has_protocol_prefix(std::string_view name) {
    const size_t colon = name.find_first_of(":/");
    return colon != std::string_view::npos && colon != 0 && name[colon] == ':';
}

Result<std::string> resolve_image_name(std::string_view image_filename, std::string_view name) {
    if (name.starts_with('/') || has_protocol_prefix(name)) return std::string(name);
    if (image_filename.starts_with("json:")) {
        return fail(ErrorKind::kInvalid, "'{}' is relative, but the image has no directory: it is known as {}", name,
                    image_filename);
    }
    // The query of a URL belongs to the image alone.
    if (has_protocol_prefix(image_filename)) image_filename = image_filename.substr(0, image_filename.find('?'));
    const size_t slash = image_filename.rfind('/');
    if (slash != std::string_view::npos) return std::string(image_filename.substr(0, slash + 1)).append(name);
    const size_t colon = has_protocol_prefix(image_filename) ? image_filename.find(':') + 1 : 0;
    return std::string(image_filename.substr(0, colon)).append(name);
}

Result<std::string> resolve_local_name(std::string_view image_filename, std::string_view name) {
    if (name.starts_with('/')) return std::string(name);
    if (has_protocol_prefix(image_filename)) {
        return fail(ErrorKind::kInvalid, "'{}' is relative, but the image has no directory here: it is known as {}",
                    name, image_filename);
    }
    const size_t slash = image_filename.rfind('/');
    return std::string(image_filename.substr(0, slash == std::string_view::npos ? 0 : slash + 1)).append(name);
}

Result<json::object> protocol_options(std::string_view name) {
    if (name.empty()) return fail(ErrorKind::kInvalid, "the name is empty");
    if (!has_protocol_prefix(name)) return json::object{{"driver", "file"}, {"filename", name}};
    const std::string_view protocol = protocol_of(name);
    if (protocol == "file" || protocol == "host_device" || protocol == "host_cdrom") {
        return json::object{{"driver", protocol}, {"filename", name.substr(protocol.size() + 1)}};
    }
    if (protocol == "http" || protocol == "https" || protocol == "ftp" || protocol == "ftps") {
        return json::object{{"driver", protocol}, {"url", name}};
    }
    const bool is_uri = name.substr(protocol.size()).starts_with("://");
    if (protocol == "nbd" && !is_uri) return nbd_old_form(name);
    if (is_uri && protocol.starts_with("nbd")) return nbd_uri(name);
    if (is_uri && protocol == "ssh") return ssh_uri(name);
    return fail(ErrorKind::kUnsupported, "Unknown protocol '{}'", protocol);
}

std::string own_file_name(const Node& file) {
    std::string name = file.filename();
    for (const Node* node = &file; name.starts_with("json:");) {
        const Child* below = node->child("file");
        if (!below) break;
        node = below->node.get();
        name = node->filename();
    }
    return name;
}

Result<json::object> json_name_options(std::string_view name) {
    if (!name.starts_with("json:")) return fail(ErrorKind::kInvalid, "'{}' does not begin with json:", name);
    auto parsed = schema::parse_json(name.substr(5));
    if (!parsed) return fail(ErrorKind::kInvalid, "Could not parse the JSON options: {}", parsed.error().message());
    if (!parsed->is_object()) return fail(ErrorKind::kInvalid, "Invalid JSON object given");
    return clean_object(std::move(parsed->get_object()), 0);
}

}  // namespace gantry::block
