#include "block/formats/qcow2/mapping_log.h"

#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <map>
#include <utility>

namespace gantry::block::qcow2 {

namespace {

constexpr uint64_t kLogMagic = 0x474e545247304c31;  // "GNTRG0L1"
constexpr uint64_t kHeadBytes = 64;

/// Mixes one word into a running sum; every bit of the words reaches every bit of the result.
uint64_t mix(uint64_t sum, uint64_t word) {
    sum ^= word;
    sum *= 0x9e3779b97f4a7c15;
    sum ^= sum >> 32;
    sum *= 0xd6e8feb86659fd93;
    return sum ^ (sum >> 29);
}

}  // namespace

/// Shared with the process that comes after us. Host byte order: it is the same machine.
struct MappingLog::Head {
    std::atomic<uint64_t> magic, session, first;
};

struct MappingLog::Slot {
    uint64_t number, index, word, bitmap;
    uint32_t kind, unused;
    std::atomic<uint64_t> sum;

    uint64_t expected(uint64_t session) const {
        uint64_t s = mix(kLogMagic, session);
        for (const uint64_t word_of : {number, index, word, bitmap, uint64_t{kind}}) s = mix(s, word_of);
        return s;
    }
};

MappingLog::~MappingLog() {
    if (base_) munmap(base_, kBytes);
}

uint64_t MappingLog::capacity() { return (kBytes - kHeadBytes) / sizeof(Slot); }

MappingLog::Head& MappingLog::head() const {
    static_assert(sizeof(Head) <= kHeadBytes && std::atomic<uint64_t>::is_always_lock_free);
    return *reinterpret_cast<Head*>(base_);
}

MappingLog::Slot& MappingLog::slot(uint64_t number) const {
    return *reinterpret_cast<Slot*>(base_ + kHeadBytes + (number % capacity()) * sizeof(Slot));
}

Result<> MappingLog::attach(UniqueFd fd) {
    struct stat st{};
    if (fstat(fd.get(), &st) != 0) return fail_errno(errno, "Could not look at the mapping log");
    if (!S_ISREG(st.st_mode) || (st.st_size != 0 && static_cast<uint64_t>(st.st_size) != kBytes)) {
        return fail(ErrorKind::kInvalid, "the mapping log is not a memory file of {} bytes: it has {}", kBytes,
                    st.st_size);
    }
    if (st.st_size == 0 && ftruncate(fd.get(), kBytes) != 0) {
        return fail_errno(errno, "Could not size the mapping log");
    }
    void* base = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd.get(), 0);
    if (base == MAP_FAILED) return fail_errno(errno, "Could not map the mapping log");
    auto* bytes = static_cast<uint8_t*>(base);
    const uint64_t magic = reinterpret_cast<Head*>(bytes)->magic.load();
    if (magic != 0 && magic != kLogMagic) {
        munmap(base, kBytes);
        return fail(ErrorKind::kInvalid, "the mapping log begins with {:#x}: it is something else", magic);
    }
    const std::lock_guard lock(mutex_);
    if (base_) munmap(base_, kBytes);
    base_ = bytes;
    fd_ = std::move(fd);
    if (magic == 0) {
        head().session = 0;
        head().first = 0;
        head().magic = kLogMagic;
    }
    // Until start() nothing is appended: what is here belongs to the session before.
    first_ = next_ = head().first.load();
    return {};
}

uint64_t MappingLog::session() const { return base_ ? head().session.load() : 0; }

std::vector<MappingRecord> newest(std::span<const MappingRecord> records) {
    std::map<std::pair<MappingRecord::Kind, uint64_t>, MappingRecord> last;
    for (const MappingRecord& r : records) last.insert_or_assign({r.kind, r.index}, r);
    std::vector<MappingRecord> out;
    out.reserve(last.size());
    for (const auto& [entry, record] : last) out.push_back(record);
    return out;
}

std::vector<MappingRecord> MappingLog::records() const {
    std::vector<MappingRecord> out;
    if (!base_) return out;
    const uint64_t session = head().session.load(), first = head().first.load();
    for (uint64_t number = first; number - first < capacity(); number++) {
        const Slot& s = slot(number);
        if (s.number != number || s.sum.load() != s.expected(session)) break;
        out.push_back({static_cast<MappingRecord::Kind>(s.kind), s.index, s.word, s.bitmap});
    }
    return out;
}

void MappingLog::start(uint64_t session) {
    if (!base_) return;
    const std::lock_guard lock(mutex_);
    // Numbers go on, and the session is part of the sums: no old record fits.
    head().session.store(0);
    first_ = next_ = head().first.load() + capacity();
    head().first.store(first_);
    head().session.store(session);
}

bool MappingLog::append(std::span<const MappingRecord> records) {
    if (!base_ || records.empty()) return true;
    const std::lock_guard lock(mutex_);
    if (records.size() > capacity() - (next_ - first_)) return false;
    const uint64_t session = head().session.load(std::memory_order_relaxed);
    for (const MappingRecord& r : records) {
        Slot& s = slot(next_);
        s.sum.store(0, std::memory_order_relaxed);
        std::atomic_signal_fence(std::memory_order_seq_cst);
        s.number = next_;
        s.index = r.index;
        s.word = r.word;
        s.bitmap = r.bitmap;
        s.kind = static_cast<uint32_t>(r.kind);
        s.sum.store(s.expected(session), std::memory_order_release);
        next_++;
    }
    return true;
}

uint64_t MappingLog::mark() const {
    const std::lock_guard lock(mutex_);
    return next_;
}

void MappingLog::clear_before(uint64_t mark) {
    if (!base_) return;
    const std::lock_guard lock(mutex_);
    first_ = std::max(first_, mark);
    head().first.store(first_, std::memory_order_release);
}

bool MappingLog::half_full() const {
    if (!base_) return false;
    const std::lock_guard lock(mutex_);
    return (next_ - first_) * 2 > capacity();
}

}  // namespace gantry::block::qcow2
