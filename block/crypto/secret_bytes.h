// SecretBytes: keys and passphrases in memory that is wiped when it is given up.

#pragma once

#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string_view>
#include <utility>

namespace gantry::block::crypto {

/// Overwrites memory in a way the compiler does not leave out.
inline void wipe(void* data, size_t bytes) { ::explicit_bzero(data, bytes); }

/// Owned bytes of a fixed length; moved, never copied by accident.
class SecretBytes {
  public:
    SecretBytes() = default;
    /// Zeroes.
    explicit SecretBytes(size_t size) : data_(std::make_unique<uint8_t[]>(size)), size_(size) {}
    explicit SecretBytes(std::span<const uint8_t> bytes) : SecretBytes(bytes.size()) {
        if (size_) std::memcpy(data_.get(), bytes.data(), size_);
    }
    explicit SecretBytes(std::string_view text)
        : SecretBytes(std::span(reinterpret_cast<const uint8_t*>(text.data()), text.size())) {}
    SecretBytes(SecretBytes&& o) noexcept : data_(std::move(o.data_)), size_(std::exchange(o.size_, 0)) {}
    SecretBytes& operator=(SecretBytes&& o) noexcept {
        if (this != &o) {
            clear();
            data_ = std::move(o.data_);
            size_ = std::exchange(o.size_, 0);
        }
        return *this;
    }
    ~SecretBytes() { clear(); }

    SecretBytes copy() const { return SecretBytes(span()); }
    uint8_t* data() { return data_.get(); }
    const uint8_t* data() const { return data_.get(); }
    size_t size() const { return size_; }
    bool empty() const { return size_ == 0; }
    std::span<uint8_t> span() { return {data_.get(), size_}; }
    std::span<const uint8_t> span() const { return {data_.get(), size_}; }
    std::string_view text() const { return {reinterpret_cast<const char*>(data_.get()), size_}; }
    void clear() {
        if (data_) wipe(data_.get(), size_);
        data_.reset();
        size_ = 0;
    }

  private:
    std::unique_ptr<uint8_t[]> data_;
    size_t size_ = 0;
};

}  // namespace gantry::block::crypto
