// Logging: error = an operator must act; warn = degraded but working; info = life-cycle events; debug = per
// negotiation.

#pragma once

#include <fmt/format.h>

#include <string_view>

namespace gantry::log {

enum class Level { kDebug, kInfo, kWarn, kError, kOff };

/// Set once at start-up, before threads exist. Output goes to stderr, one line each.
void set_level(Level level);
bool enabled(Level level);
/// Any thread.
void write(Level level, std::string_view message);

template <class... Args>
void debug(fmt::format_string<Args...> f, Args&&... args) {
    if (enabled(Level::kDebug)) write(Level::kDebug, fmt::format(f, std::forward<Args>(args)...));
}
template <class... Args>
void info(fmt::format_string<Args...> f, Args&&... args) {
    if (enabled(Level::kInfo)) write(Level::kInfo, fmt::format(f, std::forward<Args>(args)...));
}
template <class... Args>
void warn(fmt::format_string<Args...> f, Args&&... args) {
    if (enabled(Level::kWarn)) write(Level::kWarn, fmt::format(f, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> f, Args&&... args) {
    if (enabled(Level::kError)) write(Level::kError, fmt::format(f, std::forward<Args>(args)...));
}

}  // namespace gantry::log
