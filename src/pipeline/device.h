// Which device a pipeline runs on.
#pragma once

#include <memory>
#include <string>

#include "backend/backend.h"
#include "sparvar/pipeline.h"

namespace sparvar {

struct Device {
  std::unique_ptr<Backend> backend;
  bool gpu = false;
  std::string why_no_gpu;  // where auto took the CPU
};

/// "auto", "cpu", "cuda" or "cuda:N" of the options. Throws Error(usage) for another name and Error(system) where a GPU
/// was asked for that is not there. Weights as_stored are taken for plain. `planning`: as CudaOptions; a CPU is given
/// as it is.
Device open_device(const PipelineOptions& options, bool planning = false);

/// Of the options, or as_stored decided: fp8 where the folder's weights are (`stored_fp8`) and the device can.
WeightFormat weights_for(const PipelineOptions& options, bool stored_fp8);

/// Throws Error(usage) where no device could have such weights.
void check_weight_format(const PipelineOptions& options);

/// Throws Error(system) where a GPU has less free than `use` asks for, drawing `batch` pictures at once; the message
/// names an option that makes it fit. `what`: the model.
void require_device_memory(const std::string& what, const MemoryUse& use, Precision precision, int batch);

}  // namespace sparvar
