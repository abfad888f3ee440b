// Elementwise work. Every thread takes groups of four neighbours, with vector loads where pointers and sizes allow.
#include <algorithm>
#include <initializer_list>

#include "backend/cuda/kernels/device.cuh"
#include "backend/cuda/kernels/kernels.h"

namespace sparvar::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kGroups = 2;  // of four values a thread: their loads overlap

template <int kN>
struct Values {
  float at[kN];
};

template <int kN>
__device__ inline Values<kN> get(const float* from) {
  if constexpr (kN == 4) {
    const float4 x = *reinterpret_cast<const float4*>(from);
    return {x.x, x.y, x.z, x.w};
  } else {
    return {*from};
  }
}
template <int kN>
__device__ inline Values<kN> get(const bf16* from) {
  if constexpr (kN == 4) {
    const uint2 x = *reinterpret_cast<const uint2*>(from);
    return {__uint_as_float(x.x << 16), __uint_as_float(x.x & 0xffff0000U), __uint_as_float(x.y << 16),
            __uint_as_float(x.y & 0xffff0000U)};
  } else {
    return {read(*from)};
  }
}
template <int kN>
__device__ inline void put(float* to, const Values<kN>& x) {
  if constexpr (kN == 4)
    *reinterpret_cast<float4*>(to) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
  else
    *to = x.at[0];
}
template <int kN>
__device__ inline void put(bf16* to, const Values<kN>& x) {
  if constexpr (kN == 4) {
    const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(x.at[0], x.at[1]), __floats2bfloat162_rn(x.at[2], x.at[3])};
    *reinterpret_cast<uint2*>(to) = *reinterpret_cast<const uint2*>(pairs);
  } else {
    *to = rounded<bf16>(x.at[0]);
  }
}

/// Calls work.at<4>(i) or work.at<1>(i) until every i below count is done.
template <bool kVectors, typename Work>
__global__ void __launch_bounds__(kThreads) each(std::int64_t count, const Work work) {
  const std::int64_t first = std::int64_t{blockIdx.x} * (kThreads * kGroups * 4) + threadIdx.x * (kVectors ? 4 : 1);
  if constexpr (kVectors) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const std::int64_t i = first + g * kThreads * 4;
      if (i + 4 <= count)
        work.template at<4>(i);
      else
        for (std::int64_t j = i; j < count; ++j) work.template at<1>(j);
    }
  } else {
#pragma unroll
    for (int g = 0; g < kGroups * 4; ++g)
      if (first + g * kThreads < count) work.template at<1>(first + g * kThreads);
  }
}

bool aligned(std::initializer_list<const void*> pointers) {
  return std::all_of(pointers.begin(), pointers.end(),
                     [](const void* p) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0; });
}

template <typename Work>
void run(const char* name, std::int64_t count, bool vectors, const Work& work, cudaStream_t stream) {
  if (count <= 0) return;
  const unsigned blocks = blocks_for(count, kThreads * kGroups * 4);
  if (vectors)
    each<true><<<blocks, kThreads, 0, stream>>>(count, work);
  else
    each<false><<<blocks, kThreads, 0, stream>>>(count, work);
  check_launch(name);
}

/// i / by and i % by, in 32 bits where both fit: much cheaper.
__device__ inline std::int64_t quotient(std::int64_t i, std::int64_t by) {
  if (((i | by) >> 32) == 0) return static_cast<std::uint32_t>(i) / static_cast<std::uint32_t>(by);
  return i / by;
}

template <typename From, typename To>
struct Convert {
  const From* from;
  To* to;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    put<kN>(to + i, get<kN>(from + i));
  }
};

__device__ inline float gelu_tanh(float x) {
  return 0.5F * x * (1.0F + tanhf(0.7978845608028654F * (x + 0.044715F * x * x * x)));
}

template <typename T, bool kSilu>
struct Activate {
  T* x;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    Values<kN> v = get<kN>(x + i);
    for (float& value : v.at) value = kSilu ? value / (1.0F + expf(-value)) : gelu_tanh(value);
    put<kN>(x + i, v);
  }
};

template <typename T>
struct GatedGelu {
  const T* a;
  const T* b;
  T* out;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    Values<kN> v = get<kN>(a + i);
    const Values<kN> factor = get<kN>(b + i);
    for (int j = 0; j < kN; ++j) v.at[j] = gelu_tanh(v.at[j]) * factor.at[j];
    put<kN>(out + i, v);
  }
};

struct AddRepeated {
  float* x;
  const float* y;
  std::int64_t period;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    Values<kN> v = get<kN>(x + i);
    const Values<kN> more = get<kN>(y + (i - quotient(i, period) * period));
    for (int j = 0; j < kN; ++j) v.at[j] += more.at[j];
    put<kN>(x + i, v);
  }
};

struct Modulation {
  const float* shared;
  const float* own;
  std::int64_t rows;
  std::int64_t parts;
  std::int64_t width;
  float* out;
  template <int kN>
  __device__ void at(std::int64_t i) const {  // of out [parts, rows, width]
    const std::int64_t line = quotient(i, width);
    const std::int64_t column = i - line * width;
    const std::int64_t part = quotient(line, rows);
    const std::int64_t row = line - part * rows;
    Values<kN> v = get<kN>(shared + (row * parts + part) * width + column);
    if (own != nullptr) {
      const Values<kN> more = get<kN>(own + part * width + column);
      for (int j = 0; j < kN; ++j) v.at[j] += more.at[j];
    }
    put<kN>(out + i, v);
  }
};

// No fused multiply-adds in guidance: every bit hangs on it, and the CPU rounds each product.
__device__ inline float guided(float cfg, float first, float second) {
  return __fadd_rn(__fmul_rn(cfg, first), __fmul_rn(__fsub_rn(1.0F, cfg), second));
}

