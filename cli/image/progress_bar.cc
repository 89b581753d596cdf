#include "cli/image/progress_bar.h"

#include <algorithm>
#include <cstdio>

namespace gantry::cli::image {

void ProgressBar::begin(std::string what, bool shown) {
    finish(false);
    what_ = std::move(what);
    shown_ = shown;
}

void ProgressBar::update(uint64_t done, uint64_t total) {
    if (!shown_) return;
    const double part = total == 0 ? 1.0 : static_cast<double>(done) / static_cast<double>(total);
    const int percent = static_cast<int>(std::clamp(part, 0.0, 1.0) * 100);
    if (percent != last_) draw(percent);
}

void ProgressBar::finish(bool complete) {
    if (last_ < 0) return;
    if (complete && last_ < 100) draw(100);
    std::fputs("\n", stderr);
    last_ = -1;
}

void ProgressBar::draw(int percent) {
    constexpr int kWidth = 40;
    last_ = percent;
    const auto filled = static_cast<size_t>(percent * kWidth / 100);
    const std::string bar = std::string(filled, '#') + std::string(kWidth - filled, ' ');
    std::fprintf(stderr, "\r%s [%s] %3d%%", what_.c_str(), bar.c_str(), percent);
    std::fflush(stderr);
}

}  // namespace gantry::cli::image
