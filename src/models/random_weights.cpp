#include "models/random_weights.h"

#include <cmath>
#include <utility>

#include "bits/sampling.h"

namespace sparvar {
namespace {

constexpr std::int64_t kLevels = 15;        // rows of lvl_embed in the released models
constexpr std::int64_t kLargest = 1 << 20;  // elements that are made on the host

std::int64_t count_of(const Shape& shape) {
  std::int64_t count = 1;
  for (const std::int64_t extent : shape) count *= extent;
  return count;
}

}  // namespace

RandomWeights::RandomWeights(const ModelConfig& config, Backend& backend, std::function<void(std::int64_t)> made)
    : backend_(backend), made_(std::move(made)) {
  const InfinityConfig& t = config.transformer;
  fixed_["cfg_uncond"] = on_host({t.text_maxlen, t.text_channels}, 1.0F);
  fixed_["lvl_embed.weight"] = on_host({kLevels, t.embed_dim}, 0.02F);
}

bool RandomWeights::has(const std::string& name) const {
  return !name.ends_with("ca_gamma") && !name.starts_with("encoder.conv_in");
}

Tensor RandomWeights::get(const std::string& name) const { return fixed_.at(name); }

void RandomWeights::count(std::int64_t elements, DType type) const {
  parameters_ += elements;
  if (made_) made_(elements * static_cast<std::int64_t>(size_of(type)));
}

/// Values of a hash, uniform: good enough, and quick on any host.
Tensor RandomWeights::on_host(const Shape& shape, float deviation) const {
  Tensor out = Tensor::empty(DType::f32, shape);
  const std::uint64_t key = ++seed_;
  const float width = deviation * std::sqrt(12.0F);
  for (std::int64_t i = 0; i < out.size(); ++i) {
    std::uint64_t x = (static_cast<std::uint64_t>(i) + (key << 40)) * 0x9E3779B97F4A7C15ULL;
    x = (x ^ (x >> 32)) * 0xD6E8FEB86659FD93ULL;
    out.data<float>()[i] = (static_cast<float>(x >> 40) * 0x1p-24F - 0.5F) * width;
  }
  count(out.size(), DType::f32);
  return out;
}

Tensor RandomWeights::get(const std::string& name, const Shape& shape) const {
  if (shape.size() == 2 && count_of(shape) > kLargest) {
    count(count_of(shape), backend_.compute_type());
    return backend_.random(backend_.compute_type(), shape, ++seed_, 1.0F / std::sqrt(static_cast<float>(shape[1])));
  }
  return f32(name, shape);
}

Tensor RandomWeights::f32(const std::string& name, const Shape& shape) const {
  if (shape.size() == 1 && (name.ends_with("norm.weight") || name.find("norm") + 12 == name.size())) {
    Tensor ones = on_host(shape, 0.0F);
    for (std::int64_t i = 0; i < ones.size(); ++i) ones.data<float>()[i] = 1.0F;
    return ones;
  }
  const std::int64_t inputs = shape.size() > 1 ? count_of(shape) / shape[0] : 2500;  // a vector: 0.02
  return on_host(shape, 1.0F / std::sqrt(static_cast<float>(inputs)));
}

}  // namespace sparvar
