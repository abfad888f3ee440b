#include "common_flags.h"

#include <fmt/format.h>

#include <limits>

#include "flags.h"

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

void add_weights(CLI::App& command, PipelineOptions& options) {
  command
      .add_option_function<std::string>(
          "--weights",
          [&options](const std::string& name) {
            options.weights = name == "auto" ? WeightFormat::as_stored : parse_weights(name, "auto, bf16 or fp8");
          },
          "Of the transformer's blocks: bf16, as --dtype says; fp8: half the memory, on Hopper GPUs; auto: fp8 where "
          "the "
          "model's files hold them so and the device can (auto)")
      ->type_name("auto|bf16|fp8");
}

void add_engine(CLI::App& command, PipelineOptions& options) {
  add_number(command, "--threads", options.threads, Range<int>{1, 1024}, "Threads (all cores)");
  command.add_option("--model", options.model_dir, "Folder of the model (the bundled one)")->type_name("DIR");
}

void add_guidance(CLI::App& command, GenerateOptions& options) {
  add_number_list(command, "--cfg", options.cfg, {0.0F, 10000.0F},
                  "Guidance, one value or one per scale; 1: none (the model's)");
  add_number_list(command, "--tau", options.tau, {1e-4F, 10000.0F},
                  "Temperature, one value or one per scale (the model's)");
}

void add_seed(CLI::App& command, std::uint64_t& seed, const std::string& help) {
  add_number(command, "--seed", seed, Range<std::uint64_t>{0, std::numeric_limits<std::uint64_t>::max()}, help);
}

WeightFormat parse_weights(const std::string& name, const char* known) {
  if (name == "bf16") return WeightFormat::plain;
  if (name == "fp8") return WeightFormat::fp8;
  throw CLI::ValidationError("--weights", fmt::format("expected {}, found '{}'", known, name));
}

}  // namespace sparvar::cli
