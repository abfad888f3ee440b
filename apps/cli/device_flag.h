// The flags that say what to compute on and in.
#pragma once

#include <CLI/CLI.hpp>

#include "sparvar/pipeline.h"

namespace sparvar::cli {

void add_device(CLI::App& command, PipelineOptions& options);
void add_precision(CLI::App& command, PipelineOptions& options);

}  // namespace sparvar::cli
