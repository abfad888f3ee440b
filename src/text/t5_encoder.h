// T5 v1.1 encoder: token ids to hidden states.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "backend/backend.h"
#include "weights/config.h"
#include "weights/weights.h"

namespace sparvar {

class T5Encoder {
 public:
  T5Encoder(const T5Config& config, const Weights& weights, Backend& backend);
  /// ids -> f32 [ids, d_model], on the host. `observe`, where given, gets the input of block J as ("layer_out", J),
  /// after the final norm with J = num_layers, and the position bias [H, T, T] as ("position_bias", 0).
  Tensor encode(const std::vector<std::int32_t>& ids,
                const std::function<void(const char*, int, const Tensor&)>& observe = {});

 private:
  struct Layer {
    Tensor attention_norm, ffn_norm;
    LinearPtr q, k, v, o, wi_0, wi_1, wo;
  };
  /// What one (rounded) length needs: inputs, and the program that turns them into `hidden`.
  struct Length {
    Tensor embedded;  // f32 [tokens, d_model]
    Tensor count;     // I32 [1]: tokens that are there
    Tensor bias;      // f32 [H, tokens, tokens]
    Tensor hidden;
    ProgramPtr program;
  };
  using Observe = std::function<void(const char*, int, const Tensor&)>;
  Length make_length(std::int64_t tokens);
  Tensor embed(const std::vector<std::int32_t>& ids, std::int64_t tokens) const;
  Tensor run_layers(const Length& inputs, const Observe& observe);
  void run_layer(const Layer& layer, Tensor& x, const Length& inputs);

  T5Config config_;
  Backend& backend_;
  std::map<std::int64_t, Length> lengths_;  // of a backend that records
  Tensor embedding_;                        // [vocab, d_model], as stored
  Tensor relative_bias_;                    // f32 [buckets, heads], on the host
  Tensor final_norm_;
  std::vector<Layer> layers_;
};

}  // namespace sparvar
