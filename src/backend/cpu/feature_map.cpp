// Group norm and upsampling of NHWC feature maps.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <string_view>
#include <vector>

#include "backend/cpu/attention/kernels.h"
#include "backend/cpu/cpu_backend.h"
#include "core/parallel.h"
#include "sparvar/error.h"

// The loops below are plain C++ that compilers turn into vector code; each is compiled once per instruction set.
#ifdef SPARVAR_X86
#define SPARVAR_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma")))
#define SPARVAR_AVX2 __attribute__((target("avx2,fma")))
#endif
#define SPARVAR_INLINE inline __attribute__((always_inline))

namespace sparvar {
namespace {

SPARVAR_INLINE float read(float value) { return value; }
SPARVAR_INLINE float read(BFloat16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value.bits) << 16); }

SPARVAR_INLINE void write(float& to, float value) { to = value; }
SPARVAR_INLINE void write(BFloat16& to, float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;
  const std::uint32_t quiet_nan = (bits >> 16) | 0x40U;
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffU) > 0x7f800000U ? quiet_nan : rounded);
}

/// exp(x) to 1e-7 relative for x in [-87, 87], clamped beyond: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2].
SPARVAR_INLINE float fast_exp(float x) {
  x = x < -87.0F ? -87.0F : x;
  x = x > 87.0F ? 87.0F : x;
  constexpr float round_to_integer = 12582912.0F;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const float shifted = x * 1.44269504F + round_to_integer;
  const float n = shifted - round_to_integer;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;  // ln 2 in two parts
  float p = 1.0F / 5040;
  p = p * r + 1.0F / 720;
  p = p * r + 1.0F / 120;
  p = p * r + 1.0F / 24;
  p = p * r + 1.0F / 6;
  p = p * r + 0.5F;
  p = p * r + 1.0F;
  p = p * r + 1.0F;
  const std::uint32_t exponent = (std::bit_cast<std::uint32_t>(shifted) << 23) + 0x3f800000U;
  return p * std::bit_cast<float>(exponent);
}

/// Per-lane sums over `count` values that repeat with period `period`; in double, so maps of any size stay exact.
template <typename T>
SPARVAR_INLINE void sum_lanes(const T* x, std::int64_t count, std::int64_t period, double* sums, double* squares) {
  for (std::int64_t begin = 0; begin < count; begin += period) {
    const std::int64_t length = count - begin < period ? count - begin : period;
    for (std::int64_t i = 0; i < length; ++i) {
      const double value = static_cast<double>(read(x[begin + i]));
      sums[i] += value;
      squares[i] += value * value;
    }
  }
}

/// y = x * scale + shift, then SiLU where asked; scale and shift repeat with the same period.
template <bool silu, typename T>
SPARVAR_INLINE void affine_lanes(const T* x, T* y, std::int64_t count, std::int64_t period, const float* scale,
                                 const float* shift) {
  for (std::int64_t begin = 0; begin < count; begin += period) {
    const std::int64_t length = count - begin < period ? count - begin : period;
    for (std::int64_t i = 0; i < length; ++i) {
      const float value = read(x[begin + i]) * scale[i] + shift[i];
      write(y[begin + i], silu ? value / (1.0F + fast_exp(-value)) : value);
    }
  }
}

template <typename T>
struct Kernels {
  void (*sums)(const T*, std::int64_t, std::int64_t, double*, double*);
  void (*affine)(const T*, T*, std::int64_t, std::int64_t, const float*, const float*);
  void (*affine_silu)(const T*, T*, std::int64_t, std::int64_t, const float*, const float*);
};

// NOLINTBEGIN(bugprone-macro-parentheses): `target` is an attribute
#define SPARVAR_KERNELS(name, target)                                                                                  \
  template <typename T>                                                                                                \
  struct name {                                                                                                        \
    target static void sums(const T* x, std::int64_t n, std::int64_t period, double* s, double* q) {                   \
      sum_lanes(x, n, period, s, q);                                                                                   \
    }                                                                                                                  \
    target static void affine(const T* x, T* y, std::int64_t n, std::int64_t period, const float* a, const float* b) { \
      affine_lanes<false>(x, y, n, period, a, b);                                                                      \
    }                                                                                                                  \
    target static void affine_silu(const T* x, T* y, std::int64_t n, std::int64_t period, const float* a,              \
                                   const float* b) {                                                                   \
      affine_lanes<true>(x, y, n, period, a, b);                                                                       \
    }                                                                                                                  \
    static constexpr Kernels<T> all{sums, affine, affine_silu};                                                        \
  }

// NOLINTEND(bugprone-macro-parentheses)
SPARVAR_KERNELS(Plain, );
#ifdef SPARVAR_X86
SPARVAR_KERNELS(Avx2, SPARVAR_AVX2);
SPARVAR_KERNELS(Avx512, SPARVAR_AVX512);
#endif
#undef SPARVAR_KERNELS

