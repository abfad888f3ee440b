// Activations, modulation, guidance, bits.
#include <fmt/format.h>

#include "backend/cuda/check.h"
#include "backend/cuda/cuda_backend.h"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

Grid map_of(const Tensor& planes) { return {static_cast<int>(planes.dim(2)), static_cast<int>(planes.dim(3))}; }

void check_sizes(const Tensor& a, const Tensor& b) {
  if (a.size() != b.size())
    throw Error(ErrorKind::usage, fmt::format("{} and {} differ in size", to_string(a.shape()), to_string(b.shape())));
}

}  // namespace

Tensor CudaBackend::apply(const Tensor& x, Activation activation) {
  Tensor out = clone(x);
  if (computes() && activation != Activation::none)
    activate(out.raw(), DType::f32, out.size(), activation == Activation::silu, stream_);
  return out;
}

void CudaBackend::add_repeated(Tensor& x, const Tensor& y) {
  if (y.size() == 0 || x.size() % y.size() != 0)
    throw Error(ErrorKind::usage,
                fmt::format("{} cannot be added again and again to {}", to_string(y.shape()), to_string(x.shape())));
  if (computes()) cuda::add_repeated(x.data<float>(), y.data<float>(), x.size(), y.size(), stream_);
}

Tensor CudaBackend::modulation(const Tensor& shared, const Tensor& own, int parts) {
  const std::int64_t rows = shared.dim(0);
  const std::int64_t width = shared.size() / (rows * parts);
  Tensor out = empty(DType::f32, {parts, rows, width});
  if (computes())
    cuda::modulation(shared.data<float>(), own.defined() ? own.data<float>() : nullptr, rows, parts,
                     static_cast<int>(width), out.data<float>(), stream_);
  return out;
}

void CudaBackend::guide_hidden(Tensor& x, const Tensor& guidance) {
  if (computes()) cuda::guide_hidden(x.data<float>(), x.size() / 2, guidance.data<float>(), stream_);
}

Tensor CudaBackend::guide_logits(const Tensor& logits, std::int64_t pictures, const Tensor& guidance) {
  Tensor out = empty(DType::f32, {pictures, logits.dim(1), logits.dim(2)});
  if (computes())
    cuda::guide_logits(logits.data<float>(), out.size(), logits.dim(0) > pictures, guidance.data<float>(),
                       out.data<float>(), stream_);
  return out;
}

Tensor CudaBackend::sample_bits(const Tensor& logits, const Tensor& sampling, int scale) {
  const std::int64_t bits = logits.dim(2) / 2;
  Tensor out = empty(DType::u8, {logits.dim(0), logits.dim(1), bits});
  if (computes())
    cuda::sample_bits(logits.data<float>(), static_cast<int>(logits.dim(0)), static_cast<int>(logits.dim(1)),
                      static_cast<int>(bits), sampling.data<std::uint64_t>(), scale, out.data<std::uint8_t>(), stream_);
  return out;
}

void CudaBackend::add_codes(Tensor& summed, const Tensor& bits, Grid tokens, bool patchify) {
  if (bits.rank() != 3 || bits.dim(1) != tokens.tokens() || bits.dim(0) != summed.dim(0) ||
      bits.dim(2) != summed.dim(1) * (patchify ? 4 : 1))
    throw Error(ErrorKind::usage, fmt::format("bits {} of a {}x{} grid do not fit summed codes {}",
                                              to_string(bits.shape()), tokens.h, tokens.w, to_string(summed.shape())));
  if (computes())
    cuda::add_codes(bits.data<std::uint8_t>(), static_cast<int>(bits.dim(0)), tokens, static_cast<int>(bits.dim(2)),
                    patchify, summed.data<float>(), map_of(summed), stream_);
}

Tensor CudaBackend::codes_to_words(const Tensor& summed, Grid tokens, bool patchify) {
  Tensor words = empty(DType::f32, {summed.dim(0), tokens.tokens(), summed.dim(1) * (patchify ? 4 : 1)});
  if (computes())
    words_of(summed.data<float>(), static_cast<int>(summed.dim(0)), static_cast<int>(summed.dim(1)), map_of(summed),
             tokens, patchify, words.data<float>(), stream_);
  return words;
}

void CudaBackend::subtract(const Tensor& a, const Tensor& b, Tensor& out) {
  check_sizes(a, b);
  check_sizes(a, out);
  if (computes()) cuda::subtract(a.raw(), a.dtype(), b.raw(), b.dtype(), out.raw(), out.dtype(), a.size(), stream_);
}

Tensor CudaBackend::gated_gelu(const Tensor& a, const Tensor& b) {
  check_sizes(a, b);
  Tensor out = empty(a.dtype(), a.shape());
  if (computes()) cuda::gated_gelu(a.raw(), b.raw(), out.raw(), a.dtype(), a.size(), stream_);
  return out;
}

}  // namespace sparvar::cuda
