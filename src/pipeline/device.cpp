#include "pipeline/device.h"

#include <fmt/format.h>

#include <charconv>

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

Device open_device(const PipelineOptions& options, bool planning) {
  const DType compute = options.precision == Precision::f32 ? DType::f32 : DType::bf16;
  Device device;
  if (options.device != "cpu") {
    const int index = index_of(options.device);
    device.backend = make_cuda_backend({.compute = compute, .device = index, .planning = planning}, device.why_no_gpu);
    device.gpu = device.backend != nullptr;
    if (!device.gpu && options.device != "auto")
      throw Error(ErrorKind::system, fmt::format("device {}: {}", options.device, device.why_no_gpu));
  }
  if (!device.gpu) device.backend = make_cpu_backend({.compute = compute, .threads = options.threads});
  return device;
}

}  // namespace sparvar
