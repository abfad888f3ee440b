#include "backend/cpu/cpu_backend.h"

#include <fmt/format.h>
#include <omp.h>
#include <sys/mman.h>

#include <latch>
#include <thread>
#include <vector>

#include "backend/cpu/attention/kernels.h"
#include "backend/cpu/dnnl_support.h"
#include "core/held_signals.h"
#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {

dnnl::engine& dnnl_engine() {
  static dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  return engine;
}

void execute(const dnnl::primitive& primitive, const std::unordered_map<int, dnnl::memory>& args) {
  static dnnl::stream stream(dnnl_engine());
  const HeldSignals held;
  primitive.execute(stream, args);
  stream.wait();
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

void require_memory_for_kernels() {
  // A primitive takes 256 KiB for the code of each of its kernels, of which it has tens.
  constexpr std::size_t kReserve = 32 << 20;
  void* block = ::mmap(nullptr, kReserve, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (block == MAP_FAILED)
    throw Error(ErrorKind::system,
                fmt::format("out of memory: {} MiB more were needed; try fewer pictures at once", kReserve >> 20));
  ::munmap(block, kReserve);
}

void rethrow(const dnnl::error& failure) {
  // oneDNN says out_of_memory, or nothing but that it could not make an object.
  throw Error(ErrorKind::system, fmt::format("oneDNN: {}{}", failure.message,
                                             failure.status == dnnl_out_of_memory
                                                 ? ": out of memory; try fewer pictures at once"
                                                 : fmt::format(" (status {})", static_cast<int>(failure.status))));
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

namespace {

/// OpenMP ends the process where it cannot start its threads, so that is tried first, with as many of our own.
void start_threads(int count) {
  static int started = 1;
  if (count <= started) return;
  std::latch all_running(1);
  std::vector<std::jthread> threads;
  try {
    for (int i = 1; i < count; ++i) threads.emplace_back([&] { all_running.wait(); });
  } catch (const std::exception& failure) {
    all_running.count_down();
    throw Error(ErrorKind::system, fmt::format("{} threads: only {} could be started: {}; try a smaller --threads",
                                               count, threads.size() + 1, failure.what()));
  }
  all_running.count_down();
  threads.clear();
  const HeldSignals held;
#pragma omp parallel num_threads(count)
  {}
  started = count;
}

}  // namespace

CpuBackend::CpuBackend(const CpuOptions& options) : compute_(options.compute) {
  if (options.threads > 0) omp_set_num_threads(options.threads);
  start_threads(omp_get_max_threads());
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
