#include "block/bitmap.h"

#include <algorithm>
#include <bit>
#include <cstdlib>

#include "runtime/check.h"

namespace gantry::block {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{512} << 20;
constexpr uint32_t kMinGranularity = 512;
constexpr uint32_t kMaxGranularity = uint32_t{1} << 31;

uint64_t words_for(uint64_t bits) { return bits / 64 + (bits % 64 != 0); }

/// Bits [first, last) of a word; last <= 64.
uint64_t bit_range(unsigned first, unsigned last) {
    const uint64_t below_last = last == 64 ? ~uint64_t{0} : (uint64_t{1} << last) - 1;
    return below_last & (~uint64_t{0} << first);
}

}  // namespace

Result<> DirtyBitmap::check_size(const std::string& name, uint64_t size, uint32_t granularity) {
    const uint64_t bits = size / granularity + (size % granularity != 0);
    if (bits / 8 > kMaxBytes) {
        return fail(ErrorKind::kTooLarge,
                    "bitmap '{}' of {} bytes with granularity {} needs more than {} MiB; use a larger granularity",
                    name, size, granularity, kMaxBytes >> 20);
    }
    return {};
}

Result<> DirtyBitmap::check_granularity(uint32_t granularity) {
    if (std::has_single_bit(granularity) && granularity >= kMinGranularity && granularity <= kMaxGranularity) return {};
    return fail(ErrorKind::kInvalid, "Granularity must be power of 2 and at least 512");
}

Result<std::shared_ptr<DirtyBitmap>> DirtyBitmap::create(std::string name, uint64_t size, uint32_t granularity) {
    CHECK_OK(check_granularity(granularity));
    CHECK_OK(check_size(name, size, granularity));
    std::shared_ptr<DirtyBitmap> bitmap(new DirtyBitmap(std::move(name), size, granularity));
    CHECK_OK(bitmap->allocate());
    return bitmap;
}

std::shared_ptr<DirtyBitmap> DirtyBitmap::create_inconsistent(std::string name, uint32_t granularity) {
    std::shared_ptr<DirtyBitmap> bitmap(new DirtyBitmap(std::move(name), 0, granularity));
    CHECK(bitmap->allocate().has_value(), "memory for an empty bitmap");
    bitmap->persistent = true;
    bitmap->set_inconsistent();
    return bitmap;
}

DirtyBitmap::DirtyBitmap(std::string name, uint64_t size, uint32_t granularity)
    : name_(std::move(name)),
      size_(size),
      granularity_(granularity),
      shift_(static_cast<unsigned>(std::countr_zero(granularity))),
      word_count_(words_for(granules())) {}

void DirtyBitmap::Words::Free::operator()(uint64_t* p) const { std::free(p); }

bool DirtyBitmap::Words::allocate(uint64_t count) {
    // Large blocks come from the system as pages that do not exist until they are written.
    words_.reset(static_cast<uint64_t*>(std::calloc(std::max<uint64_t>(count, 1), sizeof(uint64_t))));
    return words_ != nullptr;
}

Result<> DirtyBitmap::allocate() {
    if (words_.allocate(word_count_) && summary_.allocate(words_for(words_for(word_count_)))) return {};
    return fail(ErrorKind::kNoMemory, "no memory for bitmap '{}' of {} bytes", name_, word_count_ * 8);
}

template <class Fn>
void DirtyBitmap::for_each_word(uint64_t offset, uint64_t length, Fn fn) const {
    if (offset >= size_ || length == 0) return;
    const uint64_t end = length > size_ - offset ? size_ : offset + length;
    const uint64_t first = offset >> shift_;
    const uint64_t last = (end - 1) >> shift_;
    for (uint64_t index = first / 64; index <= last / 64; index++) {
        const unsigned from = index == first / 64 ? first % 64 : 0;
        const unsigned to = index == last / 64 ? last % 64 + 1 : 64;
        fn(index, bit_range(from, to));
    }
}

