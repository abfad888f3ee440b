// Weights of one transformer block.
#pragma once

#include "models/infinity/infinity.h"

namespace sparvar {

struct Infinity::Block {
  Block(const InfinityConfig& config, int layer, const Weights& weights, Backend& backend);

  Tensor ada_gss;     // f32 [6, C]: added to the shared modulation
  LinearPtr ada_lin;  // or the block's own (shared_aln = false)
  LinearPtr qkv, sa_proj, ca_q, ca_kv, ca_proj, fc1, fc2;
  Tensor head_scale;  // f32 [H]: exp(min(scale_mul_1H11, log 100))
  Tensor ca_norm_weight, ca_norm_bias;
  Tensor ca_gamma;  // f32 [1, C] where the model has it
};

/// Bias of a mat_kv product: zero for k, v_bias for v.
Tensor key_value_bias(const Weights& weights, const std::string& prefix, std::int64_t width);

}  // namespace sparvar
