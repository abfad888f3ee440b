// T5 encoder with random weights: token ids and hidden states.
#include <fmt/format.h>

#include <algorithm>

#include "conformance/report.h"
#include "text/t5_encoder.h"
#include "text/tokenizer.h"

namespace sparvar::conformance {
namespace {

T5Config read_config(const nlohmann::json& c) {
  return {.vocab_size = c.at("vocab_size"),
          .d_model = c.at("d_model"),
          .d_kv = c.at("d_kv"),
          .d_ff = c.at("d_ff"),
          .num_layers = c.at("num_layers"),
          .num_heads = c.at("num_heads"),
          .relative_attention_num_buckets = c.value("relative_attention_num_buckets", 32),
          .relative_attention_max_distance = c.value("relative_attention_max_distance", 128),
          .layer_norm_epsilon = c.value("layer_norm_epsilon", 1e-6)};
}

/// The fixture keeps every 16th row of long prompts.
Tensor thin_rows(const Tensor& hidden, std::int64_t rows) {
  if (hidden.dim(0) == rows) return hidden;
  const std::int64_t width = hidden.dim(1);
  Tensor out = Tensor::empty(DType::f32, {rows, width});
  for (std::int64_t i = 0; i < rows && 16 * i < hidden.dim(0); ++i)
    std::copy_n(hidden.data<float>() + 16 * i * width, width, out.data<float>() + i * width);
  return out;
}

}  // namespace

void run_t5(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report) {
  const auto backend = settings.backend(DType::f32);
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  const TensorFile weights = TensorFile::open(dir + "/weights.safetensors");
  const Tokenizer tokenizer(dir + "/spiece.model", config.value("extra_ids", 100));
  T5Encoder encoder(read_config(config), weights, *backend);
  const double tolerance = 5 * std::max(2e-6, config.at("check").value("max_abs_diff_fp32_vs_float64", 2e-6));

  const nlohmann::json prompts = read_json(dir + "/prompts.json");
  std::int64_t other_tokens = 0;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const nlohmann::json& row = prompts[i];
    const auto ids = row.at("ids").get<std::vector<std::int32_t>>();
    const auto found = tokenizer.encode(row.at(row.contains("text") ? "text" : "prompt").get<std::string>(),
                                        config.value("max_length", 512));
    bool same = found == ids;
    for (const char* form : {"ids_if_whitespace_split", "ids_sentencepiece_raw"})
      same = same || (row.contains(form) && found == row.at(form).get<std::vector<std::int32_t>>());
    other_tokens += same ? 0 : 1;

    const std::string name = fmt::format("hidden.{:02}", i);
    if (!io.has(name)) continue;
    const Tensor& expected = io.get(name);
    const auto observe = [&](const char* part, int layer, const Tensor& value) {
      const std::string inner =
          std::string(part) == "position_bias" ? "debug.position_bias_40x40" : fmt::format("debug.layer_out.{}", layer);
      if (i != 0 || !io.has(inner)) return;
      if (value.size() == io.get(inner).size()) report.compare(inner, value, io.get(inner), tolerance);
    };
    report.compare(name, thin_rows(encoder.encode(ids, observe), expected.dim(0)), expected, tolerance);
  }
  report.count("ids", other_tokens, static_cast<std::int64_t>(prompts.size()));
}

}  // namespace sparvar::conformance
