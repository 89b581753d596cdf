#include "runtime/buffer.h"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdlib>

#include "runtime/check.h"

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GANTRY_PLAIN_BUFFERS 1
#endif
#endif

namespace gantry {

#ifdef GANTRY_PLAIN_BUFFERS

// Exact sizes, never recycled: the sanitizer sees every overrun and every use after free.
Result<Buffer> Buffer::try_alloc(size_t size) {
    Buffer b;
    if (size == 0) return b;
    void* memory = nullptr;
    if (size > PTRDIFF_MAX / 2 || ::posix_memalign(&memory, 4096, size) != 0) {
        return fail(ErrorKind::kNoMemory, "cannot allocate {} bytes", size);
    }
    b.data_ = static_cast<uint8_t*>(memory);
    b.size_ = size;
    return b;
}

void Buffer::reset() {
    std::free(std::exchange(data_, nullptr));
    size_ = 0;
}

void buffer_cache_trim() {}

#else

namespace {

constexpr size_t kAlign = 4096;
constexpr unsigned kMinShift = 12;                        // 4 KiB
constexpr unsigned kMaxShift = 25;                        // 32 MiB
constexpr unsigned kClasses = kMaxShift - kMinShift + 1;  // classes 1..kClasses
constexpr uint32_t kUncached = 0xffffffff;                // larger than the largest class: a mapping of its own
constexpr size_t kMapFrom = 128 * 1024;                   // from here on memory is mapped, below it comes from the heap
constexpr size_t kMaxCachedBytes = 16 * 1024 * 1024;

size_t class_bytes(uint32_t size_class) { return size_t{1} << (kMinShift + size_class - 1); }

void* map_memory(size_t bytes) {
    void* p = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return p == MAP_FAILED ? nullptr : p;
}

void* fresh_memory(size_t bytes) { return bytes >= kMapFrom ? map_memory(bytes) : std::aligned_alloc(kAlign, bytes); }

void free_memory(void* memory, size_t bytes) {
    if (bytes >= kMapFrom) {
        ::munmap(memory, bytes);
    } else {
        std::free(memory);
    }
}

struct FreeBuffer {
    FreeBuffer* next;
};

// Plain data, so that buffers may be freed at any moment of a thread's life (see frame_pool.cc).
struct Cache {
    FreeBuffer* head[kClasses + 1];
    size_t bytes;
    bool enabled;
    bool finished;
};
constinit thread_local Cache cache{};

struct TrimAtExit {
    ~TrimAtExit() {
        cache.enabled = false;
        cache.finished = true;
        buffer_cache_trim();
    }
};

void* cached_memory(uint32_t size_class) {
    if (FreeBuffer* b = cache.head[size_class]) {
        cache.head[size_class] = b->next;
        cache.bytes -= class_bytes(size_class);
        return b;
    }
    if (!cache.enabled && !cache.finished) {
        static thread_local TrimAtExit at_exit;
        (void)at_exit;
        cache.enabled = true;
    }
    return fresh_memory(class_bytes(size_class));
}

void recycle(void* memory, uint32_t size_class) {
    const size_t bytes = class_bytes(size_class);
    if (!cache.enabled || cache.bytes + bytes > kMaxCachedBytes) {
        free_memory(memory, bytes);
        return;
    }
    auto* b = static_cast<FreeBuffer*>(memory);
    b->next = cache.head[size_class];
    cache.head[size_class] = b;
    cache.bytes += bytes;
}

}  // namespace

Result<Buffer> Buffer::try_alloc(size_t size) {
    Buffer b;
    if (size == 0) return b;
    void* memory = nullptr;
    if (size > (size_t{1} << kMaxShift)) {
        b.class_ = kUncached;
        if (size <= PTRDIFF_MAX - kAlign) memory = map_memory(size);
    } else {
        const unsigned shift = std::max<unsigned>(kMinShift, std::bit_width(size - 1));
        b.class_ = shift - kMinShift + 1;
        memory = cached_memory(b.class_);
    }
    if (!memory) {
        b.class_ = 0;
        return fail(ErrorKind::kNoMemory, "cannot allocate {} bytes", size);
    }
    b.data_ = static_cast<uint8_t*>(memory);
    b.size_ = size;
    return b;
}

void Buffer::reset() {
    if (!data_) return;
    if (class_ == kUncached) {
        ::munmap(data_, size_);
    } else {
        recycle(data_, class_);
    }
    data_ = nullptr;
    size_ = 0;
    class_ = 0;
}

void buffer_cache_trim() {
    for (uint32_t c = 1; c <= kClasses; ++c) {
        while (FreeBuffer* b = cache.head[c]) {
            cache.head[c] = b->next;
            free_memory(b, class_bytes(c));
        }
    }
    cache.bytes = 0;
}

#endif

Buffer Buffer::alloc(size_t size) {
    auto b = try_alloc(size);
    CHECK(b, "out of memory for a buffer whose size our own limits bound");
    return std::move(*b);
}

}  // namespace gantry
