// The network of upstream's BSQ-VAE (infinity/models/bsq_vae/flux_vqgan.py), top to bottom. Feature maps are NHWC.
#include "visual/bsq_vae.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "sparvar/error.h"

namespace sparvar {
namespace {

struct Norm {
  Tensor weight;
  Tensor bias;
};

struct ResidualBlock {
  Norm norm1;
  ConvolutionPtr conv1;
  Norm norm2;
  ConvolutionPtr conv2;
  ConvolutionPtr nin_shortcut;  // where the number of channels changes
};

/// One resolution: its blocks, and the convolution that leads to the next resolution (none at the last).
struct Level {
  std::vector<ResidualBlock> blocks;
  ConvolutionPtr resample;
};

struct Network {
  ConvolutionPtr conv_in;
  ResidualBlock mid_block_1;
  ResidualBlock mid_block_2;
  std::vector<Level> levels;  // in the order they run
  Norm norm_out;
  ConvolutionPtr conv_out;
};

// ---- weights

class Loader {
 public:
  Loader(const VaeConfig& config, const Weights& weights, Backend& backend)
      : config_(config), weights_(weights), backend_(backend) {}

  /// Widths of the levels, the finest first.
  std::int64_t channels(int level) const {
    return static_cast<std::int64_t>(config_.ch) * config_.ch_mult[static_cast<std::size_t>(level)];
  }
  int levels() const { return static_cast<int>(config_.ch_mult.size()); }
  int halvings() const { return static_cast<int>(std::lround(std::log2(config_.patch_size))); }

  ConvolutionPtr convolution(const std::string& name, std::int64_t in, std::int64_t out, int kernel = 3,
                             int stride = 1) const {
    const Tensor weight = weights_.get(name + ".conv.weight", {out, in, kernel, kernel});
    const Tensor bias = weights_.f32(name + ".conv.bias", {out});
    // Upstream pads the stride-2 convolution at the right and the bottom only.
    const int pad_end = kernel / 2;
    const int pad_begin = stride == 1 ? pad_end : 0;
    return backend_.prepare_convolution(weight, bias, stride, pad_begin, pad_end);
  }

  Norm norm(const std::string& name, std::int64_t channels) const {
    if (channels % config_.norm_num_groups != 0)
      throw Error(ErrorKind::input,
                  fmt::format("{}: {} has {} channels, which norm_num_groups = {} does not divide; check `vae` "
                              "in config.json",
                              weights_.path(), name, channels, config_.norm_num_groups));
    return {backend_.upload(weights_.f32(name + ".norm.weight", {channels})),
            backend_.upload(weights_.f32(name + ".norm.bias", {channels}))};
  }

  ResidualBlock block(const std::string& name, std::int64_t in, std::int64_t out) const {
    ResidualBlock block;
    block.norm1 = norm(name + ".norm1", in);
    block.conv1 = convolution(name + ".conv1", in, out);
    block.norm2 = norm(name + ".norm2", out);
    block.conv2 = convolution(name + ".conv2", out, out);
    if (in != out) block.nin_shortcut = convolution(name + ".nin_shortcut", in, out, 1);
    return block;
  }

  std::vector<ResidualBlock> blocks(const std::string& name, int count, std::int64_t in, std::int64_t out) const {
    std::vector<ResidualBlock> blocks;
    blocks.reserve(static_cast<std::size_t>(count));
    for (int i = 0; i < count; ++i)
      blocks.push_back(block(fmt::format("{}.block.{}", name, i), i == 0 ? in : out, out));
    return blocks;
  }

  Network decoder() const {
    Network net;
    std::int64_t width = channels(levels() - 1);
    net.conv_in = convolution("decoder.conv_in", config_.codebook_dim, width);
    net.mid_block_1 = block("decoder.mid.block_1", width, width);
    net.mid_block_2 = block("decoder.mid.block_2", width, width);
    for (int i = levels() - 1; i >= 0; --i) {
      const std::string name = fmt::format("decoder.up.{}", i);
      Level level;
      level.blocks = blocks(name, config_.num_res_blocks + 1, width, channels(i));
      width = channels(i);
      if (i >= 1 && i <= halvings()) level.resample = convolution(name + ".upsample.conv", width, width);
      net.levels.push_back(std::move(level));
    }
    net.norm_out = norm("decoder.norm_out", width);
    net.conv_out = convolution("decoder.conv_out", width, 3);
    return net;
  }

