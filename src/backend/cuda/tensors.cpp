// Device tensors and copies.
#include <fmt/format.h>

#include <algorithm>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {

Tensor CudaBackend::empty(DType dtype, Shape shape) {
  std::shared_ptr<void> memory = working_->take(storage_bytes(dtype, shape));
  void* address = memory.get();
  return {address, dtype, std::move(shape), std::move(memory), Place::device};
}

Tensor CudaBackend::weight_memory(DType dtype, Shape shape) {
  std::shared_ptr<void> memory = weights_->take(storage_bytes(dtype, shape));
  void* address = memory.get();
  return {address, dtype, std::move(shape), std::move(memory), Place::device};
}

void CudaBackend::fill_zero(Tensor& x) {
  if (computes() && x.bytes() > 0) check(cudaMemsetAsync(x.raw(), 0, x.bytes(), stream_), "clearing a tensor");
}

Tensor CudaBackend::zeros(DType dtype, Shape shape) {
  Tensor out = empty(dtype, std::move(shape));
  fill_zero(out);
  return out;
}

Tensor CudaBackend::random(DType dtype, Shape shape, std::uint64_t seed, float deviation) {
  Tensor out = weight_memory(dtype, std::move(shape));
  if (computes()) fill_random(out.raw(), dtype, out.size(), seed, deviation, stream_);
  return out;
}

Tensor CudaBackend::upload(const Tensor& host) {
  if (!host.defined() || host.place() == Place::device) return host;
  Tensor out = empty(host.dtype(), host.shape());
  write(out, host);
  return out;
}

Tensor CudaBackend::download(const Tensor& tensor) {
  if (tensor.place() == Place::host) return tensor;
  Tensor out = Tensor::empty(tensor.dtype(), tensor.shape());
  if (!computes()) return out;
  if (recording_) throw Error(ErrorKind::usage, "a recorded program cannot be waited for");
  if (out.bytes() > 0)
    check(cudaMemcpyAsync(out.raw(), tensor.raw(), out.bytes(), cudaMemcpyDeviceToHost, stream_), "reading a tensor");
  check(cudaStreamSynchronize(stream_), "waiting for the GPU");
  return out;
}

void CudaBackend::write(Tensor& to, const Tensor& from) {
  if (to.dtype() != from.dtype() || to.size() != from.size())
    throw Error(ErrorKind::usage, fmt::format("{} {} cannot be written to {} {}", name_of(from.dtype()),
                                              to_string(from.shape()), name_of(to.dtype()), to_string(to.shape())));
  if (!computes() || to.bytes() == 0) return;
  if (from.place() == Place::host && recording_)
    throw Error(ErrorKind::usage, "a recorded program cannot read host memory");
  check(cudaMemcpyAsync(to.raw(), from.raw(), to.bytes(),
                        from.place() == Place::host ? cudaMemcpyHostToDevice : cudaMemcpyDeviceToDevice, stream_),
        "writing a tensor");
}

Tensor CudaBackend::clone(const Tensor& x) {
  Tensor out = empty(x.dtype(), x.shape());
  write(out, x);
  return out;
}

Tensor CudaBackend::repeat(const Tensor& x, int times) {
  Shape shape = x.shape();
  shape[0] *= times;
  Tensor out = empty(x.dtype(), shape);
  for (int i = 0; i < times; ++i) {
    Tensor part = out.rows(i * x.dim(0), (i + 1) * x.dim(0));
    write(part, x);
  }
  return out;
}

Tensor CudaBackend::converted(const Tensor& x, DType type) {
  if (x.dtype() == type) return x;
  Tensor out = empty(type, x.shape());
  if (computes()) convert(x.raw(), x.dtype(), out.raw(), type, x.size(), stream_);
  return out;
}

/// Rows of x, or of gelu_tanh(x), as e4m3.
Tensor CudaBackend::quantised(const Tensor& x, bool gelu) {
  if (x.dtype() == DType::e4m3) return x;
  Tensor out = empty(DType::e4m3, x.shape());
  if (computes())
    quantise_rows({.x = x.raw(),
                   .type = x.dtype(),
                   .rows = x.size() / std::max<std::int64_t>(x.dim(-1), 1),
                   .width = static_cast<int>(x.dim(-1)),
                   .gelu = gelu,
                   .out = out.raw(),
                   .scales = scales_of(out)},
                  stream_);
  return out;
}

}  // namespace sparvar::cuda
