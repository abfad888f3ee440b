// Progress on stderr: of loading and by scale, of steps, of bytes.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

/// A line that is redrawn on a terminal; elsewhere one follows the other.
class StatusLine {
 public:
  explicit StatusLine(bool quiet);
  ~StatusLine() { clear(); }
  StatusLine(const StatusLine&) = delete;
  StatusLine& operator=(const StatusLine&) = delete;

  bool quiet() const { return quiet_; }
  bool terminal() const { return terminal_; }
  double seconds() const;  // since it was made
  void write(const std::string& line);
  /// Takes the line away from a terminal, so that other text starts on a clean one.
  void clear();

 private:
  bool quiet_;
  bool terminal_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point start_ = std::chrono::steady_clock::now();
};

/// Loading and scales: a bar on a terminal, a line per scale elsewhere.
class ProgressDisplay {
 public:
  explicit ProgressDisplay(bool quiet) : line_(quiet) {}
  void show(const Progress& progress);
  void clear() { line_.clear(); }

 private:
  StatusLine line_;
  std::chrono::steady_clock::time_point last_line_ = std::chrono::steady_clock::now();
};

/// Progress of long work in steps; where it is no terminal, a line whenever a step is done.
class StepDisplay {
 public:
  explicit StepDisplay(bool quiet) : line_(quiet) {}
  /// `done` of `total` steps are finished, `what` begins.
  void show(int done, int total, const std::string& what);
  void clear() { line_.clear(); }

 private:
  StatusLine line_;
  int first_done_ = -1;  // at the first call: what a run that goes on had already
  int last_done_ = -1;
};

/// Progress of long work by bytes; where it is no terminal, a line every few seconds.
class BytesDisplay {
 public:
  explicit BytesDisplay(bool quiet) : line_(quiet) {}
  void show(std::int64_t done, std::int64_t total, const std::string& what);
  void clear() { line_.clear(); }

 private:
  StatusLine line_;
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

}  // namespace sparvar::cli