  Network encoder() const {
    Network net;
    std::int64_t width = config_.ch;
    net.conv_in = convolution("encoder.conv_in", 3, width);
    for (int i = 0; i < levels(); ++i) {
      const std::string name = fmt::format("encoder.down.{}", i);
      Level level;
      level.blocks = blocks(name, config_.num_res_blocks, width, channels(i));
      width = channels(i);
      if (i < halvings()) level.resample = convolution(name + ".downsample.conv", width, width, 3, 2);
      net.levels.push_back(std::move(level));
    }
    net.mid_block_1 = block("encoder.mid.block_1", width, width);
    net.mid_block_2 = block("encoder.mid.block_2", width, width);
    net.norm_out = norm("encoder.norm_out", width);
    net.conv_out = convolution("encoder.conv_out", width, config_.codebook_dim);
    return net;
  }

 private:
  const VaeConfig& config_;
  const Weights& weights_;
  Backend& backend_;
};

void check_config(const VaeConfig& config, const std::string& path) {
  const auto fail = [&](const std::string& why) {
    throw Error(ErrorKind::input, fmt::format("{}: the `vae` of config.json is impossible: {}", path, why));
  };
  if (config.codebook_dim < 1) fail(fmt::format("codebook_dim = {}", config.codebook_dim));
  if (config.ch < 1) fail(fmt::format("ch = {}", config.ch));
  if (config.ch_mult.empty()) fail("ch_mult is empty");
  for (const int mult : config.ch_mult)
    if (mult < 1) fail(fmt::format("ch_mult holds {}", mult));
  if (config.num_res_blocks < 1 || config.num_res_blocks > 1000)
    fail(fmt::format("num_res_blocks = {}", config.num_res_blocks));
  if (config.norm_num_groups < 1) fail(fmt::format("norm_num_groups = {}", config.norm_num_groups));
  // 2^(levels - 1) at most: only as many levels can halve the picture.
  const int largest = config.ch_mult.size() > 30 ? 1 << 30 : 1 << (config.ch_mult.size() - 1);
  const bool power_of_two = config.patch_size > 0 && (config.patch_size & (config.patch_size - 1)) == 0;
  if (!power_of_two || config.patch_size > largest)
    fail(fmt::format("patch_size = {}, expected a power of two of at most {} for {} levels of ch_mult",
                     config.patch_size, largest, config.ch_mult.size()));
}

/// Throws unless `x` is f32 [B, channels, H, W] of at least one pixel.
void check_input(const Tensor& x, std::int64_t channels, const char* what) {
  if (x.rank() != 4 || x.dtype() != DType::f32 || x.dim(1) != channels || x.size() == 0)
    throw Error(ErrorKind::usage, fmt::format("{} is F32 [B, {}, h, w], got {} {}", what, channels, name_of(x.dtype()),
                                              to_string(x.shape())));
}

}  // namespace

// ---- the network

struct BsqVae::Impl {
  VaeConfig config;
  Backend* backend = nullptr;
  Network decoder;
  Network encoder;

  Tensor norm(const Tensor& x, const Norm& norm, bool silu) const {
    return backend->group_norm(x, config.norm_num_groups, norm.weight, norm.bias, static_cast<float>(config.norm_eps),
                               silu);
  }

  // Maps are handed over, so that each is freed as soon as it has been read.
  Tensor run(const ResidualBlock& block, Tensor x) const {
    Tensor h = norm(x, block.norm1, true);
    h = backend->convolution(h, *block.conv1, {});
    h = norm(h, block.norm2, true);
    if (block.nin_shortcut) x = backend->convolution(x, *block.nin_shortcut, {});
    return backend->convolution(h, *block.conv2, x);
  }

  Tensor run(const Level& level, Tensor x) const {
    for (const ResidualBlock& block : level.blocks) x = run(block, std::move(x));
    return x;
  }

  Tensor decode(Tensor h) const {
    h = backend->convolution(h, *decoder.conv_in, {});
    h = run(decoder.mid_block_1, std::move(h));
    h = run(decoder.mid_block_2, std::move(h));
    for (const Level& level : decoder.levels) {
      h = run(level, std::move(h));
      if (!level.resample) continue;
      h = backend->upsampled_convolution(h, *level.resample);
    }
    h = norm(h, decoder.norm_out, true);
    return backend->convolution(h, *decoder.conv_out, {});
  }

