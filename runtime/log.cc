#include "runtime/log.h"

#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <string>

#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

namespace gantry::log {

namespace {

std::atomic<int> current_level{static_cast<int>(Level::kInfo)};

spdlog::level::level_enum spdlog_level(Level level) {
    switch (level) {
        case Level::kDebug:
            return spdlog::level::debug;
        case Level::kInfo:
            return spdlog::level::info;
        case Level::kWarn:
            return spdlog::level::warn;
        case Level::kError:
            return spdlog::level::err;
        case Level::kOff:
            break;
    }
    return spdlog::level::off;
}

bool stderr_is_journal() {
    // systemd tells device and inode of the stream; a redirected stderr is another one.
    const char* stream = std::getenv("JOURNAL_STREAM");
    struct stat st;
    return stream && ::fstat(STDERR_FILENO, &st) == 0 && fmt::format("{}:{}", st.st_dev, st.st_ino) == stream;
}

/// Under the journal each line begins with its priority ("<6>") and has no time of its own; elsewhere with time and
/// level.
std::shared_ptr<spdlog::logger> make_logger() {
    auto logger = std::make_shared<spdlog::logger>("gantry", std::make_shared<spdlog::sinks::stderr_sink_mt>());
    logger->set_level(spdlog::level::trace);
    logger->flush_on(spdlog::level::trace);
    logger->set_pattern(stderr_is_journal() ? "%v" : "%Y-%m-%d %H:%M:%S.%e %l: %v");
    return logger;
}

struct Output {
    std::shared_ptr<spdlog::logger> logger = make_logger();
    bool journal = stderr_is_journal();
};

Output& output() {
    static auto* out = new Output;  // never destroyed: threads may log until the process ends
    return *out;
}

const char* journal_priority(Level level) {
    switch (level) {
        case Level::kDebug:
            return "<7>";
        case Level::kInfo:
            return "<6>";
        case Level::kWarn:
            return "<4>";
        default:
            return "<3>";
    }
}

}  // namespace

void set_level(Level level) { current_level.store(static_cast<int>(level), std::memory_order_relaxed); }

bool enabled(Level level) {
    return level != Level::kOff && static_cast<int>(level) >= current_level.load(std::memory_order_relaxed);
}

void write(Level level, std::string_view message) {
    Output& out = output();
    std::string line(out.journal ? journal_priority(level) : "");
    line.append(message);
    // Names in a message may come from outside: a control character must not start a second line or drive a terminal.
    for (char& c : line) {
        if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
    }
    out.logger->log(spdlog_level(level), "{}", line);
}

}  // namespace gantry::log
