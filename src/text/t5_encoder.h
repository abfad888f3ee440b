// T5 v1.1 encoder: token ids to hidden states.
#pragma once

#include <functional>
#include <vector>

#include "backend/backend.h"
#include "weights/config.h"
#include "weights/safetensors.h"

namespace sparvar {

class T5Encoder {
 public:
  T5Encoder(const T5Config& config, const TensorFile& weights, Backend& backend);
  /// ids -> f32 [ids, d_model]. `observe`, where given, gets the input of block J as ("layer_out", J), after the final
  /// norm with J = num_layers, and the position bias [H, T, T] as ("position_bias", 0).
  Tensor encode(const std::vector<std::int32_t>& ids,
                const std::function<void(const char*, int, const Tensor&)>& observe = {});

 private:
  struct Layer {
    Tensor attention_norm, ffn_norm;
    LinearPtr q, k, v, o, wi_0, wi_1, wo;
  };
  T5Config config_;
  Backend& backend_;
  Tensor embedding_;      // [vocab, d_model], as stored
  Tensor relative_bias_;  // f32 [buckets, heads]
  Tensor final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace sparvar