/// Those of the instruction set that the attention kernels use: one choice for the whole backend.
template <typename T>
const Kernels<T>& kernels() {
#ifdef SPARVAR_X86
  const std::string_view set = attention_kernels().name;
  if (set.starts_with("avx512")) return Avx512<T>::all;
  if (set == "avx2") return Avx2<T>::all;
#endif
  return Plain<T>::all;
}

/// How one picture of a map is cut into pieces. Pieces do not depend on the number of threads, nor do the sums.
struct Cut {
  std::int64_t channels;
  std::int64_t pixels;
  std::int64_t period = channels * ((255 + channels) / channels);  // at least 256 values, whole pixels
  std::int64_t step = std::max<std::int64_t>(1, 65536 / period) * period / channels;  // pixels of a piece
  std::int64_t pieces = (pixels + step - 1) / step;

  std::int64_t first(std::int64_t piece) const { return piece * step * channels; }
  std::int64_t count(std::int64_t piece) const {
    return (std::min(pixels, (piece + 1) * step) - piece * step) * channels;
  }
};

struct Moments {
  double sum = 0;
  double squares = 0;
};

template <typename T>
std::vector<Moments> group_moments(const Tensor& x, const Cut& cut, int groups) {
  const std::int64_t batch = x.dim(0);
  const std::int64_t per_group = cut.channels / groups;
  std::vector<Moments> parts(static_cast<std::size_t>(batch * cut.pieces * groups));
  parallel_for(batch * cut.pieces, [&](std::int64_t task) {
    const T* from = x.data<T>() + (task / cut.pieces) * cut.pixels * cut.channels + cut.first(task % cut.pieces);
    std::vector<double> sums(static_cast<std::size_t>(2 * cut.period));
    double* squares = sums.data() + cut.period;
    kernels<T>().sums(from, cut.count(task % cut.pieces), cut.period, sums.data(), squares);
    for (std::int64_t i = 0; i < cut.period; ++i) {
      Moments& part = parts[static_cast<std::size_t>(task * groups + i % cut.channels / per_group)];
      part.sum += sums[static_cast<std::size_t>(i)];
      part.squares += squares[i];
    }
  });
  std::vector<Moments> moments(static_cast<std::size_t>(batch * groups));
  for (std::int64_t task = 0; task < batch * cut.pieces; ++task)
    for (int g = 0; g < groups; ++g) {
      Moments& to = moments[static_cast<std::size_t>(task / cut.pieces * groups + g)];
      to.sum += parts[static_cast<std::size_t>(task * groups + g)].sum;
      to.squares += parts[static_cast<std::size_t>(task * groups + g)].squares;
    }
  return moments;
}

/// Normalisation and affine as one multiply-add per channel, repeated to the period.
struct LaneAffine {
  std::vector<float> scale;
  std::vector<float> shift;

  LaneAffine(const Moments* moments, const Cut& cut, int groups, const Tensor& weight, const Tensor& bias, float eps)
      : scale(static_cast<std::size_t>(cut.period)), shift(scale.size()) {
    const std::int64_t per_group = cut.channels / groups;
    const auto count = static_cast<double>(per_group * cut.pixels);
    for (std::int64_t i = 0; i < cut.period; ++i) {
      const std::int64_t channel = i % cut.channels;
      const Moments& m = moments[channel / per_group];
      const double mean = m.sum / count;
      const double variance = std::max(0.0, m.squares / count - mean * mean);
      const double a = weight.data<float>()[channel] / std::sqrt(variance + static_cast<double>(eps));
      scale[static_cast<std::size_t>(i)] = static_cast<float>(a);
      shift[static_cast<std::size_t>(i)] = static_cast<float>(bias.data<float>()[channel] - mean * a);
    }
  }
};

template <typename T>
Tensor normalise_groups(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps, bool silu) {
  const Cut cut{.channels = x.dim(3), .pixels = x.dim(1) * x.dim(2)};
  const std::vector<Moments> moments = group_moments<T>(x, cut, groups);
  std::vector<LaneAffine> affine;
  for (std::int64_t b = 0; b < x.dim(0); ++b)
    affine.emplace_back(moments.data() + b * groups, cut, groups, weight, bias, eps);
  Tensor out = Tensor::empty(x.dtype(), x.shape());
  const auto kernel = silu ? kernels<T>().affine_silu : kernels<T>().affine;
  parallel_for(x.dim(0) * cut.pieces, [&](std::int64_t task) {
    const std::int64_t picture = task / cut.pieces;
    const std::int64_t offset = picture * cut.pixels * cut.channels + cut.first(task % cut.pieces);
    const LaneAffine& lanes = affine[static_cast<std::size_t>(picture)];
    kernel(x.data<T>() + offset, out.data<T>() + offset, cut.count(task % cut.pieces), cut.period, lanes.scale.data(),
           lanes.shift.data());
  });
  return out;
}

void check_map(const Tensor& x, const char* what) {
  if (x.rank() != 4 || (x.dtype() != DType::f32 && x.dtype() != DType::bf16))
    throw Error(ErrorKind::usage, fmt::format("{} takes an F32 or BF16 map [B, H, W, C], got {} {}", what,
                                              name_of(x.dtype()), to_string(x.shape())));
}

