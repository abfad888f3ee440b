#include "progress.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstdio>

#include "console.h"
#include "flags.h"

namespace sparvar::cli {
namespace {

constexpr std::size_t bar_width = 30;
constexpr std::chrono::seconds kBetweenLines{2};

/// What was just finished.
std::string describe(const Progress& progress) {
  switch (progress.stage) {
    case Progress::Stage::load:
      if (progress.bytes_done < progress.bytes_total)
        return fmt::format("loading, {} of {}", bytes_text(progress.bytes_done), bytes_text(progress.bytes_total));
      return fmt::format("model loaded ({})", bytes_text(progress.bytes_total));
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
  const bool loading = progress.stage == Progress::Stage::load;
  const auto done = static_cast<double>(loading ? progress.bytes_done : progress.done);
  const auto total = static_cast<double>(loading ? progress.bytes_total : progress.total);
  const double share = std::clamp(done / std::max(total, 1.0), 0.0, 1.0);
  const auto filled = static_cast<std::size_t>(static_cast<double>(bar_width) * share);
  return std::string(filled, '#') + std::string(bar_width - filled, '.');
}

}  // namespace

StatusLine::StatusLine(bool quiet) : quiet_(quiet), terminal_(stderr_is_terminal()) {}

double StatusLine::seconds() const {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
}

void StatusLine::write(const std::string& line) {
  const std::string text = terminal_ ? "\r" + line + "\x1B[K" : line + "\n";
  std::fwrite(text.data(), 1, text.size(), stderr);
  drawn_ = terminal_;
}

void StatusLine::clear() {
  if (drawn_) std::fputs("\r\x1B[K", stderr);
  drawn_ = false;
}

void ProgressDisplay::show(const Progress& progress) {
  if (line_.quiet()) return;
  // Lines are for what is done; of a long loading every few seconds one says how far it is.
  const auto now = std::chrono::steady_clock::now();
  const bool unfinished = progress.bytes_done < progress.bytes_total;
  if (!line_.terminal() && unfinished && now - last_line_ < kBetweenLines) return;
  last_line_ = now;
  line_.write(line_.terminal() ? fmt::format("[{}] {}, {:.1f} s", bar(progress), describe(progress), line_.seconds())
                               : fmt::format("{}, {:.2f} s", describe(progress), progress.seconds));
}

void StepDisplay::show(int done, int total, const std::string& what) {
  if (line_.quiet() || (!line_.terminal() && done == last_done_)) return;
  if (first_done_ < 0) first_done_ = done;
  last_done_ = done;
  const double seconds = line_.seconds();
  std::string left;
  if (done > first_done_ && done < total)
    left = fmt::format(", about {:.0f} s left", seconds / (done - first_done_) * (total - done));
  line_.write(fmt::format("{}/{} ({}), {:.1f} s{}", done, total, what, seconds, left));
}

void BytesDisplay::show(std::int64_t done, std::int64_t total, const std::string& what) {
  constexpr std::chrono::milliseconds kBetweenFrames{100};
  const auto now = std::chrono::steady_clock::now();
  const bool last = done >= total;
  if (line_.quiet() ||
      (!last && now - last_ < (line_.terminal() ? std::chrono::milliseconds(kBetweenFrames) : kBetweenLines)))
    return;
  last_ = now;
  const double seconds = line_.seconds();
  const double share = static_cast<double>(done) / static_cast<double>(std::max<std::int64_t>(total, 1));
  const std::string left =
      last || share <= 0 ? std::string() : fmt::format(", about {:.0f} s left", seconds * (1 - share) / share);
  line_.write(fmt::format("{:3.0f} % of {} ({}), {:.1f} s{}", 100 * share, bytes_text(total), what, seconds, left));
}

}  // namespace sparvar::cli
