#include "pipeline/walk.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>

#include "visual/codes.h"

namespace sparvar {

namespace {

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void add(Tensor& sum, const Tensor& x) {
  float* out = sum.data<float>();
  const float* in = x.data<float>();
  for (std::int64_t i = 0; i < sum.size(); ++i) out[i] += in[i];
}

}  // namespace

Tensor walk(Infinity& model, const PackedText& text, const WalkOptions& options) {
  const ScaleSchedule& schedule = options.schedule;
  const int scales = static_cast<int>(schedule.size());
  const bool patchify = model.config().apply_spatial_patchify;
  const Grid last = schedule.back();
  const Grid codes_grid = patchify ? Grid{2 * last.h, 2 * last.w} : last;
  const bool guided = std::any_of(options.cfg.begin(), options.cfg.end(), [](float cfg) { return cfg != 1.0F; });

  Infinity::State state = model.begin(text, guided, schedule, options.rope_grid, options.plan, options.observe);
  Tensor summed = Tensor::zeros(DType::f32, {text.count(), model.config().codebook_dim, codes_grid.h, codes_grid.w});
  Tensor words;
  for (int k = 0; k < scales; ++k) {
    const auto start = std::chrono::steady_clock::now();
    const Tensor logits =
        model.forward(state, words, {options.cfg[k], options.tau[k]}, options.observe, options.cancel);
    Tensor bits = sample_bits(logits, options.sampling, options.first_picture, k);
    if (options.observe) options.observe(fmt::format("bits.s{}", k), bits);
    if (options.forced_bits) bits = options.forced_bits(k);
    add(summed, resize_bilinear(bits_to_codes(bits, schedule[k], patchify), codes_grid));
    if (options.observe) options.observe(fmt::format("summed_codes.s{}", k), summed);
    if (k + 1 < scales) {
      words = codes_to_words(summed, schedule[k + 1], patchify);
      if (options.observe) options.observe(fmt::format("next_features.s{}", k + 1), words);
    }
    if (options.on_scale)
      options.on_scale(
          {schedule[k], seconds_since(start), state.attention().seconds(k), state.attention().share_of_pairs(k)}, k);
  }
  return summed;
}

}  // namespace sparvar
