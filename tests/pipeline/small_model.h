// The bundled model's transformer on a short schedule, with made-up texts.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "pipeline/walk.h"
#include "support.h"
#include "weights/safetensors.h"

namespace sparvar::testing {

inline std::string bundled() { return models_dir() + "/emoji"; }

struct Small {
  std::unique_ptr<Backend> backend = make_cpu_backend({.compute = DType::f32, .threads = 2});
  ModelConfig config = read_model_config(bundled() + "/config.json");
  TensorFile weights = TensorFile::open_in(bundled(), "transformer");
  Infinity model{config.transformer, weights, *backend};

  static PackedText texts(const std::vector<int>& lengths, const std::vector<unsigned>& seeds) {
    PackedText packed;
    std::vector<float> values;
    for (std::size_t i = 0; i < lengths.size(); ++i) {
      const Tensor one = random_tensor({lengths[i], 256}, seeds[i]);
      values.insert(values.end(), one.data<float>(), one.data<float>() + one.size());
      packed.offsets.push_back(packed.offsets.back() + lengths[i]);
    }
    packed.states = Tensor::from(values, {packed.offsets.back(), 256});
    return packed;
  }
  WalkOptions options() const {
    WalkOptions o;
    o.schedule = {config.schedule.begin(), config.schedule.begin() + 6};
    o.rope_grid = config.rope_grid;
    o.cfg.assign(6, 3.0F);
    o.tau.assign(6, 0.8F);
    o.sampling.seed = 5;
    return o;
  }
};

}  // namespace sparvar::testing
