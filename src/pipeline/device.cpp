#include "pipeline/device.h"

#include <fmt/format.h>

#include <charconv>

#include "pipeline/product_file.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

int index_of(const std::string& name) {
  if (name == "auto" || name == "cuda") return 0;
  int index = -1;
  if (name.starts_with("cuda:")) {
    const char* end = name.data() + name.size();
    const auto [stop, status] = std::from_chars(name.data() + 5, end, index);
    if (status != std::errc{} || stop != end) index = -1;
  }
  if (index < 0)
    throw Error(ErrorKind::usage, fmt::format("there is no device '{}'; devices are auto, cpu, cuda and cuda:N", name));
  return index;
}

}  // namespace

WeightFormat weights_for(const PipelineOptions& options, bool stored_fp8) {
  if (options.weights != WeightFormat::as_stored) return options.weights;
  if (!stored_fp8 || options.precision == Precision::f32 || options.device == "cpu") return WeightFormat::plain;
  std::string why;
  const auto able = make_cuda_backend(
      {.compute = DType::bf16, .device = index_of(options.device), .fp8 = true, .planning = true, .hopper = true}, why);
  return able != nullptr ? WeightFormat::fp8 : WeightFormat::plain;
}

void check_weight_format(const PipelineOptions& options) {
  if (options.weights != WeightFormat::fp8) return;
  if (options.precision == Precision::f32)
    throw Error(ErrorKind::usage, "fp8 weights are multiplied with bf16 activations: take --dtype bf16");
  if (options.device == "cpu")
    throw Error(ErrorKind::usage, "fp8 weights need a Hopper GPU: take --device cuda, or --weights bf16");
}

Device open_device(const PipelineOptions& options, bool planning) {
  const DType compute = options.precision == Precision::f32 ? DType::f32 : DType::bf16;
  const bool fp8 = options.weights == WeightFormat::fp8;
  check_weight_format(options);
  Device device;
  if (options.device != "cpu") {
    const int index = index_of(options.device);
    device.backend = make_cuda_backend({.compute = compute,
                                        .device = index,
                                        .fp8 = fp8,
                                        .planning = planning,
                                        .hopper = true,
                                        .choices = product_choices_of_environment()},
                                       device.why_no_gpu);
    device.gpu = device.backend != nullptr;
    if (!device.gpu && options.device != "auto")
      throw Error(ErrorKind::system,
                  fmt::format("device {}: {}; --device cpu does without", options.device, device.why_no_gpu));
  }
  if (!device.gpu && fp8)
    throw Error(ErrorKind::system, fmt::format("fp8 weights: {}; take --weights bf16", device.why_no_gpu));
  if (!device.gpu) device.backend = make_cpu_backend({.compute = compute, .threads = options.threads});
  return device;
}

namespace {

constexpr std::int64_t kLibraries = 256LL << 20;  // what cuBLAS, cuDNN and the kernels themselves take

/// Half the numbers need half the bytes; fewer pictures need less cache and smaller activations.
std::string what_would_fit(const MemoryUse& use, Precision precision, int batch) {
  const auto fits = [&](double share, int pictures) {
    const double working = static_cast<double>(use.working) * pictures / batch;
    return share * (static_cast<double>(use.weights) + working) + kLibraries <= static_cast<double>(use.device_free);
  };
  for (int pictures = batch / 2; pictures > 0; pictures /= 2)
    if (fits(1, pictures)) return fmt::format("--batch {} would fit", pictures);
  if (precision == Precision::f32) {
    for (int pictures = batch; pictures > 0; pictures /= 2)
      if (fits(0.5, pictures)) return fmt::format("--dtype bf16 --batch {} would fit", pictures);
  }
  return "--device cpu does without it";
}

}  // namespace

void require_device_memory(const std::string& what, const MemoryUse& use, Precision precision, int batch) {
  const std::int64_t wanted = use.weights + use.working + kLibraries;
  if (use.device_total == 0 || wanted <= use.device_free) return;
  const auto gib = [](std::int64_t bytes) { return static_cast<double>(bytes) / (1LL << 30); };
  throw Error(
      ErrorKind::system,
      fmt::format("{}: needs {:.1f} GiB of GPU memory ({:.1f} weights, {:.1f} cache and activations) and {:.1f} of "
                  "{:.1f} are free; {}",
                  what, gib(wanted), gib(use.weights), gib(use.working), gib(use.device_free), gib(use.device_total),
                  what_would_fit(use, precision, batch)));
}

}  // namespace sparvar
