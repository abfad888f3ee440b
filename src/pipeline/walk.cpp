#include "pipeline/walk.h"

#include <fmt/format.h>

#include <algorithm>

#include "core/cancel.h"
#include "core/memory_pool.h"

namespace sparvar {
namespace {

constexpr int kTrimTokens = 256;  // smaller scales take too little to be worth fresh pages

}  // namespace

Grid codes_grid(const InfinityConfig& config, const StateShape& shape) {
  const Grid full = shape.full_grid();
  return config.apply_spatial_patchify ? Grid{2 * full.h, 2 * full.w} : full;
}

bool guided(const std::vector<float>& cfg) {
  return std::any_of(cfg.begin(), cfg.end(), [](float value) { return value != 1.0F; });
}

Walk::Walk(Infinity& model, Backend& backend, const StateShape& shape)
    : model_(model), backend_(backend), state_(model.make_state(shape)) {
  const auto scales = static_cast<std::int64_t>(shape.schedule.size());
  const Grid full = codes_grid(model.config(), shape);
  guidance_ = backend.zeros(DType::f32, {scales, 2});
  sampling_ = backend.zeros(DType::i64, {4});
  summed_ = backend.zeros(DType::f32, {shape.pictures, model.config().codebook_dim, full.h, full.w});
  words_.resize(scales);
  text_program_ = backend.program([this] { read_text({}); });
  for (int k = 0; k < scales; ++k) scale_programs_.push_back(backend.program([this, k] { run_scale(k, {}, nullptr); }));
}

void Walk::read_text(const WalkWatch& watch) {
  model_.read_text(state_, watch.observe);
  backend_.fill_zero(summed_);
}

void Walk::run_scale(int k, const WalkWatch& watch, const std::atomic<bool>* cancel) {
  const auto show = [&](const char* name, int scale, const Tensor& value) {
    if (watch.observe) watch.observe(fmt::format("{}.s{}", name, scale), backend_.download(value));
  };
  const ScaleSchedule& schedule = shape().schedule;
  const bool patchify = model_.config().apply_spatial_patchify;
  const Tensor logits = model_.forward(state_, k, words_[k], guidance_.rows(k, k + 1), watch.observe, cancel);
  words_[k] = Tensor();
  Tensor bits = backend_.sample_bits(logits, sampling_, k);
  show("bits", k, bits);
  if (watch.forced_bits) bits = backend_.upload(watch.forced_bits(k));
  backend_.add_codes(summed_, bits, schedule[k], patchify);
  show("summed_codes", k, summed_);
  if (k + 1 == static_cast<int>(schedule.size())) return;
  words_[k + 1] = backend_.codes_to_words(summed_, schedule[k + 1], patchify);
  show("next_features", k + 1, words_[k + 1]);
}

void Walk::run_programs(const std::function<void(int scale)>& after_scale) {
  text_program_->run();
  for (int k = 0; k < static_cast<int>(scale_programs_.size()); ++k) {
    scale_programs_[k]->run();
    if (after_scale) after_scale(k);
  }
  if (backend_.records()) model_.release_caches(state_);
}

void Walk::write_inputs(const PackedText& text, const WalkInputs& inputs) {
  model_.write_text(state_, text);
  Tensor guidance = Tensor::empty(DType::f32, guidance_.shape());
  for (std::int64_t k = 0; k < guidance.dim(0); ++k) {
    guidance.data<float>()[2 * k] = inputs.cfg[k];
    guidance.data<float>()[2 * k + 1] = 1.0F / inputs.tau[k];
  }
  backend_.write(guidance_, guidance);
  backend_.write(sampling_, SamplingWords(inputs.sampling, inputs.first_picture).to_tensor());
}

ScaleTiming Walk::timing(int k, double seconds) const {
  return {.grid = shape().schedule[k],
          .seconds = seconds,
          .attention_seconds = state_.attention().seconds(k),
          .share_of_pairs = state_.attention().share_of_pairs(k)};
}

void Walk::run_in_turn(const WalkInputs& inputs, const std::function<void(int scale)>& run) {
  for (int k = 0; k < static_cast<int>(shape().schedule.size()); ++k) {
    // What earlier scales left in the pool is too small for this one, and would be held for nothing.
    if (!backend_.records() && shape().schedule[k].tokens() >= kTrimTokens) trim_pool();
    const MarkPtr start = backend_.mark();
    run(k);
    const double seconds = backend_.mark()->seconds_since(*start);
    if (inputs.on_codes) inputs.on_codes(summed_, k);  // first, so that who hears of a scale has its previews
    if (inputs.on_scale) inputs.on_scale(timing(k, seconds), k);
  }
}

void Walk::run_watched(const WalkInputs& inputs, const WalkWatch& watch) {
  read_text(watch);
  run_in_turn(inputs, [&](int k) { run_scale(k, watch, inputs.cancel); });
}

void Walk::run_recorded(const WalkInputs& inputs) {
  text_program_->run();
  if (inputs.on_codes) {
    run_in_turn(inputs, [&](int k) {
      scale_programs_[k]->run();
      throw_if_cancelled(inputs.cancel);
    });
    return;
  }
  std::vector<MarkPtr> marks;
  marks.push_back(backend_.mark());
  for (const ProgramPtr& program : scale_programs_) {  // all enqueued before the first is waited for
    program->run();
    marks.push_back(backend_.mark());
  }
  for (int k = 0; k < static_cast<int>(scale_programs_.size()); ++k) {
    const double seconds = marks[k + 1]->seconds_since(*marks[k]);
    if (inputs.on_scale) inputs.on_scale(timing(k, seconds), k);
  }
  throw_if_cancelled(inputs.cancel);
}

const Tensor& Walk::run(const PackedText& text, const WalkInputs& inputs, const WalkWatch& watch) {
  write_inputs(text, inputs);
  state_.observe_lists(inputs.on_lists);
  state_.observe_queries(inputs.on_attention);
  state_.observe_choices(watch.on_choice);
  const bool is_watched = watch.observe || watch.forced_bits || watch.on_choice || inputs.on_attention;
  if (backend_.records() && !is_watched) {
    run_recorded(inputs);
  } else {
    was_watched_ = true;
    run_watched(inputs, watch);
  }
  if (backend_.records()) model_.release_caches(state_);  // for what comes now
  return summed_;
}

Tensor walk(Infinity& model, Backend& backend, const PackedText& text, const WalkOptions& options) {
  int longest = 0;
  for (int i = 0; i < text.count(); ++i) longest = std::max(longest, text.offsets[i + 1] - text.offsets[i]);
  Walk once(model, backend,
            {.pictures = text.count(),
             .guided = options.uncond_until > 0 && guided(options.cfg),
             .uncond_until = std::max(options.uncond_until, 1),
             .schedule = options.schedule,
             .full = options.full,
             .rope_grid = options.rope_grid,
             .plan = options.plan,
             .order = options.order,
             .text_tokens = text.offsets.back(),
             .longest_text = longest});
  return backend.download(once.run(text, options, options));
}

}  // namespace sparvar
