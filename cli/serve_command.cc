// gantry serve IMAGE: one image over NBD (and as a file, and as a disk of virtual machines), until interrupted.

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <cstdio>

#include "cli/commands.h"
#include "cli/daemon.h"
#include "cli/guest_hints.h"
#include "cli/made_file.h"
#include "cli/opened_image.h"
#include "cli/qmp_client.h"
#include "fuse/mount.h"
#include "runtime/log.h"
#include "schema/json_dialect.h"

namespace gantry::cli {

namespace {

constexpr OptionSpec kOptions[] = {
    {"format", 'f', true, "raw|qcow2", "the image format (default: found out from its first bytes)"},
    {"write", 'w', false, "", "let clients write; a raw image then needs --format raw"},
    {"name", 0, true, "NAME", "export name (default: the default export, \"\")"},
    {"description", 0, true, "TEXT", "what clients see next to the name"},
    {"snapshot", 0, true, "ID|NAME", "an internal snapshot of a qcow2 image"},
    {"socket", 0, true, "PATH", "listen on this unix socket (default: one in the runtime directory)"},
    {"tcp", 0, true, "[ADDRESS:]PORT",
     "listen on TCP; without --tls or --insecure on the loopback address only. --socket and --tcp may be given "
     "together and "
     "more than once"},
    {"file", 0, true, "FILE", "also show it as this raw file, which is made when it does not exist"},
    {"vhost-user", 0, true, "SOCK",
     "also offer it to a virtual machine as a vhost-user-blk disk on this unix socket; may be given more than once, "
     "with --write once"},
    {"queues", 0, true, "N", "queues of the disk of --vhost-user, 1 to 64 (default: one for each thread, at most 8)"},
    {"tls", 0, true, "DIR", "clients must use TLS, with the files that 'gantry tls init DIR' has made"},
    {"insecure", 0, false, "", "allow unencrypted TCP on other addresses"},
    {"io-backend", 0, true, "auto|io_uring|epoll", "how to do I/O"},
    {"io-loops", 0, true, "N", "threads that serve clients"},
    {"help", 'h', false, "", "show this"},
};

struct ServeOptions {
    std::string image, format, name, description, snapshot, tls, file;
    std::vector<std::string> sockets, tcps, vhost_users;
    unsigned queues = 0;  // of a vhost-user-blk disk; 0: not said
    bool write = false, insecure = false;
    bool psk = false;  // the directory of --tls holds keys, not certificates
    RuntimeOptions runtime;
};

struct Listen {
    json::object address;
    std::string uri_prefix, uri_suffix;
};

Result<std::string> private_directory() {
    std::string directory = control_directory();
    if (::mkdir(directory.c_str(), 0700) != 0 && errno != EEXIST)
        return fail_errno(errno, "Runtime directory '{}'", directory);
    struct stat st{};
    if (::stat(directory.c_str(), &st) != 0) return fail_errno(errno, "Runtime directory '{}'", directory);
    if (st.st_uid != ::geteuid()) {
        return fail(ErrorKind::kPermission,
                    "Runtime directory '{}' belongs to uid {}, not to us; set XDG_RUNTIME_DIR or use --socket",
                    directory, st.st_uid);
    }
    return directory;
}

/// A part of a URI: everything but unreserved characters and '/' becomes %XX (RFC 3986 section 2).
std::string uri_escape(std::string_view text) {
    constexpr std::string_view kPlain = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/";
    std::string out;
    for (char c : text) {
        out += kPlain.find(c) != std::string_view::npos ? std::string(1, c)
                                                        : fmt::format("%{:02X}", static_cast<unsigned char>(c));
    }
    return out;
}

bool is_loopback(std::string_view host) { return host == "localhost" || host == "::1" || host.starts_with("127."); }

/// "nbd" and this: "://", or "s://" and the identity of pre-shared keys that 'gantry tls' makes by default.
std::string_view scheme_suffix(const ServeOptions& options) {
    if (options.tls.empty()) return "://";
    return options.psk ? "s://qemu@" : "s://";
}

/// What a client on this machine adds to the URI; elsewhere the files are in another place.
std::string tls_query(const ServeOptions& options, bool tcp) {
    if (options.tls.empty()) return {};
    std::string out(tcp ? "?" : "&");
    if (options.psk) return out + fmt::format("tls-psk-file={}/keys.psk", uri_escape(options.tls));
    return out + fmt::format("tls-certificates={}{}", uri_escape(options.tls), tcp ? "" : "&tls-hostname=localhost");
}

Result<Listen> tcp_address(const ServeOptions& options, const std::string& tcp) {
    const bool open = options.insecure || !options.tls.empty();
    std::string host = open ? "::" : "127.0.0.1", port = tcp;
    if (size_t colon = tcp.rfind(':'); colon != std::string::npos) {
        host = tcp.substr(0, colon);
        port = tcp.substr(colon + 1);
        if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);
    }
    if (!open && !is_loopback(host)) {
        return fail(ErrorKind::kPermission,
                    "Serving on '{}' would be unencrypted and open to everybody who reaches it; use a loopback "
                    "address, --tls, or --insecure",
                    host);
    }
    Listen listen;
    listen.address = {{"type", "inet"}, {"host", host}, {"port", port}};
    bool v6 = host.find(':') != std::string::npos;
    std::string shown = host == "::" ? "HOST" : v6 ? fmt::format("[{}]", host) : host;
    listen.uri_prefix = fmt::format("nbd{}{}{}/", scheme_suffix(options), shown, port == "10809" ? "" : ":" + port);
    return listen;
}

std::string absolute(const std::string& path) {
    if (path.starts_with('/')) return path;
    const std::unique_ptr<char, decltype(&::free)> cwd(::getcwd(nullptr, 0), &::free);
    return cwd ? fmt::format("{}/{}", cwd.get(), path) : path;
}

Result<Listen> unix_address(const ServeOptions& options, std::string path) {
    if (path.empty()) {
        TRY(std::string directory, private_directory());
        path = fmt::format("{}/{}.nbd", directory, ::getpid());
    } else {
        path = absolute(path);
    }
    Listen listen;
    listen.address = {{"type", "unix"}, {"path", path}};
    listen.uri_prefix = options.tls.empty() ? "nbd+unix:///" : options.psk ? "nbds+unix://qemu@/" : "nbds+unix:///";
    listen.uri_suffix = "?socket=" + uri_escape(path);
    return listen;
}

Result<std::vector<Listen>> listen_addresses(const ServeOptions& options) {
    std::vector<Listen> all;
    for (const std::string& path : options.sockets) {
        TRY(Listen listen, unix_address(options, path));
        all.push_back(std::move(listen));
    }
    for (const std::string& tcp : options.tcps) {
        TRY(Listen listen, tcp_address(options, tcp));
        all.push_back(std::move(listen));
    }
    if (all.empty()) {
        TRY(Listen listen, unix_address(options, ""));
        all.push_back(std::move(listen));
    }
    return all;
}

/// Queues of the disk of a virtual machine.
unsigned queues_of(const ServeOptions& options) {
    if (options.queues != 0) return options.queues;
    return std::clamp(options.runtime.io_loops, 1U, 8U);
}

/// The vhost-user-blk disks.
Result<> add_disks(Daemon& daemon, const ServeOptions& options, const std::string& node) {
    for (size_t i = 0; i < options.vhost_users.size(); ++i) {
        const std::string id = i == 0 ? "guest" : fmt::format("guest{}", i + 1);
        TRY(auto added, daemon.execute("block-export-add",
                                       {{"type", "vhost-user-blk"},
                                        {"id", id},
                                        {"node-name", node},
                                        {"writable", options.write},
                                        {"num-queues", queues_of(options)},
                                        {"addr", {{"type", "unix"}, {"path", absolute(options.vhost_users[i])}}}}));
        (void)added;
    }
    return {};
}

/// The URIs of the export.
Result<std::vector<std::string>> set_up(Daemon& daemon, const ServeOptions& options) {
    TRY(const std::string node,
        open_image(daemon, {options.image, options.format, options.snapshot, options.write, {}}));
    TRY(const std::vector<Listen> listens, listen_addresses(options));
    json::array addresses;
    for (const Listen& listen : listens) addresses.push_back(listen.address);
    json::object server{{"addr", std::move(addresses)}};
    if (!options.tls.empty()) {
        TRY(auto made, daemon.execute("object-add", {{"qom-type", options.psk ? "tls-creds-psk" : "tls-creds-x509"},
                                                     {"id", "tls"},
                                                     {"endpoint", "server"},
                                                     {"dir", options.tls}}));
        (void)made;
        server["tls-creds"] = "tls";
    }
    TRY(auto started, daemon.execute("nbd-server-start", std::move(server)));
    json::object e{
        {"type", "nbd"}, {"id", "disk"}, {"node-name", node}, {"name", options.name}, {"writable", options.write}};
    if (!options.description.empty()) e["description"] = options.description;
    TRY(auto exported, daemon.execute("block-export-add", std::move(e)));
    if (!options.file.empty()) {
        TRY(auto shown, daemon.execute("block-export-add", {{"type", "fuse"},
                                                            {"id", "file"},
                                                            {"node-name", node},
                                                            {"mountpoint", options.file},
                                                            {"writable", options.write}}));
        (void)shown;
    }
    CHECK_OK(add_disks(daemon, options, node));
    CHECK_OK(daemon.apply({"control-socket", "auto"}));
    (void)started, (void)exported;
    std::vector<std::string> uris;
    for (const Listen& listen : listens) {
        uris.push_back(listen.uri_prefix + uri_escape(options.name) + listen.uri_suffix +
                       tls_query(options, listen.uri_suffix.empty()));
    }
    return uris;
}

void print_hints(const ServeOptions& options, const std::vector<std::string>& uris) {
    std::printf("Serving %s (%s) at\n\n", options.image.c_str(), options.write ? "read-write" : "read-only");
    for (const std::string& each : uris) std::printf("    %s\n", each.c_str());
    if (!options.file.empty()) std::printf("\nand as the file\n\n    %s\n", options.file.c_str());
    for (const std::string& socket : options.vhost_users) {
        std::printf("\nand as the disk of a virtual machine on %s\n\n%s", absolute(socket).c_str(),
                    guest_hints(absolute(socket), queues_of(options)).c_str());
    }
    std::printf("\nTry:\n");
    const std::string& uri = uris.front();
    std::printf("    nbdinfo '%s'\n", uri.c_str());
    std::printf("    nbdcopy '%s' copy.img\n", uri.c_str());
    // Its URIs have no place for the files of TLS.
    if (options.tls.empty()) std::printf("    qemu-img info '%s'\n", uri.c_str());
    std::printf("    gantry status\n\nCtrl-C ends it.\n");
    std::fflush(stdout);
}

/// The directory as an absolute path, and what is in it.
Result<std::string> tls_directory(const std::string& given, bool& psk) {
    const std::unique_ptr<char, decltype(&::free)> path(::realpath(given.c_str(), nullptr), &::free);
    if (!path) return fail_errno(errno, "Directory of --tls '{}'", given);
    const std::string directory = path.get();
    const bool x509 = ::access((directory + "/server-cert.pem").c_str(), F_OK) == 0;
    psk = !x509 && ::access((directory + "/keys.psk").c_str(), F_OK) == 0;
    if (!x509 && !psk) {
        return fail(ErrorKind::kNotFound,
                    "'{}' has neither server-cert.pem nor keys.psk; 'gantry tls init {}' makes what is needed", given,
                    given);
    }
    return directory;
}

Result<unsigned> number_between(const std::string& text, unsigned least, unsigned most, std::string_view of_what) {
    unsigned number = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
    if (error != std::errc() || *end != '\0' || number < least || number > most) {
        return fail(ErrorKind::kInvalid, "'{}' is no number of {} from {} to {}", text, of_what, least, most);
    }
    return number;
}

Result<ServeOptions> parse(std::span<const char* const> arguments, bool& help) {
    ServeOptions out;
    out.runtime.io_loops = default_io_loops();
    std::vector<const char*> words;
    bool value_follows = false;
    for (const char* raw : arguments) {
        std::string_view word = raw;
        bool is_option = value_follows || (word.starts_with("-") && word.size() > 1);
        value_follows = false;
        if (!is_option) {
            if (!out.image.empty())
                return fail(ErrorKind::kInvalid, "one image at a time: '{}' and '{}' were given", out.image, word);
            out.image = word;
            continue;
        }
        words.push_back(raw);
        for (const OptionSpec& spec : kOptions) {
            if (spec.takes_value && (word == fmt::format("--{}", spec.name) ||
                                     (spec.short_name && word == fmt::format("-{}", spec.short_name)))) {
                value_follows = true;
            }
        }
    }
    TRY(auto parsed, parse_options(kOptions, words));
    for (const OptionUse& option : parsed) {
        if (option.name == "help") help = true;
        if (option.name == "format") out.format = option.value;
        if (option.name == "write") out.write = true;
        if (option.name == "insecure") out.insecure = true;
        if (option.name == "name") out.name = option.value;
        if (option.name == "file") out.file = option.value;
        if (option.name == "description") out.description = option.value;
        if (option.name == "snapshot") out.snapshot = option.value;
        if (option.name == "socket") out.sockets.push_back(option.value);
        if (option.name == "vhost-user") out.vhost_users.push_back(option.value);
        if (option.name == "queues") {
            TRY(out.queues, number_between(option.value, 1, 64, "queues"));
        }
        if (option.name == "tcp") out.tcps.push_back(option.value);
        if (option.name == "tls") {
            TRY(out.tls, tls_directory(option.value, out.psk));
        }
        if (option.name == "io-backend") {
            TRY(out.runtime.backend, parse_io_backend(option.value));
        }
        if (option.name == "io-loops") {
            TRY(out.runtime.io_loops, number_between(option.value, 0, 256, "threads"));
        }
    }
    if (out.queues != 0 && out.vhost_users.empty() && !help) {
        return fail(ErrorKind::kInvalid, "--queues goes with --vhost-user");
    }
    if (out.write && out.vhost_users.size() > 1) {
        return fail(ErrorKind::kInvalid,
                    "--vhost-user can be given once with --write: two virtual machines that write to one disk destroy "
                    "what is on it");
    }
    if (!help && out.image.empty()) return fail(ErrorKind::kInvalid, "name an image; 'gantry serve --help' explains");
    return out;
}

}  // namespace

