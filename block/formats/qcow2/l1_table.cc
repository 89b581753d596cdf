#include "block/formats/qcow2/l1_table.h"

#include <algorithm>
#include <cstdlib>
#include <new>

#include "runtime/check.h"

namespace gantry::block::qcow2 {

void L1Table::Free::operator()(std::atomic<uint64_t>* words) const { std::free(words); }

void L1Table::assign(std::span<const uint64_t> words, uint64_t entries) {
    changed_.clear();
    size_ = std::max<uint64_t>(entries, words.size());
    // Large callocs are pages that nobody touched: a sparse table of a huge disk costs what is used of it.
    static_assert(std::atomic<uint64_t>::is_always_lock_free && sizeof(std::atomic<uint64_t>) == 8);
    words_.reset(static_cast<std::atomic<uint64_t>*>(std::calloc(std::max<uint64_t>(size_, 1), 8)));
    if (!words_) throw std::bad_alloc();
    for (size_t i = 0; i < words.size(); i++) {
        if (words[i] != 0) words_[i].store(words[i], std::memory_order_relaxed);
    }
}

void L1Table::set(uint64_t index, uint64_t word) {
    CHECK(index < size_, "an L1 entry inside the table");
    words_[index].store(word, std::memory_order_release);
    changed_.push_back(index);
}

std::vector<std::pair<uint64_t, uint64_t>> L1Table::take_changes() {
    std::ranges::sort(changed_);
    std::vector<std::pair<uint64_t, uint64_t>> taken;
    taken.reserve(changed_.size());
    for (const uint64_t index : changed_) {
        if (taken.empty() || taken.back().first != index) taken.emplace_back(index, get(index));
    }
    changed_.clear();
    return taken;
}

}  // namespace gantry::block::qcow2
