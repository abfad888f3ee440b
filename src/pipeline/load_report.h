// How far loading is, in bytes of the weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

#include "core/clock.h"
#include "sparvar/pipeline.h"

namespace sparvar {

/// Passes on what loading has read, at most a hundred times.
class LoadReport {
 public:
  LoadReport(std::function<void(const Progress&)> on_progress, std::int64_t total)
      : on_progress_(std::move(on_progress)), total_(total) {}
  void add(std::int64_t bytes) {
    done_ = std::min(done_ + bytes, std::max<std::int64_t>(total_ - 1, 0));  // the rest is for finish()
    if (done_ - told_ >= std::max<std::int64_t>(total_ / 100, 1)) tell();
  }
  void finish() {
    done_ = total_;
    tell();
  }

 private:
  void tell() {
    told_ = done_;
    if (!on_progress_) return;
    Progress progress{.stage = Progress::Stage::load};
    progress.seconds = seconds_since(start_);
    progress.bytes_done = done_;
    progress.bytes_total = total_;
    on_progress_(progress);
  }

  std::function<void(const Progress&)> on_progress_;
  std::int64_t total_;
  std::int64_t done_ = 0, told_ = 0;
  Clock::time_point start_ = Clock::now();
};

}  // namespace sparvar
