// gantry mount IMAGE FILE [-- COMMAND...]: an image as a raw file.

#include <algorithm>
#include <charconv>
#include <csignal>
#include <cstdio>

#include "cli/child_command.h"
#include "cli/commands.h"
#include "cli/daemon.h"
#include "cli/daemonize.h"
#include "cli/made_file.h"
#include "cli/opened_image.h"
#include "fuse/mount.h"
#include "runtime/log.h"
#include "runtime/task_scope.h"

namespace gantry::cli {

namespace {

constexpr OptionSpec kOptions[] = {
    {"write", 'w', false, "", "let the file be written; a raw image then needs --format raw"},
    {"partition", 'p', true, "N", "show partition N of the disk alone (MBR or GPT)"},
    {"format", 'f', true, "raw|qcow2", "the image format (default: found out from its first bytes)"},
    {"snapshot", 0, true, "ID|NAME", "an internal snapshot of a qcow2 image"},
    {"growable", 0, false, "", "writes beyond the end enlarge the disk"},
    {"allow-other", 0, true, "off|on|auto", "who else may use the file, as far as its mode allows (default: auto)"},
    {"transport", 0, true, "classic|uring|auto", "how the kernel hands over requests (default: classic)"},
    {"passthrough", 0, false, "", "the kernel uses a raw image itself, at its full speed"},
    {"cached", 0, false, "", "the kernel may keep what was read (not with --write)"},
    {"background", 'b', false, "", "return once the file is there; 'gantry umount FILE' ends it"},
    {"io-backend", 0, true, "auto|io_uring|epoll", "how to do I/O"},
    {"io-loops", 0, true, "N", "threads that serve the file"},
    {"help", 'h', false, "", "show this"},
};

struct MountOptions {
    ImageChoice image;
    std::string file;
    std::vector<std::string> command;
    json::object export_options;
    bool background = false;
    RuntimeOptions runtime;
};

Result<unsigned> parse_number(const std::string& text, unsigned most, std::string_view what) {
    unsigned value = 0;
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || *end != '\0' || value > most) {
        return fail(ErrorKind::kInvalid, "'{}' is no {} from 0 to {}", text, what, most);
    }
    return value;
}

Result<> apply(const OptionUse& option, MountOptions& out) {
    if (option.name == "write") out.image.write = true;
    if (option.name == "format") out.image.format = option.value;
    if (option.name == "snapshot") out.image.snapshot = option.value;
    if (option.name == "background") out.background = true;
    if (option.name == "growable") out.export_options["growable"] = true;
    if (option.name == "allow-other") out.export_options["allow-other"] = option.value;
    if (option.name == "transport") out.export_options["x-transport"] = option.value;
    if (option.name == "passthrough") out.export_options["x-passthrough"] = true;
    if (option.name == "cached") out.export_options["x-cached"] = true;
    if (option.name == "partition") {
        TRY(out.image.partition, parse_number(option.value, 1u << 20, "number of a partition"));
    }
    if (option.name == "io-backend") {
        TRY(out.runtime.backend, parse_io_backend(option.value));
    }
    if (option.name == "io-loops") {
        TRY(out.runtime.io_loops, parse_number(option.value, 256, "number of threads"));
    }
    return {};
}

/// The words that are no options, in `plain`; the rest.
std::vector<const char*> take_plain(std::span<const char* const> arguments, std::vector<std::string>& plain) {
    std::vector<const char*> words;
    bool value_follows = false;
    for (const char* raw : arguments) {
        const std::string_view word = raw;
        const bool is_option = value_follows || (word.starts_with("-") && word.size() > 1);
        value_follows = false;
        if (!is_option) {
            plain.emplace_back(word);
            continue;
        }
        words.push_back(raw);
        for (const OptionSpec& spec : kOptions) {
            const bool same = word == fmt::format("--{}", spec.name) ||
                              (spec.short_name && word == fmt::format("-{}", spec.short_name));
            if (spec.takes_value && same) value_follows = true;
        }
    }
    return words;
}

Result<MountOptions> parse(std::span<const char* const> arguments, bool& help) {
    MountOptions out;
    out.runtime.io_loops = default_io_loops();
    const auto dashes =
        std::ranges::find(arguments, std::string_view("--"), [](const char* w) { return std::string_view(w); });
    const auto before = static_cast<size_t>(dashes - arguments.begin());
    if (dashes != arguments.end()) {
        for (const char* word : arguments.subspan(before + 1)) out.command.emplace_back(word);
        if (out.command.empty()) return fail(ErrorKind::kInvalid, "name a command after '--', or leave that away");
    }
    std::vector<std::string> plain;
    const std::vector<const char*> words = take_plain(arguments.first(before), plain);
    TRY(auto parsed, parse_options(kOptions, words));
    for (const OptionUse& option : parsed) {
        if (option.name == "help") help = true;
        CHECK_OK(apply(option, out));
    }
    if (help) return out;
    if (plain.size() > 2) {
        return fail(ErrorKind::kInvalid, "'{}' is too much: one image and one file, and a command after '--'",
                    plain[2]);
    }
    if (plain.size() < 2) {
        return fail(ErrorKind::kInvalid, "name an image and the file that shows it; 'gantry mount --help' explains");
    }
    out.image.image = plain[0];
    out.file = plain[1];
    if (out.background && !out.command.empty()) {
        return fail(ErrorKind::kInvalid,
                    "--background and a command exclude each other: the mount ends with the command");
    }
    if (out.image.partition && out.export_options.contains("growable")) {
        return fail(ErrorKind::kInvalid, "a partition cannot grow; leave --growable or --partition away");
    }
    return out;
}

Result<> set_up(Daemon& daemon, const MountOptions& options) {
    TRY(const std::string node, open_image(daemon, options.image));
    json::object exported = options.export_options;
    exported["type"] = "fuse";
    exported["id"] = "mount";
    exported["node-name"] = node;
    exported["mountpoint"] = options.file;
    exported["writable"] = options.image.write;
    TRY(auto added, daemon.execute("block-export-add", std::move(exported)));
    (void)added;
    // To be seen by gantry status is worth a try; the file serves without.
    if (const Result<> seen = daemon.apply({"control-socket", "auto"}); !seen) {
        log::warn("gantry status will not see this: {}", seen.error().message());
    }
    return {};
}

void print_hints(const MountOptions& options) {
    const std::string what = options.image.partition ? fmt::format("partition {} of ", *options.image.partition) : "";
    std::printf("%s shows %s%s (%s)\n", options.file.c_str(), what.c_str(), options.image.image.c_str(),
                options.image.write ? "read-write" : "read-only");
    std::printf("%s'gantry umount %s' ends it.\n", options.background ? "" : "Ctrl-C or ", options.file.c_str());
    std::fflush(stdout);
}

Task<void> quit_after(ChildCommand* child, Daemon* daemon) {
    co_await child->ended();
    daemon->request_quit();
}

Task<void> watch(TaskScope* scope, ChildCommand* child, Daemon* daemon) {
    scope->spawn(quit_after(child, daemon));
    co_return;
}

int fail_with(const Error& error, int status) {
    std::fprintf(stderr, "gantry mount: %s\n", error.message().c_str());
    return status;
}

/// Serves while the command runs; its exit status.
int run_command(Daemon& daemon, ChildCommand& child, const MountOptions& options) {
    if (const Result<> started = child.start(options.command); !started) {
        daemon.shut_down();
        return fail_with(started.error(), started.error().errno_value() == ENOENT ? 127 : 126);
    }
    TaskScope scope;
    Loop& loop = daemon.runtime().main_loop();
    loop.run_until_complete(watch(&scope, &child, &daemon));
    daemon.run();
    child.stop_watching();
    loop.run_until_complete(scope.join());
    return child.wait();
}

int run(const MountOptions& options, Daemonizer& background) {
    // The image may lie below what an earlier mount has left.
    fuse::clean_stale_mounts();
    // Removed when everything else is over.
    MadeFile made;
    ChildCommand child;
    Daemon* running = nullptr;
    DaemonSettings settings;
    settings.runtime = options.runtime;
    settings.notifier = systemd::Notifier::from_environment();
    settings.export_deleted = [&](std::string_view) {
        // The command goes on without its file; whoever only waits for the file is done.
        if (running && !child.started()) running->request_quit();
    };
    settings.take_signal = [&child](int number, bool by_terminal) {
        if (child.started() && !by_terminal) child.send(number);
        return child.started();
    };
    auto daemon = Daemon::create(std::move(settings));
    if (!daemon) return fail_with(daemon.error(), 1);
    running = daemon->get();
    auto file = MadeFile::create(options.file);
    if (file) made = std::move(*file);
    Result<> up = file ? set_up(**daemon, options) : Result<>(std::unexpected(file.error()));
    if (!up) {
        (*daemon)->shut_down();
        return fail_with(up.error(), 1);
    }
    if ((*daemon)->quitting()) {
        (*daemon)->shut_down();
        return fail_with(Error(ErrorKind::kCancelled, "ended by a signal or an unmount"), 1);
    }
    if (!options.command.empty()) return run_command(**daemon, child, options);
    print_hints(options);
    background.ready();
    (*daemon)->notifier().ready(fmt::format("{} shows {}", options.file, options.image.image));
    (*daemon)->run();
    return 0;
}

}  // namespace

int mount_command(std::span<const char* const> arguments) {
    bool help = false;
    auto options = parse(arguments, help);
    if (help) {
        std::printf(
            "Usage: gantry mount [OPTION]... IMAGE FILE [-- COMMAND [ARGUMENT]...]\n\n"
            "Shows IMAGE as the raw file FILE, which is made when it does not exist, and may be IMAGE itself. Until\n"
            "COMMAND ends, whose exit status it returns; without COMMAND until Ctrl-C or 'gantry umount FILE'.\n\n%s",
            options_help(kOptions).c_str());
        return 0;
    }
    if (!options) return fail_with(options.error(), 2);
    log::set_level(log::Level::kWarn);
    Daemonizer background;
    if (options->background) {
        auto started = Daemonizer::start();
        if (!started) return fail_with(started.error(), 1);
        background = std::move(*started);
    }
    return run(*options, background);
}

}  // namespace gantry::cli
