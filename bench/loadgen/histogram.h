#pragma once

#include <array>
#include <bit>
#include <cstdint>

namespace gantry::bench {

/// Latencies in nanoseconds, in buckets of 1/64 of a power of two (relative error below 1.6 %).
/// One thread records; another may merge once that thread has ended.
class Histogram {
  public:
    void record(uint64_t nanoseconds) {
        buckets_[index(nanoseconds)]++;
        count_++;
        sum_ += nanoseconds;
        if (nanoseconds > max_) max_ = nanoseconds;
    }

    void merge(const Histogram& other) {
        for (unsigned i = 0; i < kBuckets; i++) buckets_[i] += other.buckets_[i];
        count_ += other.count_;
        sum_ += other.sum_;
        if (other.max_ > max_) max_ = other.max_;
    }

    uint64_t count() const { return count_; }
    double mean() const { return count_ ? static_cast<double>(sum_) / static_cast<double>(count_) : 0; }
    double max() const { return static_cast<double>(max_); }

    /// The middle of the bucket that holds the given fraction (0..1) of all records; 0 when there are none.
    double quantile(double fraction) const {
        const auto wanted = static_cast<uint64_t>(fraction * static_cast<double>(count_));
        uint64_t seen = 0;
        for (unsigned i = 0; i < kBuckets; i++) {
            seen += buckets_[i];
            if (buckets_[i] && seen >= wanted) return (lower_bound(i) + lower_bound(i + 1)) / 2;
        }
        return 0;
    }

  private:
    static constexpr unsigned kSubBits = 6;
    static constexpr unsigned kSub = 1u << kSubBits;
    static constexpr unsigned kBuckets = (64 - kSubBits + 1) * kSub;

    static unsigned index(uint64_t value) {
        if (value < kSub) return static_cast<unsigned>(value);
        const unsigned shift = static_cast<unsigned>(std::bit_width(value)) - 1 - kSubBits;
        return (shift + 1) * kSub + static_cast<unsigned>((value >> shift) & (kSub - 1));
    }

    static double lower_bound(unsigned bucket) {
        if (bucket < kSub) return bucket;
        const unsigned shift = bucket / kSub - 1;
        return static_cast<double>(kSub + bucket % kSub) * static_cast<double>(uint64_t{1} << shift);
    }

    std::array<uint64_t, kBuckets> buckets_{};
    uint64_t count_ = 0;
    uint64_t sum_ = 0;
    uint64_t max_ = 0;
};

}  // namespace gantry::bench
