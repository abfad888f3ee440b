// Progress of loading and by scale on stderr: a bar that is redrawn on a terminal, a line per scale elsewhere.
#pragma once

#include <chrono>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

class ProgressDisplay {
 public:
  explicit ProgressDisplay(bool quiet);
  ~ProgressDisplay();
  ProgressDisplay(const ProgressDisplay&) = delete;
  ProgressDisplay& operator=(const ProgressDisplay&) = delete;

  void show(const Progress& progress);
  /// Takes the bar away, so that other text starts on a clean line.
  void clear();

 private:
  bool quiet_;
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point last_line_ = start_;
};

}  // namespace sparvar::cli
