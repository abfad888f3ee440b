// The VAE's network against upstream's tensors, and its errors.
#include "visual/bsq_vae.h"

#include <gtest/gtest.h>

#include "bits/codes.h"
#include "fixture.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using testing::Fixture;
using testing::max_difference;
using testing::thinned_unit_picture;

Image picture(const Tensor& rgb_hwc) {
  const std::size_t rank = rgb_hwc.shape().size();
  const std::uint8_t* bytes = rgb_hwc.data<std::uint8_t>();
  return {static_cast<int>(rgb_hwc.shape()[rank - 2]),
          static_cast<int>(rgb_hwc.shape()[rank - 3]),
          {bytes, bytes + rgb_hwc.size()}};
}

int largest_difference(const Image& a, const Image& b) {
  if (a.rgb.size() != b.rgb.size()) return 256;
  int worst = 0;
  for (std::size_t i = 0; i < a.rgb.size(); ++i) worst = std::max(worst, std::abs(int{a.rgb[i]} - int{b.rgb[i]}));
  return worst;
}

TEST(BsqVae, EncodesAsUpstream) {
  const Fixture fixture("bsq-vae");
  const TensorFile io = fixture.open("io.safetensors");
  const auto backend = make_cpu_backend({DType::f32, 0});
  BsqVae vae(fixture.vae(), fixture.open("weights.safetensors"), *backend);
  ASSERT_TRUE(vae.can_encode());
  const Tensor features = vae.encode(from_image(picture(io.get("image_u8_rgb_hwc"))));
  ASSERT_EQ(features.shape(), io.get("encoder_features").shape());
  EXPECT_LE(max_difference(features, io.get("encoder_features")), 2e-4);
}

TEST(BsqVae, DecodesAsUpstream) {
  const Fixture fixture("bsq-vae");
  const TensorFile io = fixture.open("io.safetensors");
  const auto backend = make_cpu_backend({DType::f32, 0});
  BsqVae vae(fixture.vae(), fixture.open("weights.safetensors"), *backend);
  const Tensor decoded = vae.decode(io.get("quantized_sum"));
  ASSERT_EQ(decoded.shape(), (Shape{1, 3, 320, 240}));
  EXPECT_LE(max_difference(thinned_unit_picture(decoded), io.get("recon_rgb_sub2")), 5e-5);
}

TEST(BsqVae, DecodesInBf16) {
  const Fixture fixture("bsq-vae");
  const TensorFile io = fixture.open("io.safetensors");
  const auto backend = make_cpu_backend({DType::bf16, 0});
  BsqVae vae(fixture.vae(), fixture.open("weights.safetensors"), *backend);
  const Tensor decoded = vae.decode(io.get("quantized_sum"));
  EXPECT_EQ(decoded.dtype(), DType::f32);
  EXPECT_LE(max_difference(thinned_unit_picture(decoded), io.get("recon_rgb_sub2")), 0.03);
}

TEST(BsqVae, AFileWithoutEncoderOnlyDecodes) {
  const Fixture fixture("infinity-tiny-patchify");
  const TensorFile io = fixture.open("io.safetensors");
  const auto backend = make_cpu_backend({DType::f32, 0});
  BsqVae vae(fixture.vae(), fixture.open("vae.safetensors"), *backend);
  EXPECT_FALSE(vae.can_encode());
  const Tensor decoded = vae.decode(io.get("summed_codes.s6"));
  EXPECT_LE(max_difference(thinned_unit_picture(decoded), io.get("image_rgb_sub2")), 2e-4);
  EXPECT_THROW(vae.encode(Tensor::zeros(DType::f32, {1, 3, 64, 64})), Error);
}

/// Bits of a fixture of the bundled model, 16 packed in two bytes, most significant first.
Tensor unpacked(const Tensor& packed) {
  Tensor bits = Tensor::empty(DType::u8, {1, packed.dim(0), 16});
  for (std::int64_t i = 0; i < bits.size(); ++i)
    bits.data<std::uint8_t>()[i] = (packed.data<std::uint8_t>()[i / 8] >> (7 - i % 8)) & 1;
  return bits;
}

/// The bundled model's summed codes of a fixture; its grids are square.
Tensor summed_codes(const TensorFile& io) {
  Tensor summed = Tensor::zeros(DType::f32, {1, 16, 64, 64});
  for (int k = 0; k < 13; ++k) {
    const Tensor bits = unpacked(io.get("bits.s" + std::to_string(k)));
    const int side = static_cast<int>(std::lround(std::sqrt(static_cast<double>(bits.dim(1)))));
    const Tensor codes = resize_bilinear(bits_to_codes(bits, {side, side}, false), {64, 64});
    for (std::int64_t i = 0; i < summed.size(); ++i) summed.data<float>()[i] += codes.data<float>()[i];
  }
  return summed;
}

