// Picture -> bits -> picture against upstream's tensors.
#include "visual/reconstruct.h"

#include <gtest/gtest.h>

#include "fixture.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using testing::Fixture;

struct Tokenizer {
  Fixture fixture{"bsq-vae"};
  TensorFile io = fixture.open("io.safetensors");
  std::unique_ptr<Backend> backend = make_cpu_backend({DType::f32, 0});
  BsqVae vae{fixture.vae(), fixture.open("weights.safetensors"), *backend};

  Image picture() const {
    const Tensor& rgb = io.get("image_u8_rgb_hwc");
    const auto* bytes = rgb.data<std::uint8_t>();
    return {static_cast<int>(rgb.dim(1)), static_cast<int>(rgb.dim(0)), {bytes, bytes + rgb.size()}};
  }
};

TEST(Reconstruct, MakesUpstreamsBitsAndPicture) {
  Tokenizer t;
  const Reconstruction made = reconstruct(t.vae, *t.backend, t.picture(), t.fixture.schedule(), 0);
  std::int64_t wrong = 0;
  for (int k = 0; k < 7; ++k) {
    const Tensor& expected = t.io.get("bits.s" + std::to_string(k));
    const Tensor& bits = made.quantized.bits[static_cast<std::size_t>(k)];
    ASSERT_EQ(bits.shape(), expected.shape());
    for (std::int64_t i = 0; i < bits.size(); ++i)
      wrong += bits.data<std::uint8_t>()[i] != expected.data<std::uint8_t>()[i] ? 1 : 0;
  }
  EXPECT_LE(wrong, 3);  // of 10640: residuals as small as the features' own error may fall to either side
  const Tensor& expected = t.io.get("recon_rgb_sub2");
  ASSERT_EQ(made.picture.width, 2 * expected.dim(3));
  double difference = 0;
  for (std::int64_t c = 0; c < 3; ++c)
    for (std::int64_t y = 0; y < expected.dim(2); ++y)
      for (std::int64_t x = 0; x < expected.dim(3); ++x) {
        const double byte = made.picture.rgb[static_cast<std::size_t>((2 * y * made.picture.width + 2 * x) * 3 + c)];
        const double unit = expected.data<float>()[(c * expected.dim(2) + y) * expected.dim(3) + x];
        difference += std::abs(byte - std::min(255.0, 255 * unit));
      }
  EXPECT_LT(difference / static_cast<double>(expected.size()), 1.0);  // bytes are rounded down
}

TEST(Reconstruct, LeavesScalesOut) {
  Tokenizer t;
  const ScaleSchedule grids = t.fixture.schedule();
  const Reconstruction whole = reconstruct(t.vae, *t.backend, t.picture(), grids, 0);
  const Reconstruction part = reconstruct(t.vae, *t.backend, t.picture(), grids, 3);
  EXPECT_EQ(part.quantized.bits.size(), 7U);
  // What is left is what a tokenizer of the first four scales makes.
  const Tensor fewer = quantize(t.vae.encode(from_image(t.picture())), {grids.begin(), grids.begin() + 4}).sum;
  const Tensor decoded = t.backend->download(t.vae.draw(t.backend->upload(fewer)));
  EXPECT_EQ(part.picture.rgb, to_image(decoded, 0).rgb);
  EXPECT_NE(whole.picture.rgb, part.picture.rgb);
  EXPECT_THROW(reconstruct(t.vae, *t.backend, t.picture(), grids, 7), Error);
  EXPECT_THROW(reconstruct(t.vae, *t.backend, t.picture(), grids, -1), Error);
}

TEST(Reconstruct, RefusesPicturesOfOtherSizes) {
  Tokenizer t;
  const Image square{256, 256, std::vector<std::uint8_t>(3 * 256 * 256, 100)};
  EXPECT_THROW(reconstruct(t.vae, *t.backend, square, t.fixture.schedule(), 0), Error);
}

TEST(VaeGrids, AreTwiceTheTokensWithPatchify) {
  EXPECT_EQ(vae_grids({{1, 1}, {3, 5}}, true), (ScaleSchedule{{2, 2}, {6, 10}}));
  EXPECT_EQ(vae_grids({{3, 5}}, false), (ScaleSchedule{{3, 5}}));
}

}  // namespace
}  // namespace sparvar