struct GuideHidden {
  float* x;
  std::int64_t half;
  const float* cfg;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    const float strength = __ldg(cfg);
    if (strength == 1.0F) return;  // as the CPU: the second half stays what it is
    Values<kN> v = get<kN>(x + i);
    const Values<kN> second = get<kN>(x + half + i);
    for (int j = 0; j < kN; ++j) v.at[j] = guided(strength, v.at[j], second.at[j]);
    put<kN>(x + i, v);
    put<kN>(x + half + i, v);
  }
};

struct GuideLogits {
  const float* logits;
  std::int64_t half;
  bool both;
  const float* guidance;
  float* out;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    const float cfg = __ldg(guidance);
    const float inverse_tau = __ldg(guidance + 1);
    Values<kN> v = get<kN>(logits + i);
    for (float& value : v.at) value = __fmul_rn(value, inverse_tau);
    if (both && cfg != 1.0F) {
      const Values<kN> second = get<kN>(logits + half + i);
      for (int j = 0; j < kN; ++j) v.at[j] = guided(cfg, v.at[j], __fmul_rn(second.at[j], inverse_tau));
    }
    put<kN>(out + i, v);
  }
};

template <typename A, typename B, typename C>
struct Subtract {
  const A* a;
  const B* b;
  C* out;
  template <int kN>
  __device__ void at(std::int64_t i) const {
    Values<kN> v = get<kN>(a + i);
    const Values<kN> less = get<kN>(b + i);
    for (int j = 0; j < kN; ++j) v.at[j] -= less.at[j];
    put<kN>(out + i, v);
  }
};

__global__ void __launch_bounds__(kThreads)
    compare(const unsigned* a, const unsigned* b, std::int64_t words, int rest, unsigned* count) {
  unsigned different = 0;
  for (std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x; i < words;
       i += std::int64_t{gridDim.x} * kThreads)
    different += a[i] != b[i] ? 1 : 0;
  if (blockIdx.x == 0 && threadIdx.x == 0)
    for (int i = 0; i < rest; ++i)
      different |=
          reinterpret_cast<const unsigned char*>(a + words)[i] != reinterpret_cast<const unsigned char*>(b + words)[i]
              ? 1
              : 0;
  if (different > 0) atomicAdd(count, different);
}

}  // namespace

void convert(const void* from, DType from_type, void* to, DType to_type, std::int64_t count, cudaStream_t stream) {
  with_type(from_type, [&](auto in) {
    with_type(to_type, [&](auto out) {
      using From = decltype(in);
      using To = decltype(out);
      run("convert", count, aligned({from, to}),
          Convert<From, To>{static_cast<const From*>(from), static_cast<To*>(to)}, stream);
    });
  });
}

void activate(void* x, DType type, std::int64_t count, bool silu, cudaStream_t stream) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    if (silu)
      run("silu", count, aligned({x}), Activate<T, true>{static_cast<T*>(x)}, stream);
    else
      run("gelu", count, aligned({x}), Activate<T, false>{static_cast<T*>(x)}, stream);
  });
}

void gated_gelu(const void* a, const void* b, void* out, DType type, std::int64_t count, cudaStream_t stream) {
  with_type(type, [&](auto element) {
    using T = decltype(element);
    run("gated gelu", count, aligned({a, b, out}),
        GatedGelu<T>{static_cast<const T*>(a), static_cast<const T*>(b), static_cast<T*>(out)}, stream);
  });
}

void add_repeated(float* x, const float* y, std::int64_t count, std::int64_t period, cudaStream_t stream) {
  if (period <= 0) return;
  run("add repeated", count, aligned({x, y}) && period % 4 == 0, AddRepeated{x, y, period}, stream);
}

void modulation(const float* shared, const float* own, std::int64_t rows, int parts, int width, float* out,
                cudaStream_t stream) {
  run("modulation", rows * parts * width, aligned({shared, own, out}) && width % 4 == 0,
      Modulation{shared, own, rows, parts, width, out}, stream);
}

void guide_hidden(float* x, std::int64_t half, const float* cfg, cudaStream_t stream) {
  run("guide hidden", half, aligned({x, x + half}), GuideHidden{x, half, cfg}, stream);
}

void guide_logits(const float* logits, std::int64_t half, bool guided, const float* guidance, float* out,
                  cudaStream_t stream) {
  run("guide logits", half, aligned({logits, logits + half, out}), GuideLogits{logits, half, guided, guidance, out},
      stream);
}

void subtract(const void* a, DType a_type, const void* b, DType b_type, void* out, DType out_type, std::int64_t count,
              cudaStream_t stream) {
  with_type(a_type, [&](auto first) {
    with_type(b_type, [&](auto second) {
      with_type(out_type, [&](auto third) {
        using A = decltype(first);
        using B = decltype(second);
        using C = decltype(third);
        run("subtract", count, aligned({a, b, out}),
            Subtract<A, B, C>{static_cast<const A*>(a), static_cast<const B*>(b), static_cast<C*>(out)}, stream);
      });
    });
  });
}

void count_differing(const void* a, const void* b, std::int64_t bytes, unsigned* count, cudaStream_t stream) {
  constexpr std::int64_t kMostBlocks = 1024;
  (void)cudaMemsetAsync(count, 0, sizeof *count, stream);
  const auto blocks = static_cast<unsigned>(std::clamp<std::int64_t>(bytes / 4 / kThreads, 1, kMostBlocks));
  compare<<<blocks, kThreads, 0, stream>>>(static_cast<const unsigned*>(a), static_cast<const unsigned*>(b), bytes / 4,
                                           static_cast<int>(bytes % 4), count);
  check_launch("compare");
}

}  // namespace sparvar::cuda
