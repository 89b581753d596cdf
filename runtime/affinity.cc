#include "runtime/affinity.h"

#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <charconv>
#include <cstring>
#include <string_view>

#include "runtime/unique_fd.h"

namespace gantry {

namespace {

cpu_set_t process_cpus;
std::atomic<bool> known{false};

}  // namespace

void note_process_cpus() {
    if (known.load(std::memory_order_acquire)) return;
    if (::sched_getaffinity(0, sizeof process_cpus, &process_cpus) == 0) known.store(true, std::memory_order_release);
}

bool keep_thread_on(int cpu) {
    if (!known.load(std::memory_order_acquire) || cpu < 0 || cpu >= CPU_SETSIZE) return false;
    if (!CPU_ISSET(static_cast<size_t>(cpu), &process_cpus)) return false;
    cpu_set_t one;
    CPU_ZERO(&one);
    CPU_SET(static_cast<size_t>(cpu), &one);
    return ::sched_setaffinity(0, sizeof one, &one) == 0;
}

void spread_thread() {
    if (known.load(std::memory_order_acquire)) (void)::sched_setaffinity(0, sizeof process_cpus, &process_cpus);
}

int cpu_of_thread(int tid) {
    // proc_pid_stat(5): field 39, counted from behind the command's closing parenthesis (field 2).
    constexpr int kProcessor = 39;
    char path[32] = "/proc/";
    char* end = std::to_chars(path + 6, path + 24, tid).ptr;
    std::memcpy(end, "/stat", 6);
    const UniqueFd fd(::open(path, O_RDONLY | O_CLOEXEC));
    if (!fd) return -1;
    char text[1024];
    const ssize_t n = ::read(fd.get(), text, sizeof text);
    if (n <= 0) return -1;
    std::string_view rest(text, static_cast<size_t>(n));
    rest.remove_prefix(std::min(rest.rfind(')') + 1, rest.size()));
    for (int field = 3; field < kProcessor; ++field) {
        const size_t space = rest.find(' ', 1);
        if (space == std::string_view::npos) return -1;
        rest.remove_prefix(space);
    }
    rest.remove_prefix(1);
    int cpu = -1;
    std::from_chars(rest.data(), rest.data() + rest.size(), cpu);
    return cpu;
}

}  // namespace gantry
