#include "backend/cuda/uploader.h"

#include <algorithm>
#include <cstring>

#include "backend/cuda/check.h"
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
  for (std::int64_t begin = 0; begin < to.size(); begin += piece) {
    Slot& slot = ring_[next_++ % ring_.size()];
    check(cudaEventSynchronize(slot.copied), "weights");
    const std::int64_t count = std::min(piece, to.size() - begin);
    read_piece(from, begin, count, to.dtype(), slot.memory);
    check(cudaMemcpyAsync(to.data<std::byte>() + begin * element, slot.memory, count * element, cudaMemcpyHostToDevice,
                          stream_),
          "copying weights");
    check(cudaEventRecord(slot.copied, stream_), "weights");
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
  (void)cudaStreamDestroy(stream_);
  stream_ = nullptr;
}

}  // namespace sparvar::cuda
