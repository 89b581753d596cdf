// gantryd: the daemon. Takes the command line of qemu-storage-daemon (spec: QMP section 15) and a few options of its
// own.

#include <unistd.h>

#include <cstdio>
#include <filesystem>

#include "cli/daemon.h"
#include "cli/daemonize.h"
#include "cli/pid_file.h"
#include "cli/registry.h"
#include "fuse/mount.h"
#include "runtime/log.h"
#include "schema/help.h"
#include "schema/keyval.h"
#include "schema/schema.h"

namespace gantry::cli {
namespace {

constexpr OptionSpec kOptions[] = {
    {"blockdev", 0, true, "driver=NAME,node-name=NAME,...", "add a node to the block graph"},
    {"object", 0, true, "TYPE,id=ID,...", "make an object; 'help' lists the types, 'TYPE,help' their properties"},
    {"nbd-server", 0, true, "addr.type=unix,addr.path=PATH,...", "start the NBD server"},
    {"export", 0, true, "type=nbd,id=ID,node-name=NODE,...", "export a node"},
    {"chardev", 0, true, "socket,id=ID,path=PATH,server=on,wait=off", "make a character device for a monitor"},
    {"monitor", 0, true, "chardev=ID[,pretty=on]", "serve QMP on a character device"},
    {"control-socket", 0, true, "PATH|auto",
     "serve QMP on a unix socket of mode 0600; auto: where 'gantry status' looks"},
    {"image-references", 0, true, "all|none|DIRECTORY",
     "which files images may name as their backing or data files from here on: all (default), none, or those in this "
     "directory (may be repeated)"},
    {"mapping-logs", 0, true, "DIRECTORY",
     "keep what written images have acknowledged but not stored in memory files here (on tmpfs), so that a killed "
     "daemon's successor loses nothing"},
    {"fd-store", 0, true, "auto|on|off",
     "let the service manager keep what a killed or restarted daemon's successor needs to serve on (default: auto: "
     "when "
     "the manager says that it can)"},
    {"hand-over", 0, false, "",
     "SIGTERM leaves mounted FUSE exports to the process that is started next, which must name them again (needs the "
     "service manager's descriptor store)"},
    {"daemonize", 0, false, "", "go to the background when everything is up"},
    {"pidfile", 0, true, "PATH", "write the process id to a locked file"},
    {"io-backend", 0, true, "auto|io_uring|epoll", "how to do I/O (default: auto)"},
    {"io-loops", 0, true, "N", "threads that serve clients (default: one per CPU, at most 4)"},
    {"io-poll", 0, true, "auto|off|NS",
     "how long these threads look for work before they sleep (default: auto: 50 us when a client sends one request "
     "after the other; off: not at all; NS: up to so many nanoseconds, longer when that pays)"},
    {"log-level", 0, true, "error|warn|info|debug", "what is logged to stderr (default: warn)"},
    {"trace", 'T', true, "[[enable=]PATTERN][,events=FILE][,file=FILE]",
     "accepted; there are no trace points in this build"},
    {"help", 'h', false, "", "show this"},
    {"version", 'V', false, "", "show the version"},
};

int usage_error(const char* program, const Error& error) {
    std::fprintf(stderr, "%s: %s\n", program, error.message().c_str());
    return 1;
}

void print_help(const char* program) {
    std::printf(
        "Usage: %s [OPTION]...\nServes block devices: NBD exports over a graph of nodes, controlled over QMP.\n\n"
        "Options are taken in order: what is used must be made before. Values are key=value lists or JSON.\n%s",
        program, options_help(kOptions).c_str());
}

/// `--object help`, `--object TYPE,help`, `--chardev help`, `--trace help`: prints and ends. Nothing for other options.
bool print_value_help(const OptionUse& option) {
    if (option.name == "trace" && (option.value == "help" || option.value == "?")) {
        std::puts("There are no trace points in this build.");
        return true;
    }
    bool object = option.name == "object";
    if (!object && option.name != "chardev") return false;
    auto parsed = schema::parse_option_value(option.value, object ? "qom-type" : "backend",
                                             object ? schema::KeyvalStyle::kDotted : schema::KeyvalStyle::kFlat);
    if (!parsed || !parsed->help) return false;
    const json::value* kind = parsed->object.if_contains(object ? "qom-type" : "backend");
    std::string text;
    if (kind && kind->is_string() && object) {
        text = schema::help_for_variant(schema::type("ObjectOptions"), std::string(kind->get_string()));
    } else {
        text = std::string(object ? "List of user creatable objects:\n" : "Available chardev backend types:\n") +
               schema::help_values(schema::type(object ? "ObjectOptions" : "ChardevOptions"));
    }
    std::fputs(text.c_str(), stdout);
    return true;
}

Result<log::Level> parse_level(std::string_view text) {
    if (text == "debug") return log::Level::kDebug;
    if (text == "info") return log::Level::kInfo;
    if (text == "warn") return log::Level::kWarn;
    if (text == "error") return log::Level::kError;
    return fail(ErrorKind::kInvalid, "'{}' is no log level; use error, warn, info or debug", text);
}

Result<unsigned> parse_loops(const std::string& text) {
    if (text.empty() || text.size() > 3 || text.find_first_not_of("0123456789") != std::string::npos ||
        std::stoul(text) > 256) {
        return fail(ErrorKind::kInvalid, "'{}' is no number of threads from 0 to 256", text);
    }
    return static_cast<unsigned>(std::stoul(text));
}

Result<systemd::FdStore::Use> parse_fd_store(std::string_view text) {
    using Use = systemd::FdStore::Use;
    if (text == "auto") return Use::kAuto;
    if (text == "on") return Use::kOn;
    if (text == "off") return Use::kOff;
    return fail(ErrorKind::kInvalid, "'{}' is no use of a descriptor store; use auto, on or off", text);
}

/// --trace: checked like the reference's, though there is nothing to trace.
Result<> check_trace(const std::string& value) {
    TRY(schema::OptionValue parsed, schema::parse_option_value(value, "enable", schema::KeyvalStyle::kFlat));
    for (const auto& [key, ignored] : parsed.object) {
        if (key != "enable" && key != "events" && key != "file") {
            return fail(ErrorKind::kInvalid, "Invalid parameter '{}'", std::string_view(key));
        }
    }
    return {};
}

/// Options that hold before anything is made. False: not one of them.
Result<bool> apply_setting(const OptionUse& option, DaemonSettings& settings) {
    if (option.name == "io-backend") {
        TRY(settings.runtime.backend, parse_io_backend(option.value));
    } else if (option.name == "io-loops") {
        TRY(settings.runtime.io_loops, parse_loops(option.value));
    } else if (option.name == "io-poll") {
        TRY(settings.runtime.poll_max, parse_io_poll(option.value));
    } else if (option.name == "log-level") {
        TRY(log::Level level, parse_level(option.value));
        log::set_level(level);
    } else if (option.name == "fd-store") {
        TRY(settings.fd_store, parse_fd_store(option.value));
    } else if (option.name == "trace") {
        CHECK_OK(check_trace(option.value));
    } else {
        settings.hand_over |= option.name == "hand-over";
        return option.name == "daemonize" || option.name == "pidfile" || option.name == "hand-over";
    }
    return true;
}

int run(int argc, char** argv) {
    const std::string name = std::filesystem::path(argv[0]).filename();
    const char* program = name.c_str();
    log::set_level(log::Level::kWarn);
    auto options = parse_options(kOptions, std::span(argv + 1, static_cast<size_t>(argc - 1)));
    if (!options) return usage_error(program, options.error());

    bool daemonize = false;
    std::string pid_path, stdio_use;
    DaemonSettings settings;
    settings.runtime.io_loops = default_io_loops();
    for (const OptionUse& option : *options) {
        if (option.name == "help") {
            print_help(program);
            return 0;
        }
        if (option.name == "version") {
            std::printf("gantryd %s\n", GANTRY_VERSION);
            return 0;
        }
        if (print_value_help(option)) return 0;
        if (option.name == "daemonize") daemonize = true;
        if (option.name == "pidfile") pid_path = option.value;
        if (auto set = apply_setting(option, settings); !set) {
            return usage_error(program,
                               std::move(set).error().context(fmt::format("--{} {}", option.name, option.value)));
        }
        bool stdio = option.name == "chardev" && (option.value == "stdio" || option.value.starts_with("stdio,"));
        if (stdio) stdio_use = fmt::format("--chardev {}", option.value);
    }
    if (daemonize && !stdio_use.empty()) {
        return usage_error(program,
                           Error(ErrorKind::kInvalid, fmt::format("{}: cannot use stdio with -daemonize", stdio_use)));
    }

    Daemonizer background;
    if (daemonize) {
        auto started = Daemonizer::start();
        if (!started) return usage_error(program, started.error());
        background = std::move(*started);
    }
    settings.notifier = systemd::Notifier::from_environment();
    settings.sockets = systemd::ActivationSockets::from_environment();
    // An image may lie below what an earlier export has left there.
    const bool mounts = std::ranges::any_of(*options, [](const OptionUse& option) {
        return option.name == "export" && option.value.find("fuse") != std::string::npos;
    });
    auto daemon = Daemon::create(std::move(settings));
    if (!daemon) return usage_error(program, daemon.error());
    // Those that are kept for this process are known by now, and not asked.
    if (mounts) fuse::clean_stale_mounts();

    DaemonSettings ignored;
    auto start_up_failed = [&](const Error& error) {
        (*daemon)->notifier().error(error.errno_value());
        (*daemon)->leave_inherited();
        (*daemon)->shut_down();
        return usage_error(program, error);
    };
    for (const OptionUse& option : *options) {
        auto setting = apply_setting(option, ignored);
        if (setting && *setting) continue;
        if (auto applied = (*daemon)->apply(option); !applied) {
            if ((*daemon)->quitting()) break;
            return start_up_failed(
                std::move(applied).error().context(fmt::format("--{} {}", option.name, option.value)));
        }
    }
    PidFile pid_file;
    if (!pid_path.empty()) {
        auto created = PidFile::create(pid_path);
        if (!created) return start_up_failed(created.error());
        pid_file = std::move(*created);
    }
    background.ready();
    (*daemon)->notifier().ready(fmt::format("{} exports", (*daemon)->services().exports.size()));
    (*daemon)->run();
    return 0;
}

}  // namespace
}  // namespace gantry::cli

int main(int argc, char** argv) { return gantry::cli::run(argc, argv); }