// A marker sets the word, then looks at the summary; a clearer clears the summary, then looks at the words again. In
// whatever order they run, one of them sees the other (sequentially consistent), so a dirty word never stays without
// its summary bit.

void DirtyBitmap::set_word(uint64_t index, uint64_t mask) {
    if ((words_[index].load() & mask) != mask) words_[index].fetch_or(mask);
    const uint64_t group = index / 64;
    const uint64_t bit = uint64_t{1} << (group % 64);
    if (!(summary_[group / 64].load() & bit)) summary_[group / 64].fetch_or(bit);
}

void DirtyBitmap::tidy_group(uint64_t group) {
    const auto is_clean = [&] {
        for (uint64_t i = group * 64; i < std::min(group * 64 + 64, word_count_); i++) {
            if (words_[i].load()) return false;
        }
        return true;
    };
    const uint64_t bit = uint64_t{1} << (group % 64);
    if (!(summary_[group / 64].load() & bit) || !is_clean()) return;
    summary_[group / 64].fetch_and(~bit);
    if (!is_clean()) summary_[group / 64].fetch_or(bit);
}

void DirtyBitmap::mark(uint64_t offset, uint64_t length) {
    if (recording()) set_range(offset, length);
}

void DirtyBitmap::set_range(uint64_t offset, uint64_t length) {
    for_each_word(offset, length, [this](uint64_t index, uint64_t mask) { set_word(index, mask); });
}

void DirtyBitmap::clear_range(uint64_t offset, uint64_t length) {
    uint64_t group = 0;
    bool touched = false;  // bits of `group` were cleared
    for_each_word(offset, length, [&](uint64_t index, uint64_t mask) {
        if (touched && index / 64 != group) {
            tidy_group(group);
            touched = false;
        }
        group = index / 64;
        if (!(words_[index].load() & mask)) return;
        words_[index].fetch_and(~mask);
        touched = true;
    });
    if (touched) tidy_group(group);
}

void DirtyBitmap::clear_all() { clear_range(0, size_); }

bool DirtyBitmap::is_dirty(uint64_t offset) const {
    if (offset >= size_) return false;
    const uint64_t granule = offset >> shift_;
    return (words_[granule / 64].load() >> (granule % 64)) & 1;
}

uint64_t DirtyBitmap::find(uint64_t granule, bool dirty, uint64_t last_word) const {
    const uint64_t count = granules();
    uint64_t mask = bit_range(granule % 64, 64);
    for (uint64_t index = granule / 64; index < word_count_; index++, mask = ~uint64_t{0}) {
        if (index > last_word) return index * 64;
        const uint64_t group = index / 64;
        if (dirty && index % 64 == 0 && !((summary_[group / 64].load() >> (group % 64)) & 1)) {
            index += 63;
            continue;
        }
        const uint64_t word = words_[index].load();
        const uint64_t wanted = (dirty ? word : ~word) & mask;
        if (wanted) return std::min<uint64_t>(index * 64 + static_cast<unsigned>(std::countr_zero(wanted)), count);
    }
    return count;
}

uint64_t DirtyBitmap::next_dirty(uint64_t offset) const {
    if (offset >= size_) return size_;
    const uint64_t granule = find(offset >> shift_, true, word_count_);
    return granule == granules() ? size_ : std::max(granule << shift_, offset);
}

uint64_t DirtyBitmap::next_clean(uint64_t offset) const {
    if (offset >= size_) return size_;
    const uint64_t granule = find(offset >> shift_, false, word_count_);
    return granule == granules() ? size_ : std::max(granule << shift_, offset);
}

uint64_t DirtyBitmap::end_of_run(uint64_t offset, bool dirty, uint64_t limit) const {
    if (offset >= size_) return size_;
    const uint64_t granule = find(offset >> shift_, !dirty, (limit >> shift_) / 64);
    return granule >= granules() ? size_ : std::max(granule << shift_, offset);
}

