#include "device_flag.h"

#include <fmt/format.h>

namespace sparvar::cli {
namespace {

Precision parse_precision(const std::string& name) {
  if (name == "f32") return Precision::f32;
  if (name == "bf16") return Precision::bf16;
  throw CLI::ValidationError("--dtype", fmt::format("expected f32 or bf16, found '{}'", name));
}

}  // namespace

void add_device(CLI::App& command, PipelineOptions& options) {
  command.add_option("--device", options.device, kDeviceHelp)->type_name("NAME");
}

void add_precision(CLI::App& command, PipelineOptions& options) {
  command
      .add_option_function<std::string>(
          "--dtype", [&options](const std::string& name) { options.precision = parse_precision(name); },
          "Numbers to compute in (bf16)")
      ->type_name("f32|bf16");
}

}  // namespace sparvar::cli
