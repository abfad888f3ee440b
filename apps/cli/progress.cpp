#include "progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "console.h"

namespace sparvar::cli {
namespace {

constexpr std::size_t bar_width = 30;

/// What was just finished.
std::string describe(const Progress& progress) {
  switch (progress.stage) {
    case Progress::Stage::load:
      return "model loaded";
    case Progress::Stage::text:
      return "prompts encoded";
    case Progress::Stage::decode:
      return "pictures decoded";
    case Progress::Stage::scale:
      break;
  }
  return fmt::format("scale {}/{} ({}x{})", progress.done, progress.total, progress.grid.h, progress.grid.w);
}

std::string bar(const Progress& progress) {
  const double share = std::clamp(static_cast<double>(progress.done) / std::max(progress.total, 1), 0.0, 1.0);
  const auto filled = static_cast<std::size_t>(static_cast<double>(bar_width) * share);
  return std::string(filled, '#') + std::string(bar_width - filled, '.');
}

}  // namespace

ProgressDisplay::ProgressDisplay(bool quiet) : quiet_(quiet), terminal_(stderr_is_terminal()) {}

ProgressDisplay::~ProgressDisplay() { clear(); }

void ProgressDisplay::show(const Progress& progress) {
  if (quiet_) return;
  std::string line;
  if (terminal_) {
    const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start_;
    line = fmt::format("\r[{}] {}, {:.1f} s\x1B[K", bar(progress), describe(progress), elapsed.count());
    drawn_ = true;
  } else {
    line = fmt::format("{}, {:.2f} s\n", describe(progress), progress.seconds);
  }
  std::fwrite(line.data(), 1, line.size(), stderr);
}

void ProgressDisplay::clear() {
  if (drawn_) std::fputs("\r\x1B[K", stderr);
  drawn_ = false;
}

}  // namespace sparvar::cli