uint64_t DirtyBitmap::dirty_bytes() const {
    uint64_t dirty = 0;
    for (uint64_t i = next_used_word(0); i < word_count_; i = next_used_word(i + 1)) {
        dirty += static_cast<unsigned>(std::popcount(words_[i].load()));
    }
    uint64_t bytes = dirty << shift_;
    const uint64_t rest = size_ & (granularity_ - 1);
    if (rest && is_dirty(size_ - 1)) bytes -= granularity_ - rest;
    return bytes;
}

Result<> DirtyBitmap::check_merge(const DirtyBitmap& other) const {
    if (other.size_ == size_) return {};
    return fail(ErrorKind::kInvalid,
                "Bitmaps are of different sizes (destination size is {}, source size is {}) and can't be merged; "
                "bitmap '{}' into bitmap '{}'",
                size_, other.size_, other.name_, name_);
}

Result<> DirtyBitmap::merge(const DirtyBitmap& other) {
    CHECK_OK(check_merge(other));
    for (uint64_t pos = other.next_dirty(0); pos < size_;) {
        const uint64_t end = other.next_clean(pos);
        set_range(pos, end - pos);
        pos = other.next_dirty(end);
    }
    return {};
}

std::shared_ptr<DirtyBitmap> DirtyBitmap::snapshot(std::string name) const {
    std::shared_ptr<DirtyBitmap> copy(new DirtyBitmap(std::move(name), size_, granularity_));
    CHECK(copy->allocate().has_value(), "memory for the copy of a bitmap");
    copy->set_recording(false);
    copy->assign(*this);
    return copy;
}

void DirtyBitmap::assign(const DirtyBitmap& other) {
    CHECK(other.size_ == size_ && other.granularity_ == granularity_, "bits are taken from a bitmap of the same shape");
    clear_all();
    for (uint64_t i = other.next_used_word(0); i < word_count_; i = other.next_used_word(i + 1)) {
        if (const uint64_t bits = other.words_[i].load()) set_word(i, bits);
    }
}

void DirtyBitmap::set_inconsistent() {
    inconsistent = true;
    update_recording();
    clear_all();
}

uint64_t DirtyBitmap::valid_bits(uint64_t index) const {
    const uint64_t count = granules();
    return index + 1 < word_count_ || count % 64 == 0 ? ~uint64_t{0} : bit_range(0, count % 64);
}

void DirtyBitmap::or_word(uint64_t index, uint64_t bits) {
    bits &= valid_bits(index);
    if (bits) set_word(index, bits);
}

uint64_t DirtyBitmap::next_used_word(uint64_t index) const {
    for (; index < word_count_; index = (index / 64 + 1) * 64) {
        const uint64_t group = index / 64;
        if ((summary_[group / 64].load() >> (group % 64)) & 1) return index;
    }
    return word_count_;
}

Result<> DirtyBitmap::resize(uint64_t new_size) {
    if (inconsistent) return {};
    if (busy)
        return fail(ErrorKind::kBusy, "bitmap '{}' is in use by another operation and cannot change its size", name_);
    CHECK_OK(check_size(name_, new_size, granularity_));
    DirtyBitmap resized(name_, new_size, granularity_);
    CHECK_OK(resized.allocate());
    const uint64_t common = std::min(word_count_, resized.word_count_);
    for (uint64_t i = next_used_word(0); i < common; i = next_used_word(i + 1)) {
        if (const uint64_t word = words_[i].load()) resized.set_word(i, word);
    }
    const uint64_t kept = resized.granules();
    if (new_size > size_ && !persistent) resized.set_range(size_, new_size - size_);
    // A shorter bitmap has no bits above its end.
    if (new_size < size_ && kept % 64) resized.words_[kept / 64].fetch_and(~bit_range(kept % 64, 64));
    size_ = new_size;
    word_count_ = resized.word_count_;
    words_ = std::move(resized.words_);
    summary_ = std::move(resized.summary_);
    return {};
}

}  // namespace gantry::block
