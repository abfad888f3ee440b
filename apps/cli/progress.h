// Progress of loading and by scale on stderr: a bar that is redrawn on a terminal, a line per scale elsewhere.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

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

/// Progress of long work in steps: a line that is redrawn on a terminal, elsewhere a line whenever a step is done.
class StepDisplay {
 public:
  explicit StepDisplay(bool quiet);
  ~StepDisplay();
  StepDisplay(const StepDisplay&) = delete;
  StepDisplay& operator=(const StepDisplay&) = delete;

  /// `done` of `total` steps are finished, `what` begins.
  void show(int done, int total, const std::string& what);
  void clear();

 private:
  bool quiet_;
  bool terminal_;
  bool drawn_ = false;
  int first_done_ = -1;  // at the first call: what a run that goes on had already
  int last_done_ = -1;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Progress of long work by bytes: a line that is redrawn on a terminal, elsewhere one every few seconds.
class BytesDisplay {
 public:
  explicit BytesDisplay(bool quiet);
  ~BytesDisplay();
  BytesDisplay(const BytesDisplay&) = delete;
  BytesDisplay& operator=(const BytesDisplay&) = delete;

  void show(std::int64_t done, std::int64_t total, const std::string& what);
  void clear();

 private:
  bool quiet_;
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
  std::chrono::steady_clock::time_point last_ = start_;
};

}  // namespace sparvar::cli