TEST(BsqVae, BundledModelDrawsTheFixturesPicture) {
  const ModelConfig config = read_model_config(testing::models_dir() + "/emoji/config.json");
  const TensorFile weights = TensorFile::open_in(testing::models_dir() + "/emoji", "vae");
  const TensorFile io = Fixture("emoji").open("io-0.safetensors");
  const Image want = picture(io.get("image_u8_rgb_hwc"));
  const Tensor codes = summed_codes(io);
  for (const DType type : {DType::f32, DType::bf16}) {
    const auto backend = make_cpu_backend({type, 0});
    BsqVae vae(config.vae, weights, *backend);
    const Image got = to_image(vae.draw(codes), 0);
    EXPECT_LE(largest_difference(got, want), type == DType::f32 ? 1 : 24) << name_of(type);
    EXPECT_GE(psnr(got, want), type == DType::f32 ? 75.0 : 38.0) << name_of(type);
  }
}

TEST(BsqVae, ABatchIsItsPictures) {
  const Fixture fixture("infinity-tiny-patchify");
  const auto backend = make_cpu_backend({DType::f32, 0});
  BsqVae vae(fixture.vae(), fixture.open("vae.safetensors"), *backend);
  const Tensor codes = testing::random_tensor({3, 14, 5, 3}, 12);
  const Tensor batch = vae.decode(codes);
  ASSERT_EQ(batch.shape(), (Shape{3, 3, 40, 24}));
  for (int b = 0; b < 3; ++b) EXPECT_EQ(max_difference(batch.rows(b, b + 1), vae.decode(codes.rows(b, b + 1))), 0);
}

/// What construction with a changed config says.
std::string complaint(const VaeConfig& config, const TensorFile& weights) {
  const auto backend = make_cpu_backend({DType::f32, 0});
  try {
    const BsqVae vae(config, weights, *backend);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::input);
    return error.what();
  }
  return "";
}

TEST(BsqVae, AConfigThatDoesNotFitTheWeightsIsRefused) {
  const Fixture fixture("bsq-vae");
  const TensorFile weights = fixture.open("weights.safetensors");
  const auto with = [&](auto change) {
    VaeConfig config = fixture.vae();
    change(config);
    return complaint(config, weights);
  };
  EXPECT_EQ(with([](VaeConfig&) {}), "");
  EXPECT_NE(with([](VaeConfig& c) { c.codebook_dim = 14; }).find("decoder.conv_in.conv.weight"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.num_res_blocks = 2; }).find("block.2"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.ch = 64; }).find("decoder.conv_in.conv.weight"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.norm_num_groups = 24; }).find("norm_num_groups"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.patch_size = 24; }).find("patch_size"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.patch_size = 64; }).find("patch_size"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.ch_mult.clear(); }).find("ch_mult"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.ch_mult[0] = 0; }).find("ch_mult"), std::string::npos);
  EXPECT_NE(with([](VaeConfig& c) { c.norm_num_groups = 0; }).find("norm_num_groups"), std::string::npos);
}

TEST(BsqVae, InputsThatDoNotFitAreRefused) {
  const Fixture fixture("bsq-vae");
  const auto backend = make_cpu_backend({DType::f32, 0});
  BsqVae vae(fixture.vae(), fixture.open("weights.safetensors"), *backend);
  EXPECT_THROW(vae.decode(Tensor::zeros(DType::f32, {1, 15, 2, 2})), Error);
  EXPECT_THROW(vae.decode(Tensor::zeros(DType::f32, {1, 16, 2, 0})), Error);
  EXPECT_THROW(vae.decode(Tensor::zeros(DType::f32, {16, 2, 2})), Error);
  EXPECT_THROW(vae.encode(Tensor::zeros(DType::f32, {1, 3, 32, 40})), Error);
  EXPECT_THROW(vae.encode(Tensor::zeros(DType::f32, {2, 3, 32, 32})), Error);
}

TEST(Pictures, AreRowsOfBytes) {
  Tensor pixels = Tensor::zeros(DType::u8, {2, 1, 2, 3});
  for (int i = 0; i < 12; ++i) pixels.data<std::uint8_t>()[i] = static_cast<std::uint8_t>(i);
  const Image image = to_image(pixels, 1);
  EXPECT_EQ(image.width, 2);
  EXPECT_EQ(image.height, 1);
  EXPECT_EQ(image.rgb, (std::vector<std::uint8_t>{6, 7, 8, 9, 10, 11}));
  EXPECT_THROW(to_image(pixels, 2), Error);
  EXPECT_THROW(to_image(Tensor::zeros(DType::f32, {1, 3, 2, 2}), 0), Error);
}

TEST(Pictures, BytesBecomeMinusOneToOne) {
  const Image image{2, 1, {0, 51, 255, 128, 1, 254}};
  const Tensor x = from_image(image);
  ASSERT_EQ(x.shape(), (Shape{1, 3, 1, 2}));
  for (std::size_t c = 0; c < 3; ++c)
    for (std::size_t p = 0; p < 2; ++p)
      EXPECT_NEAR(x.data<float>()[2 * c + p], 2 * (image.rgb[3 * p + c] / 255.0) - 1, 1e-7);
  EXPECT_THROW(from_image({2, 2, {1, 2, 3}}), Error);
}

}  // namespace
}  // namespace sparvar
