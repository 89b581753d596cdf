// gantry umount FILE...: ends what `gantry mount` or an export of gantryd shows, also of daemons that are gone or hang.

#include <fcntl.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <optional>

#include "cli/commands.h"
#include "cli/options.h"
#include "fuse/mountinfo.h"
#include "fuse/stale_mounts.h"
#include "runtime/own_mounts.h"
#include "runtime/unique_fd.h"

namespace gantry::cli {

namespace {

constexpr OptionSpec kOptions[] = {
    {"force", 'f', false, "", "also while it is in use, and when its daemon hangs: programs that use it get errors"},
    {"help", 'h', false, "", "show this"},
};

/// The mount that FILE leads into. Nobody is asked anything who might not answer.
Result<fuse::MountEntry> mount_at(const std::string& file) {
    auto place = place_of(file, true);
    if (!place) return std::unexpected(std::move(place).error());
    TRY(std::vector<fuse::MountEntry> mounts, fuse::read_mountinfo());
    for (fuse::MountEntry& mount : mounts) {
        if (mount.device == place->device && (place->mount_id == 0 || place->mount_id == mount.id) &&
            mount.type == fuse::kFilesystemType) {
            return std::move(mount);
        }
    }
    return fail(ErrorKind::kNotFound, "'{}' is no file that gantry shows; 'grep {} /proc/mounts' lists those there are",
                file, fuse::kFilesystemType);
}

/// Whoever waits for an answer of its server gets an error. Needs root, or the kernel's control file of one's own
/// mount.
bool abort_connection(const fuse::MountEntry& mount) {
    const std::string path = fmt::format("/sys/fs/fuse/connections/{}/abort", minor(static_cast<dev_t>(mount.device)));
    const UniqueFd fd(::open(path.c_str(), O_WRONLY | O_CLOEXEC));
    return fd && ::write(fd.get(), "1", 1) == 1;
}

Result<> unmount(const std::string& file, bool force) {
    TRY(const fuse::MountEntry mount, mount_at(file));
    UniqueFd root = fuse::open_root(mount);
    const fuse::ServerState state = root ? fuse::probe(mount, root.get()) : fuse::ServerState::kAnswers;
    root.reset();  // it would be a user
    if (state == fuse::ServerState::kSilent && force) (void)abort_connection(mount);
    // Nobody loses anything by an unmount of what is gone.
    Result<> done = fuse::unmount_entry(mount, force || state == fuse::ServerState::kGone);
    if (done) return {};
    std::string hint;
    if (done.error().kind() == ErrorKind::kBusy) {
        hint = state == fuse::ServerState::kSilent ? "; its daemon does not answer: --force ends it for all who use it"
                                                   : "; end them ('fuser -v' shows who it is), or use --force";
    }
    return std::unexpected(Error(done.error().kind(), done.error().message() + hint));
}

}  // namespace

int umount_command(std::span<const char* const> arguments) {
    std::vector<const char*> words;
    std::vector<std::string> files;
    bool force = false, only_files = false;
    for (const char* raw : arguments) {
        const std::string_view word = raw;
        if (!only_files && word == "--") {
            only_files = true;
        } else if (!only_files && word.starts_with("-") && word.size() > 1) {
            words.push_back(raw);
        } else {
            files.emplace_back(word);
        }
    }
    auto options = parse_options(kOptions, words);
    if (!options) {
        std::fprintf(stderr, "gantry umount: %s\n", options.error().message().c_str());
        return 2;
    }
    for (const OptionUse& option : *options) {
        if (option.name == "force") force = true;
        if (option.name == "help") {
            std::printf("Usage: gantry umount [OPTION]... FILE...\n\n%s", options_help(kOptions).c_str());
            return 0;
        }
    }
    if (files.empty()) {
        std::fputs("gantry umount: name a file that gantry shows; 'gantry umount --help' explains\n", stderr);
        return 2;
    }
    int status = 0;
    for (const std::string& file : files) {
        if (const Result<> done = unmount(file, force); !done) {
            std::fprintf(stderr, "gantry umount: %s\n", done.error().message().c_str());
            status = 1;
        }
    }
    return status;
}

}  // namespace gantry::cli
