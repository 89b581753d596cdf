// ProgressBar: how far a long operation is, on the standard error stream.

#pragma once

#include <cstdint>
#include <string>

namespace gantry::cli::image {

/// One line that is written over and over; nothing is written before the first update(). Main thread.
class ProgressBar {
  public:
    ProgressBar() = default;
    ~ProgressBar() { finish(false); }
    ProgressBar(const ProgressBar&) = delete;

    /// What the next updates are about. `shown`: else they write nothing.
    void begin(std::string what, bool shown);
    void update(uint64_t done, uint64_t total);
    /// Ends the line, before anything else is printed; with `complete` it says 100% first.
    void finish(bool complete);

  private:
    void draw(int percent);

    std::string what_;
    bool shown_ = false;
    int last_ = -1;  // percent; -1: nothing on the line
};

}  // namespace gantry::cli::image
