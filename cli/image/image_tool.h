// ImageTool: what the subcommands of `gantry image` share: their words, opening an image, progress, results.

#pragma once

#include <cstdio>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "block/image_operations.h"
#include "cli/daemon.h"
#include "cli/image/progress_bar.h"
#include "cli/options.h"

namespace gantry::cli::image {

/// Exit statuses, those of qemu-img: 1 failed; of check: 2 corruptions, 3 leaks only, 63 not supported by the format.
constexpr int kOk = 0, kFailed = 1, kCorruptions = 2, kLeaks = 3, kNotSupported = 63;

/// The words of one subcommand: options it takes besides those of every subcommand (--format, --image-opts, --object,
/// --json, --help), and names in a row.
struct Words {
    std::vector<std::string> names;
    std::vector<OptionUse> options;
    bool has(std::string_view option) const;
    /// The last one given; "" when absent.
    std::string value(std::string_view option) const;
};

/// A subcommand's usage: what comes after "gantry image NAME".
struct Usage {
    std::string_view name;
    std::string_view line;  // "[OPTION]... IMAGE"
    std::string_view doc;
    std::span<const OptionSpec> options;
    size_t min_names = 1, max_names = 1;
};

/// Bytes with an optional suffix k, M, G, T, P, E (powers of 1024), below 2^63. "+N" and "-N" are relative to `base`;
/// without one they are refused.
Result<uint64_t> parse_size(std::string_view text, std::optional<uint64_t> base = std::nullopt);

class ImageTool {
  public:
    /// Reads the words; prints help or what is wrong. Null: exit with `status`.
    static std::unique_ptr<ImageTool> create(const Usage& usage, std::span<const char* const> arguments, int& status);
    ~ImageTool();

    const Words& words() const { return words_; }
    bool json() const { return words_.has("json"); }

    enum class Access : uint8_t {
        kRead,
        kWrite,
        kShared,  // reading while somebody else may write
        kRepair,  // writing by Graph::opens_for_repair: whatever state the image is in
    };
    enum class Backing : uint8_t { kFollow, kIgnore };
    /// The image named on the command line: a file, a json: definition, or with --image-opts options. Its node is
    /// "image". A raw image found by probing is not opened for writing. kIgnore: files it names as backing files stay
    /// closed. `format`: instead of --format.
    Result<block::Node*> open(const std::string& image, Access access, Backing backing, std::string format = {});
    block::Graph& graph() { return daemon_->services().graph; }
    Daemon& daemon() { return *daemon_; }
    template <class T>
    T run(Task<T> task) {
        T result = daemon_->runtime().main_loop().run_until_complete(std::move(task));
        if constexpr (requires { result.has_value(); }) bar_.finish(result.has_value());
        return result;
    }

    /// A bar on the terminal (when stderr is one, or with --progress), up to the end of run(); stops on Ctrl-C.
    block::Progress progress(std::string what);
    /// Prints the error and gives kFailed.
    int failed(const Error& error);
    void print_json(const json::value& value);

  private:
    ImageTool(const Usage& usage, Words words) : usage_(usage), words_(std::move(words)) {}
    Result<> set_up();
    Result<json::object> definition(const std::string& image, Access access, std::string format);
    Result<json::object> described(const std::string& text, Access access);
    Result<> add_file(json::object file, Access access);
    Result<std::string> find_format(const std::string& image, bool write);
    bool has_option(const json::object& definition, std::string_view name) const;

    const Usage& usage_;
    Words words_;
    std::unique_ptr<Daemon> daemon_;
    ProgressBar bar_;
    bool encryption_guessed_ = false;
};

int info_command(std::span<const char* const> arguments);
int map_command(std::span<const char* const> arguments);
int check_command(std::span<const char* const> arguments);
int create_command(std::span<const char* const> arguments);
int resize_command(std::span<const char* const> arguments);
int snapshot_command(std::span<const char* const> arguments);
int amend_command(std::span<const char* const> arguments);
int measure_command(std::span<const char* const> arguments);
int compact_command(std::span<const char* const> arguments);
int commit_command(std::span<const char* const> arguments);
int rebase_command(std::span<const char* const> arguments);

}  // namespace gantry::cli::image
