// Weights on their way to the device: memory-mapped file -> pinned ring -> device. The next piece is read and converted
// while the last one is copied.
#pragma once

#include <cuda_runtime_api.h>

#include <array>

#include "core/tensor.h"

namespace sparvar::cuda {

class Uploader {
 public:
  Uploader() = default;
  Uploader(const Uploader&) = delete;
  Uploader& operator=(const Uploader&) = delete;
  ~Uploader();

  /// Enqueues the copy of host tensor `from` into `to`, converted to to's type (f32, bf16, or the same type).
  void copy(const Tensor& from, Tensor& to);
  /// Waits for all copies and gives the ring back.
  void finish();

 private:
  struct Slot {
    void* memory = nullptr;
    cudaEvent_t copied = nullptr;
  };
  void open();
  cudaStream_t stream_ = nullptr;
  std::array<Slot, 4> ring_;
  std::size_t next_ = 0;
};

}  // namespace sparvar::cuda
