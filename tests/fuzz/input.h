// What fuzz targets read their input with, and how they say that something does not hold.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace gantry::fuzz {

inline void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "does not hold: %s\n", what);
    std::abort();
}
#define EXPECT(condition) ::gantry::fuzz::expect(condition, #condition)

class Input {
  public:
    Input(const uint8_t* data, size_t size) : data_(data), size_(size) {}
    bool empty() const { return size_ == 0; }
    uint8_t byte() {
        uint8_t value = 0;
        fill(&value, 1);
        return value;
    }
    uint16_t word() {
        uint16_t value = 0;
        fill(&value, 2);
        return value;
    }
    /// What is not there is 0.
    void fill(void* to, size_t n) {
        if (n == 0) return;
        const size_t have = std::min(n, size_);
        std::memset(to, 0, n);
        if (have) std::memcpy(to, data_, have);
        data_ += have;
        size_ -= have;
    }

  private:
    const uint8_t* data_;
    size_t size_;
};

}  // namespace gantry::fuzz
