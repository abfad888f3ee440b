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
  /// The same with rows [..., C] made e4m3 on the device, piece by piece: no whole copy of another type is held.
  void quantise(const Tensor& from, void* to, float* scales);
  /// Waits for all copies and gives the ring back.
  void finish();

 private:
  struct Slot {
    void* memory = nullptr;
    cudaEvent_t copied = nullptr;
  };
  void open();
  void copy_piece(const Tensor& from, std::int64_t begin, std::int64_t count, DType type, void* to);
  cudaStream_t stream_ = nullptr;
  std::array<Slot, 4> ring_;
  std::size_t next_ = 0;
  void* staging_ = nullptr;  // of the device: a piece that is to be made e4m3
};

}  // namespace sparvar::cuda