int serve_command(std::span<const char* const> arguments) {
    bool help = false;
    auto options = parse(arguments, help);
    if (help) {
        std::printf("Usage: gantry serve [OPTION]... IMAGE\n\n%s", options_help(kOptions).c_str());
        return 0;
    }
    if (!options) {
        std::fprintf(stderr, "gantry serve: %s\n", options.error().message().c_str());
        return 2;
    }
    log::set_level(log::Level::kWarn);
    DaemonSettings settings;
    settings.runtime = options->runtime;
    settings.notifier = systemd::Notifier::from_environment();
    // Removed when everything else is over.
    MadeFile made;
    if (!options->file.empty()) fuse::clean_stale_mounts();
    auto daemon = Daemon::create(std::move(settings));
    if (!daemon) {
        std::fprintf(stderr, "gantry serve: %s\n", daemon.error().message().c_str());
        return 1;
    }
    auto file = options->file.empty() ? Result<MadeFile>(MadeFile()) : MadeFile::create(options->file);
    if (file) made = std::move(*file);
    auto uris = file ? set_up(**daemon, *options) : Result<std::vector<std::string>>(std::unexpected(file.error()));
    if (!uris) {
        (*daemon)->shut_down();
        std::fprintf(stderr, "gantry serve: %s\n", uris.error().message().c_str());
        return 1;
    }
    print_hints(*options, *uris);
    (*daemon)->notifier().ready(fmt::format("Serving {}", options->image));
    (*daemon)->run();
    return 0;
}

}  // namespace gantry::cli
