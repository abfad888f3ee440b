// The flags that many commands share: what to compute on and in, which model, how it draws.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

constexpr const char* kDeviceHelp =
    "auto, cpu, cuda or cuda:N: an NVIDIA GPU (Ampere or newer), where the program was built with -DSPARVAR_CUDA=ON; "
    "auto: a GPU where there is one and it runs the plan (auto)";
void add_device(CLI::App& command, PipelineOptions& options);
void add_precision(CLI::App& command, PipelineOptions& options);
void add_weights(CLI::App& command, PipelineOptions& options);
/// --threads and --model.
void add_engine(CLI::App& command, PipelineOptions& options);
/// --cfg and --tau.
void add_guidance(CLI::App& command, GenerateOptions& options);
void add_seed(CLI::App& command, std::uint64_t& seed, const std::string& help);

/// bf16 (as --dtype says) or fp8; throws CLI::ValidationError.
WeightFormat parse_weights(const std::string& name, const char* known = "bf16 or fp8");

}  // namespace sparvar::cli
