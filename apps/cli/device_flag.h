// The flags that say what to compute on and in.
#pragma once

#include <CLI/CLI.hpp>
#include <string>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

void add_device(CLI::App& command, PipelineOptions& options);
void add_precision(CLI::App& command, PipelineOptions& options);
void add_weights(CLI::App& command, PipelineOptions& options);

/// bf16 (as --dtype says) or fp8; throws CLI::ValidationError.
WeightFormat parse_weights(const std::string& name);

}  // namespace sparvar::cli
