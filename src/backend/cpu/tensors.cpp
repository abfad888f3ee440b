// Copies and random numbers.
#include <fmt/format.h>

#include <cmath>
#include <cstring>
#include <numbers>

#include "backend/cpu/cpu_backend.h"
#include "backend/cpu/dnnl_support.h"
#include "bits/sampling.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {

Tensor CpuBackend::random(DType dtype, Shape shape, std::uint64_t seed, float deviation) {
  Tensor out = Tensor::empty(DType::f32, std::move(shape));
  parallel_ranges((out.size() + 3) / 4, 1 << 12, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const auto words = philox({static_cast<std::uint32_t>(i), static_cast<std::uint32_t>(i >> 32), 0, 0}, seed);
      for (int pair = 0; pair < 4; pair += 2) {  // Box-Muller
        const float u = (static_cast<float>(words[pair] >> 8) + 1.0F) * 0x1p-24F;
        const float angle = static_cast<float>(words[pair + 1]) * 0x1p-32F * 2.0F * std::numbers::pi_v<float>;
        const float radius = deviation * std::sqrt(-2.0F * std::log(u));
        if (4 * i + pair < out.size()) out.data<float>()[4 * i + pair] = radius * std::cos(angle);
        if (4 * i + pair + 1 < out.size()) out.data<float>()[4 * i + pair + 1] = radius * std::sin(angle);
      }
    }
  });
  return convert(out, dtype);
}

void CpuBackend::write(Tensor& to, const Tensor& from) {
  if (to.dtype() != from.dtype() || to.size() != from.size())
    throw Error(ErrorKind::usage, fmt::format("{} {} cannot be written to {} {}", name_of(from.dtype()),
                                              to_string(from.shape()), name_of(to.dtype()), to_string(to.shape())));
  if (to.bytes() > 0) std::memcpy(to.raw(), from.raw(), to.bytes());
}

void CpuBackend::fill_zero(Tensor& x) {
  if (x.bytes() > 0) std::memset(x.raw(), 0, x.bytes());
}

Tensor CpuBackend::repeat(const Tensor& x, int times) {
  Shape shape = x.shape();
  shape[0] *= times;
  Tensor out = Tensor::empty(x.dtype(), shape);
  for (int i = 0; i < times; ++i) std::memcpy(out.data<std::byte>() + i * x.bytes(), x.raw(), x.bytes());
  return out;
}

Tensor CpuBackend::grown(const Tensor& cache, std::int64_t more) {
  Shape shape = cache.shape();
  const std::int64_t heads = shape[0] * shape[1];
  const auto old_bytes = static_cast<std::size_t>(shape[2] * shape[3]) * size_of(cache.dtype());
  shape[2] += more;
  const auto new_bytes = static_cast<std::size_t>(shape[2] * shape[3]) * size_of(cache.dtype());
  Tensor out = Tensor::empty(cache.dtype(), shape);
  for (std::int64_t h = 0; h < heads; ++h)
    std::memcpy(out.data<char>() + h * new_bytes, cache.data<char>() + h * old_bytes, old_bytes);
  return out;
}

}  // namespace sparvar
