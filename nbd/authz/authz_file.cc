// authz-list-file: rules in a file, read again when it has changed.

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <ctime>

#include "nbd/authz/authz.h"
#include "runtime/blocking_pool.h"
#include "runtime/log.h"
#include "runtime/unique_fd.h"
#include "schema/json_dialect.h"
#include "schema/schema.h"
#include "schema/validate.h"

namespace gantry::nbd {

namespace {

constexpr size_t kMaxFile = 4u << 20;
/// A file changed less than this before it was read may change again without its time stamp telling.
constexpr time_t kSettleSeconds = 2;

struct FileState {
    ino_t inode = 0;
    off_t size = -1;
    timespec modified{}, changed{};

    bool same(const FileState& o) const {
        const auto equal = [](const timespec& a, const timespec& b) {
            return a.tv_sec == b.tv_sec && a.tv_nsec == b.tv_nsec;
        };
        return inode == o.inode && size == o.size && equal(modified, o.modified) && equal(changed, o.changed);
    }
};

struct Loaded {
    FileState state;
    bool settled = false;
    Result<std::shared_ptr<const AuthzRules>> rules;
};

FileState state_of(const struct stat& st) { return {st.st_ino, st.st_size, st.st_mtim, st.st_ctim}; }

Result<std::shared_ptr<const AuthzRules>> parse(std::string_view text, const std::string& path) {
    auto value = schema::parse_json(text);
    if (!value) return std::unexpected(std::move(value).error().context(fmt::format("Unable to parse '{}'", path)));
    if (!value->is_object()) return fail(ErrorKind::kInvalid, "File '{}' must contain a JSON object", path);
    auto valid = schema::validate(schema::type("AuthZListProperties"), std::move(value->get_object()));
    if (!valid) return std::unexpected(std::move(valid).error().context(fmt::format("File '{}'", path)));
    return std::make_shared<const AuthzRules>(AuthzRules::from(*valid));
}

Loaded load(const std::string& path) {
    const UniqueFd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (!fd) return {{}, false, fail_errno(errno, "Unable to read '{}'", path)};
    struct stat st{};
    if (::fstat(fd.get(), &st) != 0) return {{}, false, fail_errno(errno, "Unable to read '{}'", path)};
    Loaded out{state_of(st), st.st_ctim.tv_sec + kSettleSeconds < ::time(nullptr), nullptr};
    if (!S_ISREG(st.st_mode) || st.st_size > static_cast<off_t>(kMaxFile)) {
        out.rules = fail(ErrorKind::kInvalid, "Unable to read '{}': not a file of at most {} bytes", path, kMaxFile);
        return out;
    }
    std::string text(static_cast<size_t>(st.st_size), '\0');
    size_t have = 0;
    while (have < text.size()) {
        const ssize_t n = ::read(fd.get(), text.data() + have, text.size() - have);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) {
            out.rules = fail_errno(errno, "Unable to read '{}'", path);
            return out;
        }
        if (n == 0) break;
        have += static_cast<size_t>(n);
    }
    text.resize(have);
    out.rules = parse(text, path);
    return out;
}

/// Nothing when the file is as it was loaded.
std::optional<Loaded> load_if_changed(const std::string& path, const FileState& known, bool settled) {
    struct stat st{};
    if (settled && ::stat(path.c_str(), &st) == 0 && state_of(st).same(known)) return std::nullopt;
    return load(path);
}

class ListFile final : public Authz {
  public:
    ListFile(std::string path, bool refresh, Loaded loaded)
        : path_(std::move(path)), refresh_(refresh), loaded_(std::move(loaded)) {}

    Task<Result<bool>> allows(std::string identity) override {
        if (refresh_) {
            const FileState known = loaded_.state;
            const bool settled = loaded_.settled;
            const std::string path = path_;
            auto newer = co_await run_blocking([&] { return load_if_changed(path, known, settled); });
            if (newer) loaded_ = std::move(*newer);
        }
        // A broken file lets nobody in until it is put right.
        if (!loaded_.rules) co_return std::unexpected(loaded_.rules.error());
        co_return (*loaded_.rules)->allows(identity);
    }

  private:
    const std::string path_;
    const bool refresh_;
    Loaded loaded_;
};

}  // namespace

Result<std::shared_ptr<Authz>> make_authz_file(std::string filename, bool refresh) {
    if (filename.empty()) return fail(ErrorKind::kInvalid, "filename not provided");
    Loaded loaded = load(filename);
    if (!loaded.rules) return std::unexpected(loaded.rules.error());
    return std::make_shared<ListFile>(std::move(filename), refresh, std::move(loaded));
}

}  // namespace gantry::nbd
