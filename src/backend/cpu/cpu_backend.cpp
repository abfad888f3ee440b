#include "backend/cpu/cpu_backend.h"

#include <fmt/format.h>
#include <omp.h>

#include "backend/cpu/attention/kernels.h"
#include "backend/cpu/dnnl_support.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {

dnnl::engine& dnnl_engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

dnnl::stream& dnnl_stream() {
  static dnnl::stream stream(dnnl_engine());
  return stream;
}

dnnl::memory::data_type dnnl_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return dnnl::memory::data_type::f32;
    case DType::bf16:
      return dnnl::memory::data_type::bf16;
    default:
      throw Error(ErrorKind::usage, fmt::format("no matrix products on {}", name_of(dtype)));
  }
}

Tensor convert(const Tensor& x, DType dtype) {
  if (x.dtype() == dtype) return x;
  Tensor out = Tensor::empty(dtype, x.shape());
  parallel_ranges(x.size(), 1 << 14, [&](std::int64_t begin, std::int64_t end) {
    if (dtype == DType::bf16) {
      const float* from = x.data<float>();
      auto* to = out.data<BFloat16>();
      for (std::int64_t i = begin; i < end; ++i) to[i] = to_bfloat16(from[i]);
    } else {
      const auto* from = x.data<BFloat16>();
      auto* to = out.data<float>();
      for (std::int64_t i = begin; i < end; ++i) to[i] = to_float(from[i]);
    }
  });
  return out;
}

CpuBackend::CpuBackend(const CpuOptions& options) : compute_(options.compute) {
  if (options.threads > 0) omp_set_num_threads(options.threads);
}

std::string CpuBackend::describe() const {
  return fmt::format("cpu, {}, {} threads", attention_kernels().name, omp_get_max_threads());
}

std::string CpuBackend::why() const {
  const std::string products = !multiplies_bf16() && compute_ == DType::bf16
                                   ? "products of bf16 in f32, as this processor multiplies no bf16"
                                   : fmt::format("products in {}", compute_ == DType::bf16 ? "bf16" : "f32");
  return fmt::format("{}; {}", attention_kernels_reason(), products);
}

std::unique_ptr<Backend> make_cpu_backend(const CpuOptions& options) { return std::make_unique<CpuBackend>(options); }

}  // namespace sparvar
