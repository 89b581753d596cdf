// gantry tls: certificates and keys for TLS.

#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>

#include "cli/commands.h"
#include "cli/options.h"
#include "nbd/tls/authority.h"

namespace gantry::cli {

namespace {

constexpr OptionSpec kOptions[] = {
    {"server-name", 0, true, "NAME|ADDRESS",
     "what clients call the server (may be repeated; default: this host's name, localhost, 127.0.0.1, ::1)"},
    {"client-name", 0, true, "NAME", "the name in the client's certificate (default: client)"},
    {"days", 0, true, "N", "how long certificates are valid (default: 3650)"},
    {"psk", 0, false, "", "init: make pre-shared keys instead of certificates"},
    {"user", 0, true, "IDENTITY", "with --psk: who gets a key (may be repeated; default: qemu)"},
    {"help", 'h', false, "", "show this"},
};

constexpr const char* kUsage =
    "Usage: gantry tls init DIR [OPTION]...         a certificate authority with a server and a client certificate\n"
    "       gantry tls init DIR --psk [OPTION]...   a file of pre-shared keys\n"
    "       gantry tls client DIR CLIENT-DIR --client-name NAME\n"
    "                                               one more client of the authority in DIR\n\n"
    "Nothing is overwritten. Keys are readable by their owner alone.\n\n";

struct TlsArguments {
    std::vector<std::string> words;
    nbd::TlsFilesOptions files;
    std::vector<std::string> users;
    bool psk = false, help = false, named = false;
};

std::vector<std::string> default_names() {
    std::vector<std::string> names;
    std::array<char, 256> host{};
    if (::gethostname(host.data(), host.size() - 1) == 0 && host[0]) names.emplace_back(host.data());
    for (const char* name : {"localhost", "127.0.0.1", "::1"}) {
        if (std::ranges::find(names, name) == names.end()) names.emplace_back(name);
    }
    return names;
}

Result<TlsArguments> parse(std::span<const char* const> arguments) {
    TlsArguments out;
    std::vector<const char*> options;
    bool value_follows = false;
    for (const char* raw : arguments) {
        const std::string_view word = raw;
        if (!value_follows && !word.starts_with("-")) {
            out.words.emplace_back(word);
            continue;
        }
        options.push_back(raw);
        value_follows = !value_follows && std::ranges::any_of(kOptions, [&](const OptionSpec& spec) {
            return spec.takes_value && word == fmt::format("--{}", spec.name);
        });
    }
    TRY(const auto parsed, parse_options(kOptions, options));
    for (const OptionUse& option : parsed) {
        if (option.name == "help") out.help = true;
        if (option.name == "psk") out.psk = true;
        if (option.name == "server-name") out.files.server_names.push_back(option.value);
        if (option.name == "client-name") {
            out.files.client_name = option.value;
            out.named = true;
        }
        if (option.name == "user") out.users.push_back(option.value);
        if (option.name == "days") {
            const char* end = option.value.data() + option.value.size();
            const auto [stop, error] = std::from_chars(option.value.data(), end, out.files.days);
            if (error != std::errc() || stop != end || out.files.days == 0 || out.files.days > 36500) {
                return fail(ErrorKind::kInvalid, "'{}' is no number of days from 1 to 36500", option.value);
            }
        }
    }
    if (out.users.empty()) out.users.emplace_back("qemu");
    if (out.files.server_names.empty()) out.files.server_names = default_names();
    return out;
}

void print_files(const std::vector<std::string>& files) {
    std::puts("Written:");
    for (const std::string& path : files) std::printf("    %s\n", path.c_str());
}

Result<> run(TlsArguments& in) {
    const auto& words = in.words;
    const bool init = words.size() == 2 && words[0] == "init";
    if (!init && !(words.size() == 3 && words[0] == "client" && in.named && !in.psk)) {
        return fail(ErrorKind::kInvalid,
                    "say 'gantry tls init DIR' or 'gantry tls client DIR CLIENT-DIR --client-name NAME'");
    }
    const std::string& dir = words[1];
    in.files.dir = dir;
    if (!init) {
        TRY(const auto files, nbd::make_client_certificate(in.files, words[2]));
        print_files(files);
        return {};
    }
    if (in.psk) {
        TRY(const auto files, nbd::make_psk_file(dir, in.users));
        print_files(files);
        std::printf("\nServer:  gantry serve --tls %s --tcp 10809 IMAGE\n", dir.c_str());
        std::printf("Clients get a copy of keys.psk, or of their line of it:\n");
        std::printf("    nbdinfo 'nbds://%s@HOST/?tls-psk-file=%s/keys.psk'\n", in.users.front().c_str(), dir.c_str());
        return {};
    }
    TRY(const auto files, nbd::make_certificates(in.files));
    print_files(files);
    std::printf("\nServer:  gantry serve --tls %s --tcp 10809 IMAGE\n", dir.c_str());
    std::printf("Clients get ca-cert.pem, client-cert.pem and client-key.pem in a directory of their own:\n");
    std::printf("    nbdinfo 'nbds://%s/?tls-certificates=DIRECTORY'\n", in.files.server_names.front().c_str());
    std::printf(
        "ca-key.pem makes further certificates ('gantry tls client'); keep it away from servers and clients.\n");
    return {};
}

}  // namespace

int tls_command(std::span<const char* const> arguments) {
    auto parsed = parse(arguments);
    if (parsed && parsed->help) {
        std::printf("%s%s", kUsage, options_help(kOptions).c_str());
        return 0;
    }
    Result<> done;
    if (parsed) {
        done = run(*parsed);
    } else {
        done = std::unexpected(std::move(parsed).error());
    }
    if (done) return 0;
    std::fprintf(stderr, "gantry tls: %s\n", done.error().message().c_str());
    return done.error().kind() == ErrorKind::kInvalid ? 2 : 1;
}

}  // namespace gantry::cli
