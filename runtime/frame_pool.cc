#include "runtime/frame_pool.h"

#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define GANTRY_PLAIN_FRAMES 1
#endif
#endif

namespace gantry {

#ifdef GANTRY_PLAIN_FRAMES

void* frame_alloc(size_t size) { return ::operator new(size); }
void frame_free(void* frame, size_t) noexcept { ::operator delete(frame); }

#else

namespace {

constexpr size_t kUnit = 64;
constexpr size_t kMaxPooled = 4096;
constexpr size_t kClasses = kMaxPooled / kUnit;
constexpr size_t kMaxBytesPerClass = 256 * 1024;

struct FreeFrame {
    FreeFrame* next;
};

// Plain data: no constructor or destructor runs, so frames may be freed at any moment of a thread's life.
struct FreeLists {
    FreeFrame* head[kClasses];
    uint32_t count[kClasses];
    bool enabled;   // between the first allocation and the thread's exit
    bool finished;  // the thread is exiting: nothing is kept any more
};
constinit thread_local FreeLists lists{};

struct ReleaseAtExit {
    ~ReleaseAtExit() {
        lists.enabled = false;
        lists.finished = true;
        for (auto*& head : lists.head) {
            while (head) std::free(std::exchange(head, head->next));
        }
    }
};

[[gnu::noinline]] void* allocate_fresh(size_t size) {
    if (!lists.enabled && !lists.finished) {
        static thread_local ReleaseAtExit at_exit;
        (void)at_exit;
        lists.enabled = true;
    }
    void* memory = std::malloc(size);
    if (!memory) [[unlikely]]
        std::abort();
    return memory;
}

}  // namespace

void* frame_alloc(size_t size) {
    const size_t index = (size - 1) / kUnit;
    if (index >= kClasses) return allocate_fresh(size);
    FreeLists& mine = lists;
    if (FreeFrame* frame = mine.head[index]) {
        mine.head[index] = frame->next;
        --mine.count[index];
        return frame;
    }
    return allocate_fresh((index + 1) * kUnit);
}

void frame_free(void* frame, size_t size) noexcept {
    const size_t index = (size - 1) / kUnit;
    FreeLists& mine = lists;
    if (index >= kClasses || !mine.enabled || mine.count[index] * (index + 1) * kUnit >= kMaxBytesPerClass) {
        std::free(frame);
        return;
    }
    auto* free_frame = static_cast<FreeFrame*>(frame);
    free_frame->next = mine.head[index];
    mine.head[index] = free_frame;
    ++mine.count[index];
}

#endif

}  // namespace gantry