/// Each pixel of a row of `width` pixels twice.
template <typename Unit>
void double_pixels(const char* from, char* to, std::int64_t width, std::int64_t units) {
  for (std::int64_t x = 0; x < width; ++x)
    for (std::int64_t copy = 0; copy < 2; ++copy) {
      for (std::int64_t i = 0; i < units; ++i)  // memcpy of a known size: one vector move each
        std::memcpy(to + i * static_cast<std::int64_t>(sizeof(Unit)),
                    from + (x * units + i) * static_cast<std::int64_t>(sizeof(Unit)), sizeof(Unit));
      to += units * static_cast<std::int64_t>(sizeof(Unit));
    }
}

}  // namespace

Tensor CpuBackend::group_norm(const Tensor& x, int groups, const Tensor& weight, const Tensor& bias, float eps,
                              bool silu) {
  check_map(x, "group norm");
  const std::int64_t channels = x.dim(3);
  if (groups < 1 || channels % groups != 0)
    throw Error(ErrorKind::usage, fmt::format("{} channels cannot be split into {} groups", channels, groups));
  const auto fits = [channels](const Tensor& t) { return t.dtype() == DType::f32 && t.size() == channels; };
  if (!fits(weight) || !fits(bias))
    throw Error(ErrorKind::usage,
                fmt::format("group norm of {} channels takes F32 weights and biases of that size, got {} and {}",
                            channels, to_string(weight.shape()), to_string(bias.shape())));
  if (x.size() == 0) return Tensor::empty(x.dtype(), x.shape());
  return x.dtype() == DType::f32 ? normalise_groups<float>(x, groups, weight, bias, eps, silu)
                                 : normalise_groups<BFloat16>(x, groups, weight, bias, eps, silu);
}

Tensor CpuBackend::upsample_nearest_2x(const Tensor& x) {
  check_map(x, "upsampling");
  Tensor out = Tensor::empty(x.dtype(), {x.dim(0), 2 * x.dim(1), 2 * x.dim(2), x.dim(3)});
  const std::int64_t width = x.dim(2);
  const std::int64_t pixel = x.dim(3) * static_cast<std::int64_t>(size_of(x.dtype()));
  const std::int64_t row = width * pixel;
  parallel_for(x.dim(0) * x.dim(1), [&](std::int64_t y) {
    const char* from = x.data<char>() + y * row;
    char* to = out.data<char>() + 4 * y * row;
    struct Vector {
      char bytes[32];
    };
    if (pixel % 32 == 0)
      double_pixels<Vector>(from, to, width, pixel / 32);
    else
      double_pixels<std::uint16_t>(from, to, width, pixel / 2);
    std::memcpy(to + 2 * row, to, static_cast<std::size_t>(2 * row));
  });
  return out;
}

Tensor CpuBackend::to_nhwc(const Tensor& x) {
  const std::int64_t channels = x.dim(1);
  const std::int64_t pixels = x.dim(2) * x.dim(3);
  Tensor out = Tensor::empty(DType::f32, {x.dim(0), x.dim(2), x.dim(3), channels});
  parallel_ranges(x.dim(0) * pixels, 4096, [&](std::int64_t begin, std::int64_t end) {
    float* to = out.data<float>() + begin * channels;
    for (std::int64_t p = begin; p < end; ++p) {
      const float* from = x.data<float>() + p / pixels * channels * pixels + p % pixels;
      for (std::int64_t c = 0; c < channels; ++c) *to++ = from[c * pixels];
    }
  });
  return out;
}

Tensor CpuBackend::to_nchw(const Tensor& x, float limit) {
  const std::int64_t channels = x.dim(3);
  const std::int64_t pixels = x.dim(1) * x.dim(2);
  Tensor out = Tensor::empty(DType::f32, {x.dim(0), channels, x.dim(1), x.dim(2)});
  parallel_ranges(x.dim(0) * pixels, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t p = begin; p < end; ++p) {
      float* to = out.data<float>() + p / pixels * channels * pixels + p % pixels;
      for (std::int64_t c = 0; c < channels; ++c) {
        const std::int64_t at = p * channels + c;
        const float value = x.dtype() == DType::f32 ? x.data<float>()[at] : to_float(x.data<BFloat16>()[at]);
        to[c * pixels] = std::clamp(value, -limit, limit);
      }
    }
  });
  return out;
}

Tensor CpuBackend::to_bytes(const Tensor& x) {
  Tensor out = Tensor::empty(DType::u8, x.shape());
  parallel_ranges(x.size(), 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const float value = x.dtype() == DType::f32 ? x.data<float>()[i] : to_float(x.data<BFloat16>()[i]);
      const float level = 255.0F * ((value + 1.0F) / 2.0F);  // truncated, as upstream does; NaN is black
      out.data<std::uint8_t>()[i] = level >= 255.0F ? 255 : level > 0.0F ? static_cast<std::uint8_t>(level) : 0;
    }
  });
  return out;
}

}  // namespace sparvar
