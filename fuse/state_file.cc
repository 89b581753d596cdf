#include "fuse/state_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <vector>

#include "schema/json_dialect.h"

namespace gantry::fuse {

namespace {

constexpr uint64_t kMagic = 0x31657361'656c7966;
constexpr int kPlaces = 2;

/// FNV-1a: tells a place that was cut off from a whole one; nobody means harm here.
uint64_t sum_of(uint64_t number, std::string_view text) {
    uint64_t sum = 0xcbf29ce484222325 ^ number;
    for (const char c : text) sum = (sum ^ static_cast<uint8_t>(c)) * 0x100000001b3;
    return sum;
}

}  // namespace

struct StateFile::Head {
    uint64_t magic = kMagic;
    uint64_t number = 0;
    uint64_t size = 0;  // of the text behind
    uint64_t sum = 0;
};

struct StateFile::Found {
    uint64_t number = 0;  // 0: nothing is whole
    std::string text;
};

StateFile::Found StateFile::newest() const {
    Found best;
    std::vector<char> place(kPlace);
    for (int i = 0; i < kPlaces; ++i) {
        const ssize_t n = ::pread(fd_.get(), place.data(), place.size(), static_cast<off_t>(i) * kPlace);
        Head head;
        if (n < static_cast<ssize_t>(sizeof head)) continue;
        std::memcpy(&head, place.data(), sizeof head);
        if (head.magic != kMagic || head.number <= best.number) continue;
        if (head.size > static_cast<size_t>(n) - sizeof head) continue;
        const std::string_view text(place.data() + sizeof head, head.size);
        if (head.sum == sum_of(head.number, text)) best = {head.number, std::string(text)};
    }
    return best;
}

Result<std::unique_ptr<StateFile>> StateFile::create() {
    UniqueFd fd(::memfd_create("gantry-fuse-state", MFD_CLOEXEC));
    if (!fd || ::ftruncate(fd.get(), kPlaces * kPlace) != 0) return fail_errno(errno, "Memory file for a FUSE export");
    return std::unique_ptr<StateFile>(new StateFile(std::move(fd)));
}

Result<std::unique_ptr<StateFile>> StateFile::adopt(UniqueFd fd) {
    struct stat st;
    if (::fstat(fd.get(), &st) != 0 || !S_ISREG(st.st_mode) || st.st_size != kPlaces * kPlace) {
        return fail(ErrorKind::kInvalid, "what was left of a FUSE export is no memory file of {} bytes",
                    kPlaces * kPlace);
    }
    std::unique_ptr<StateFile> file(new StateFile(std::move(fd)));
    file->number_ = file->newest().number;
    if (file->number_ == 0) return fail(ErrorKind::kInvalid, "nothing whole is in what was left of a FUSE export");
    return file;
}

Result<json::object> StateFile::read() const {
    const std::lock_guard lock(mutex_);
    const Found found = newest();
    if (found.number == 0) return fail(ErrorKind::kInvalid, "nothing whole is in what was left of a FUSE export");
    TRY(json::value value, schema::parse_json(found.text));
    if (!value.is_object()) return fail(ErrorKind::kInvalid, "what was left of a FUSE export is no object");
    return std::move(value.get_object());
}

Result<> StateFile::write(const json::object& state) {
    const std::string text = boost::json::serialize(state);
    if (text.size() > kPlace - sizeof(Head)) {
        return fail(ErrorKind::kTooLarge, "{} bytes are too much to be kept of a FUSE export", text.size());
    }
    const std::lock_guard lock(mutex_);
    const Head head{.number = number_ + 1, .size = text.size(), .sum = sum_of(number_ + 1, text)};
    std::string all(reinterpret_cast<const char*>(&head), sizeof head);
    all += text;
    const auto at = static_cast<off_t>(head.number % kPlaces * kPlace);
    if (::pwrite(fd_.get(), all.data(), all.size(), at) != static_cast<ssize_t>(all.size())) {
        return fail_errno(errno, "Memory file of a FUSE export");
    }
    number_ = head.number;
    return {};
}

}  // namespace gantry::fuse