  Tensor encode(Tensor h) const {
    h = backend->convolution(h, *encoder.conv_in, {});
    for (const Level& level : encoder.levels) {
      h = run(level, std::move(h));
      if (level.resample) h = backend->convolution(h, *level.resample, {});
    }
    h = run(encoder.mid_block_1, std::move(h));
    h = run(encoder.mid_block_2, std::move(h));
    h = norm(h, encoder.norm_out, true);
    return backend->convolution(h, *encoder.conv_out, {});
  }
};

BsqVae::BsqVae(const VaeConfig& config, const Weights& weights, Backend& backend) : impl_(std::make_unique<Impl>()) {
  check_config(config, weights.path());
  impl_->config = config;
  impl_->backend = &backend;
  const Loader loader(config, weights, backend);
  impl_->decoder = loader.decoder();
  if (weights.has("encoder.conv_in.conv.weight")) impl_->encoder = loader.encoder();
}

BsqVae::~BsqVae() = default;
BsqVae::BsqVae(BsqVae&&) noexcept = default;

bool BsqVae::can_encode() const { return impl_->encoder.conv_in != nullptr; }

Tensor BsqVae::decode(const Tensor& codes) {
  check_input(codes, impl_->config.codebook_dim, "a map of codes");
  Backend& backend = *impl_->backend;
  const std::int64_t patch = impl_->config.patch_size;
  Tensor pictures = Tensor::empty(DType::f32, {codes.dim(0), 3, codes.dim(2) * patch, codes.dim(3) * patch});
  for (std::int64_t b = 0; b < codes.dim(0); ++b) {  // one by one: the largest maps are those of the full resolution
    const Tensor map = backend.to_nhwc(backend.upload(codes.rows(b, b + 1)));
    const Tensor decoded = backend.download(backend.to_nchw(impl_->decode(map), 1.0F));
    std::copy_n(decoded.data<float>(), decoded.size(), pictures.data<float>() + b * decoded.size());
  }
  return pictures;
}

Tensor BsqVae::draw(const Tensor& codes) {
  check_input(codes, impl_->config.codebook_dim, "a map of codes");
  return impl_->backend->to_bytes(impl_->decode(impl_->backend->to_nhwc(codes)));
}

Tensor BsqVae::encode(const Tensor& picture) {
  if (!can_encode())
    throw Error(ErrorKind::usage,
                "this model's VAE file holds no encoder (no tensor encoder.conv_in.conv.weight): it can only decode");
  check_input(picture, 3, "a picture");
  const std::int64_t patch = impl_->config.patch_size;
  if (picture.dim(0) != 1 || picture.dim(2) % patch != 0 || picture.dim(3) % patch != 0)
    throw Error(ErrorKind::usage,
                fmt::format("one picture whose sides are multiples of {} is encoded at a time, got {}", patch,
                            to_string(picture.shape())));
  Backend& backend = *impl_->backend;
  const Tensor h = impl_->encode(backend.to_nhwc(backend.upload(picture)));
  return backend.download(backend.to_nchw(h, INFINITY));
}

Image to_image(const Tensor& pixels, int index) {
  if (pixels.rank() != 4 || pixels.dtype() != DType::u8 || pixels.dim(3) != 3)
    throw Error(ErrorKind::usage, fmt::format("pictures are U8 [B, H, W, 3], got {} {}", name_of(pixels.dtype()),
                                              to_string(pixels.shape())));
  if (index < 0 || index >= pixels.dim(0))
    throw Error(ErrorKind::usage, fmt::format("picture {} of a batch of {} was asked for", index, pixels.dim(0)));
  const Tensor one = pixels.rows(index, index + 1);
  Image image{static_cast<int>(pixels.dim(2)), static_cast<int>(pixels.dim(1)), {}};
  image.rgb.assign(one.data<std::uint8_t>(), one.data<std::uint8_t>() + one.size());
  return image;
}

Tensor from_image(const Image& image) {
  const std::size_t pixels =
      static_cast<std::size_t>(std::max(image.width, 0)) * static_cast<std::size_t>(std::max(image.height, 0));
  if (pixels == 0 || image.rgb.size() != 3 * pixels)
    throw Error(ErrorKind::usage, fmt::format("a picture of {}x{} pixels cannot hold {} bytes", image.width,
                                              image.height, image.rgb.size()));
  Tensor out = Tensor::empty(DType::f32, {1, 3, image.height, image.width});
  for (std::size_t c = 0; c < 3; ++c)
    for (std::size_t p = 0; p < pixels; ++p)
      out.data<float>()[c * pixels + p] = 2.0F * (static_cast<float>(image.rgb[3 * p + c]) / 255.0F) - 1.0F;
  return out;
}

}  // namespace sparvar
