// Fields in memory that a client writes at the same time.

#pragma once

#include <atomic>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace gantry::virtio {

static_assert(std::endian::native == std::endian::little, "rings of VIRTIO 1 are little-endian");

/// One load: what was checked is what is used, whatever the client does meanwhile. `at` is aligned.
template <class T>
inline T load(const std::byte* at, std::memory_order order = std::memory_order_relaxed) {
    return std::atomic_ref<T>(*reinterpret_cast<T*>(const_cast<std::byte*>(at))).load(order);
}

template <class T>
inline void store(std::byte* at, T value, std::memory_order order = std::memory_order_relaxed) {
    std::atomic_ref<T>(*reinterpret_cast<T*>(at)).store(value, order);
}

}  // namespace gantry::virtio
