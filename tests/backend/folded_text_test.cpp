// Cross attention with its projections taken into the text, against double precision, on a GPU
// (SPARVAR_TEST_DEVICE=cuda).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::make_gpu;
using testing::random_tensor;
using testing::rounded;

struct Layer {
  std::int64_t heads, dim, width = heads * dim;
  Tensor query = rounded(random_tensor({width, width}, 1, 1.0F / std::sqrt(static_cast<float>(width))));
  Tensor query_bias = rounded(random_tensor({width}, 2, 0.5F));
  Tensor out = rounded(random_tensor({width, width}, 3, 1.0F / std::sqrt(static_cast<float>(width))));
  Tensor out_bias = rounded(random_tensor({width}, 4, 0.5F));
};

/// x W^T + b of one row.
std::vector<double> product(const std::vector<double>& x, const Tensor& w, const Tensor& bias) {
  std::vector<double> y(static_cast<std::size_t>(w.dim(0)));
  for (std::int64_t o = 0; o < w.dim(0); ++o) {
    double sum = bias.data<float>()[o];
    for (std::int64_t i = 0; i < w.dim(1); ++i) sum += w.data<float>()[o * w.dim(1) + i] * x[i];
    y[o] = sum;
  }
  return y;
}

/// softmax(scale q k) v of one row, kv f32 [tokens, 2, heads, dim].
std::vector<double> attended(const std::vector<double>& q, const Tensor& kv, int begin, int end, double scale) {
  const std::int64_t heads = kv.dim(2), dim = kv.dim(3), width = heads * dim;
  std::vector<double> out(q.size(), 0.0);
  for (std::int64_t h = 0; h < heads; ++h) {
    std::vector<double> logits;
    for (int t = begin; t < end; ++t) {
      double sum = 0;
      for (std::int64_t d = 0; d < dim; ++d) sum += q[h * dim + d] * kv.data<float>()[t * 2 * width + h * dim + d];
      logits.push_back(scale * sum);
    }
    if (logits.empty()) continue;
    const double largest = *std::max_element(logits.begin(), logits.end());
    double total = 0;
    for (double& logit : logits) total += logit = std::exp(logit - largest);
    for (int t = begin; t < end; ++t)
      for (std::int64_t d = 0; d < dim; ++d)
        out[h * dim + d] += logits[t - begin] / total * kv.data<float>()[t * 2 * width + width + h * dim + d];
  }
  return out;
}

/// The relative error of all rows together.
double relative_error(const Layer& layer, const Tensor& x, const Tensor& kv, const std::vector<int>& ends, double scale,
                      const Tensor& found) {
  double error = 0, size = 0;
  for (std::int64_t row = 0; row < x.dim(0) * x.dim(1); ++row) {
    const float* from = x.data<float>() + row * layer.width;
    const auto text = static_cast<std::size_t>(row / x.dim(1));
    const std::vector<double> q = product({from, from + layer.width}, layer.query, layer.query_bias);
    const std::vector<double> y =
        product(attended(q, kv, ends[text], ends[text + 1], scale), layer.out, layer.out_bias);
    for (std::int64_t c = 0; c < layer.width; ++c) {
      const double off = found.data<float>()[row * layer.width + c] - y[c];
      error += std::isnan(off) ? INFINITY : off * off;
      size += y[c] * y[c];
    }
  }
  return std::sqrt(error / size);
}

/// Keys, weights of keys, values and results are each rounded to 8 bits: four times 2^-9 at most, less together.
constexpr double kBound = 8e-3;

void compare(std::int64_t heads, std::int64_t dim, const std::vector<int>& ends, std::int64_t longest, std::int64_t n,
             DType out_type) {
  SCOPED_TRACE(::testing::Message() << heads << " heads of " << dim << ", " << n << " rows, texts of up to "
                                    << longest);
  const auto device = make_gpu();
  const Layer layer{heads, dim};
  const auto texts = static_cast<std::int64_t>(ends.size()) - 1;
  const Tensor x = rounded(random_tensor({texts, n, layer.width}, 5));
  const Tensor kv = rounded(random_tensor({ends.back(), 2, heads, dim}, 6));
  Tensor offsets = Tensor::empty(DType::i32, {texts + 1});
  std::copy(ends.begin(), ends.end(), offsets.data<std::int32_t>());
  const float scale = 1.0F / std::sqrt(static_cast<float>(dim));
  const LinearPtr query = device->prepare_linear(layer.query, layer.query_bias, LinearKind::narrow);
  const LinearPtr out = device->prepare_linear(layer.out, layer.out_bias, LinearKind::narrow);
  const Tensor there = device->upload(offsets);
  const FoldedText folded = device->fold_text(device->upload(kv.to(DType::bf16)), there, longest, *query, *out);
  const Tensor found = device->download(device->folded_cross_attention(device->upload(x.to(DType::bf16)), folded, there,
                                                                       static_cast<int>(heads), *out, scale, out_type));
  EXPECT_EQ(found.dtype(), out_type);
  EXPECT_LT(relative_error(layer, x, kv, ends, scale, found.to(DType::f32)), kBound);
}

TEST(FoldedText, IsCrossAttentionWithItsProjections) {
  if (!testing::on_gpu()) GTEST_SKIP() << "texts are folded on a GPU";
  for (const std::int64_t dim : {64, 80, 96, 112, 128}) compare(3, dim, {0, 7, 18}, 11, 37, DType::bf16);
  compare(2, 64, {0, 40}, 40, 129, DType::f32);
  compare(4, 128, {0, 1, 34, 34, 98}, 64, 5, DType::bf16);  // one of one token, one of none
  compare(1, 96, {0, 100}, 121, 33, DType::f32);
}

TEST(FoldedText, WhereItIsWorthIt) {
  if (!testing::on_gpu()) GTEST_SKIP() << "texts are folded on a GPU";
  const auto device = make_gpu();
  const auto square = [](Backend& of, std::int64_t width) {
    return of.prepare_linear(random_tensor({width, width}, 1), {}, LinearKind::narrow);
  };
  const LinearPtr wide = square(*device, 2048), narrow = square(*device, 128);
  EXPECT_GT(device->folded_rows(*wide, *wide, 16, 2, 40), 0);
  EXPECT_GT(device->folded_rows(*wide, *wide, 16, 2, 64), 0);
  EXPECT_EQ(device->folded_rows(*wide, *wide, 16, 2, 65), 0);  // more keys than W_q has rows
  EXPECT_EQ(device->folded_rows(*wide, *wide, 16, 4, 40), 0);
  EXPECT_EQ(device->folded_rows(*wide, *wide, 16, 2, 0), 0);  // how long is not known
  EXPECT_EQ(device->folded_rows(*narrow, *narrow, 1, 2, 40), 0);
  const auto f32 = make_gpu({.compute = DType::f32});
  const LinearPtr precise = square(*f32, 2048);
  EXPECT_EQ(f32->folded_rows(*precise, *precise, 16, 2, 40), 0);
}

}  // namespace
}  // namespace sparvar
