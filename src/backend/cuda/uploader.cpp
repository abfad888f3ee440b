#include "backend/cuda/uploader.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/check.h"
#include "backend/cuda/kernels/kernels.h"
#include "core/parallel.h"

namespace sparvar::cuda {
namespace {

constexpr std::size_t kSlotBytes = 16U << 20;

/// Elements [begin, begin + count) of `from` as `type`, on all threads.
void read_piece(const Tensor& from, std::int64_t begin, std::int64_t count, DType type, void* out) {
  const std::size_t from_size = size_of(from.dtype());
  const std::size_t to_size = size_of(type);
  parallel_ranges(count, 1 << 17, [&](std::int64_t first, std::int64_t last) {
    auto* source = const_cast<std::byte*>(from.data<std::byte>()) + (begin + first) * from_size;  // NOLINT: read only
    auto* target = static_cast<std::byte*>(out) + first * to_size;
    if (from.dtype() == type) {
      std::memcpy(target, source, (last - first) * to_size);
      return;
    }
    const Tensor converted = Tensor(source, from.dtype(), {last - first}, nullptr).to(type);
    std::memcpy(target, converted.raw(), converted.bytes());
  });
}

}  // namespace

Uploader::~Uploader() {
  try {
    finish();
  } catch (const Error&) {  // the device is gone: so are the copies
    return;
  }
}

void Uploader::open() {
  if (stream_ != nullptr) return;
  check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "a stream for weights");
  for (Slot& slot : ring_) {
    check(cudaMallocHost(&slot.memory, kSlotBytes), "pinned memory for weights");
    check(cudaEventCreateWithFlags(&slot.copied, cudaEventDisableTiming), "an event");
  }
}

void Uploader::copy(const Tensor& from, Tensor& to) {
  open();
  const std::size_t element = size_of(to.dtype());
  const auto piece = static_cast<std::int64_t>(kSlotBytes / element);
  for (std::int64_t begin = 0; begin < to.size(); begin += piece)
    copy_piece(from, begin, std::min(piece, to.size() - begin), to.dtype(), to.data<std::byte>() + begin * element);
}

/// Elements [begin, begin + count) of `from` as `type`.
void Uploader::copy_piece(const Tensor& from, std::int64_t begin, std::int64_t count, DType type, void* to) {
  Slot& slot = ring_[next_++ % ring_.size()];
  check(cudaEventSynchronize(slot.copied), "weights");
  read_piece(from, begin, count, type, slot.memory);
  check(cudaMemcpyAsync(to, slot.memory, count * size_of(type), cudaMemcpyHostToDevice, stream_), "copying weights");
  check(cudaEventRecord(slot.copied, stream_), "weights");
}

void Uploader::quantise(const Tensor& from, void* to, float* scales) {
  open();
  if (staging_ == nullptr) check(cudaMalloc(&staging_, kSlotBytes), "memory for weights on their way");
  const DType type = from.dtype() == DType::bf16 ? DType::bf16 : DType::f32;  // nothing is rounded twice
  const std::int64_t width = from.dim(-1);
  const std::int64_t rows = width == 0 ? 0 : from.size() / width;
  const std::int64_t piece = static_cast<std::int64_t>(kSlotBytes / size_of(type)) / std::max<std::int64_t>(width, 1);
  for (std::int64_t row = 0; row < rows; row += piece) {  // the stream keeps the pieces' order
    const std::int64_t count = std::min(piece, rows - row);
    copy_piece(from, row * width, count * width, type, staging_);
    quantise_rows({.x = staging_,
                   .type = type,
                   .rows = count,
                   .width = static_cast<int>(width),
                   .out = static_cast<std::byte*>(to) + row * width,
                   .scales = scales + row},
                  stream_);
  }
}

void Uploader::finish() {
  if (stream_ == nullptr) return;
  check(cudaStreamSynchronize(stream_), "copying weights");
  for (Slot& slot : ring_) {
    (void)cudaFreeHost(slot.memory);
    (void)cudaEventDestroy(slot.copied);
    slot = {};
  }
  (void)cudaFree(staging_);
  staging_ = nullptr;
  (void)cudaStreamDestroy(stream_);
  stream_ = nullptr;
}

}  // namespace sparvar::cuda
