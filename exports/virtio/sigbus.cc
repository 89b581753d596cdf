#include "exports/virtio/sigbus.h"

#include <signal.h>
#include <sys/mman.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <mutex>
#include <vector>

#include "runtime/check.h"

namespace gantry::virtio::sigbus {

namespace {

/// Written under the table's mutex, read by the handler, which may not wait for anybody.
struct Slot {
    std::atomic<uintptr_t> base{0};
    std::atomic<size_t> length{0};  // 0: free
    std::atomic<size_t> page{0};
    std::atomic<bool> hit{false};
};

constexpr size_t kBlockSlots = 256;

/// Blocks are added and never go away, as the handler may be looking at them.
struct Block {
    std::array<Slot, kBlockSlots> slots;
    std::atomic<Block*> next{nullptr};
};

struct Table {
    Block first;
    std::mutex mutex;
    std::vector<size_t> free;
    size_t made = 0;
    bool installed = false;
};

/// Never destroyed: mappings may outlive static objects.
Table& table() {
    static Table& the_table = *new Table;
    return the_table;
}
// What the handler reads; set before it is installed.
Block* first_block = nullptr;
struct sigaction before;

Slot& slot_at(size_t index) {
    Block* block = &table().first;
    for (; index >= kBlockSlots; index -= kBlockSlots) block = block->next.load(std::memory_order_acquire);
    return block->slots[index];
}

/// Async-signal-safe. The range that the access belongs to is in the table as long as the access lasts; what others add
/// and remove meanwhile is seen with length 0 or not at all.
bool repair(uintptr_t address) {
    for (Block* block = first_block; block; block = block->next.load(std::memory_order_acquire)) {
        for (Slot& slot : block->slots) {
            const size_t length = slot.length.load(std::memory_order_acquire);
            const uintptr_t base = slot.base.load(std::memory_order_acquire);
            const size_t page = slot.page.load(std::memory_order_acquire);
            if (length == 0 || address - base >= length) continue;
            if (slot.length.load(std::memory_order_acquire) != length) continue;
            const uintptr_t from = address - (address - base) % page;
            // A file loses its end: everything behind the fault has gone, too.
            void* const zeroes = ::mmap(reinterpret_cast<void*>(from), base + length - from, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
            if (zeroes == MAP_FAILED) return false;
            slot.hit.store(true, std::memory_order_release);
            return true;
        }
    }
    return false;
}

void on_sigbus(int signal, siginfo_t* info, void* context) {
    const int saved = errno;
    // Positive codes are faults; others were sent by somebody.
    const bool repaired = info->si_code > 0 && repair(reinterpret_cast<uintptr_t>(info->si_addr));
    errno = saved;
    if (repaired) return;
    if (before.sa_flags & SA_SIGINFO) return before.sa_sigaction(signal, info, context);
    if (before.sa_handler == SIG_IGN && info->si_code <= 0) return;
    if (before.sa_handler != SIG_DFL && before.sa_handler != SIG_IGN) return before.sa_handler(signal);
    // As if we were not here: the access is repeated and ends the process.
    struct sigaction standard{};
    standard.sa_handler = SIG_DFL;
    ::sigaction(SIGBUS, &standard, nullptr);
    if (info->si_code <= 0) ::raise(SIGBUS);
}

void install(Table& t) {
    if (t.installed) return;
    t.installed = true;
    first_block = &t.first;
    struct sigaction ours{};
    ours.sa_sigaction = on_sigbus;
    ours.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
    ::sigemptyset(&ours.sa_mask);
    CHECK(::sigaction(SIGBUS, nullptr, &before) == 0 && ::sigaction(SIGBUS, &ours, nullptr) == 0,
          "SIGBUS can be handled");
}

}  // namespace

size_t watch(void* base, size_t length, size_t page) {
    Table& t = table();
    const std::lock_guard lock(t.mutex);
    install(t);
    size_t index;
    if (!t.free.empty()) {
        index = t.free.back();
        t.free.pop_back();
    } else {
        index = t.made++;
        if (index % kBlockSlots == 0 && index != 0) {
            Block* last = &t.first;
            while (Block* next = last->next.load(std::memory_order_relaxed)) last = next;
            last->next.store(new Block, std::memory_order_release);
        }
        t.free.reserve(t.made);  // forget() does not allocate
    }
    Slot& slot = slot_at(index);
    slot.hit.store(false, std::memory_order_relaxed);
    slot.page.store(page, std::memory_order_release);
    slot.base.store(reinterpret_cast<uintptr_t>(base), std::memory_order_release);
    slot.length.store(length, std::memory_order_release);
    return index;
}

void forget(size_t index) {
    Table& t = table();
    const std::lock_guard lock(t.mutex);
    slot_at(index).length.store(0, std::memory_order_release);
    t.free.push_back(index);
}

bool hit(size_t index) { return slot_at(index).hit.load(std::memory_order_acquire); }

}  // namespace gantry::virtio::sigbus
