// Norms, gates, products and attention over texts against double precision.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "backend/backend.h"
#include "backend/device_under_test.h"
#include "sparvar/error.h"
#include "support.h"

namespace sparvar {
namespace {

using testing::random_tensor;

class Operations : public ::testing::TestWithParam<DType> {
 protected:
  std::unique_ptr<Backend> backend = testing::make_backend(GetParam());
  bool bf16() const { return GetParam() == DType::bf16; }
  unsigned seed = std::random_device{}();
};

TEST_P(Operations, LayerNorms) {
  for (const std::int64_t width : {1L, 7L, 64L, 255L, 256L, 3584L}) {
    const Tensor x = random_tensor({2, 5, width}, seed, 3), scale = random_tensor({2, width}, seed + 1),
                 shift = random_tensor({2, width}, seed + 2);
    const Tensor modulated = backend->layer_norm(x, {scale, shift, 1.0F, 1e-6F, GetParam()}).to(DType::f32);
    const Tensor weighted =
        backend->layer_norm(x, {scale.rows(0, 1), shift.rows(1, 2), 0.0F, 1e-6F, GetParam()}).to(DType::f32);
    const Tensor rms = backend->rms_norm(x.reshaped({10, width}), scale.rows(1, 2), 1e-6F, DType::f32);
    double worst = 0, worst_rms = 0;
    for (std::int64_t r = 0; r < 10; ++r) {
      const float* row = x.data<float>() + r * width;
      double mean = 0, variance = 0, square = 0;
      for (std::int64_t i = 0; i < width; ++i) mean += row[i] / static_cast<double>(width);
      for (std::int64_t i = 0; i < width; ++i)
        variance += (row[i] - mean) * (row[i] - mean) / static_cast<double>(width);
      for (std::int64_t i = 0; i < width; ++i)
        square += static_cast<double>(row[i]) * row[i] / static_cast<double>(width);
      for (std::int64_t i = 0; i < width; ++i) {
        const double y = (row[i] - mean) / std::sqrt(variance + 1e-6);
        const std::int64_t b = r / 5 * width + i;
        const double a = y * (1 + scale.data<float>()[b]) + shift.data<float>()[b];
        const double w = y * scale.data<float>()[i] + shift.data<float>()[width + i];
        const double size = 1 + std::abs(a) + std::abs(w);
        worst = std::max({worst, std::abs(modulated.data<float>()[r * width + i] - a) / size,
                          std::abs(weighted.data<float>()[r * width + i] - w) / size});
        worst_rms = std::max(worst_rms, std::abs(rms.data<float>()[r * width + i] -
                                                 row[i] / std::sqrt(square + 1e-6) * scale.data<float>()[width + i]));
      }
    }
    EXPECT_LT(worst, bf16() ? 5e-3 : 3e-6) << width;
    EXPECT_LT(worst_rms, 1e-5) << width;
  }
}

TEST_P(Operations, AddGated) {
  for (const std::int64_t width : {3L, 64L, 100L}) {
    const Tensor start = random_tensor({3, 4, width}, seed), gate = random_tensor({3, width}, seed + 1);
    const Tensor y = random_tensor({3, 4, width}, seed + 2).to(GetParam());
    for (const bool gated : {false, true}) {
      Tensor x = start.to(DType::f32);
      backend->add_gated(x, y, gated ? gate : Tensor());
      const Tensor rounded = y.to(DType::f32);
      double worst = 0;
      for (std::int64_t i = 0; i < x.size(); ++i) {
        const double g = gated ? gate.data<float>()[i / (4 * width) * width + i % width] : 1.0;
        worst = std::max(worst, std::abs(x.data<float>()[i] - (start.data<float>()[i] + g * rounded.data<float>()[i])));
      }
      EXPECT_LT(worst, 2e-6) << width;
    }
  }
}

TEST_P(Operations, FusedNormOfManyRows) {  // of several batch entries, each with modulations of its own
  for (const auto& [n, width] : {std::array{401L, 3584L}, std::array{211L, 2052L}, std::array{4001L, 132L}}) {
    const Tensor start = random_tensor({3, n, width}, ++seed), y = random_tensor({3, n, width}, ++seed).to(GetParam()),
                 gate = random_tensor({3, width}, ++seed), scale = random_tensor({3, width}, ++seed),
                 shift = random_tensor({3, width}, ++seed);
    Tensor x = start.to(DType::f32);
    const Tensor found = backend->add_gated_norm(x, y, gate, {scale, shift, 1.0F, 1e-6F, DType::f32});
    const Tensor rounded = y.to(DType::f32);
    double worst_sum = 0, worst = 0;
    std::vector<double> sum(static_cast<std::size_t>(width));
    for (std::int64_t r = 0; r < 3 * n; ++r) {
      const std::int64_t of_entry = r / n * width;
      double mean = 0, variance = 0;
      for (std::int64_t i = 0; i < width; ++i) {
        const double before = start.data<float>()[r * width + i],
                     more =
                         static_cast<double>(gate.data<float>()[of_entry + i]) * rounded.data<float>()[r * width + i];
        sum[i] = before + more;
        mean += sum[i] / static_cast<double>(width);
        worst_sum = std::max(
            worst_sum, std::abs(x.data<float>()[r * width + i] - sum[i]) / (1 + std::abs(before) + std::abs(more)));
      }
      for (const double value : sum) variance += (value - mean) * (value - mean) / static_cast<double>(width);
      for (std::int64_t i = 0; i < width; ++i) {
        const double a = (sum[i] - mean) / std::sqrt(variance + 1e-6) * (1 + scale.data<float>()[of_entry + i]) +
                         shift.data<float>()[of_entry + i];
        worst = std::max(worst, std::abs(found.data<float>()[r * width + i] - a) / (1 + std::abs(a)));
      }
    }
    EXPECT_LT(worst_sum, 2e-7) << width;
    EXPECT_LT(worst, 5e-6) << width;
  }
}

TEST_P(Operations, LinearWithActivations) {
  // The last ones are for products of few rows: ragged tiles of channels, depths and rows, one block and clusters, and
  // each of the tiles of more than 64 rows, which are taken where blocks fill a GPU.
  for (const auto& [rows, in, out] :
       {std::array{1L, 16L, 33L}, std::array{130L, 64L, 48L}, std::array{7L, 255L, 10L}, std::array{1L, 64L, 8L},
        std::array{2L, 1032L, 136L}, std::array{31L, 200L, 264L}, std::array{33L, 584L, 128L},
        std::array{72L, 72L, 200L}, std::array{128L, 264L, 144L}, std::array{129L, 520L, 136L},
        std::array{200L, 72L, 256L}, std::array{287L, 136L, 392L}, std::array{8L, 128L, 20000L},
        std::array{71L, 264L, 2008L}, std::array{90L, 264L, 3304L}, std::array{127L, 136L, 7144L},
        std::array{144L, 72L, 14408L}})
    for (const Activation activation : {Activation::none, Activation::gelu_tanh, Activation::silu}) {
      const Tensor x = random_tensor({rows, in}, seed).to(GetParam()),
                   w = random_tensor({out, in}, seed + 1, 0.2F).to(GetParam());
      const Tensor bias = random_tensor({out}, seed + 2);
      const Tensor found = backend->linear(x, *backend->prepare_linear(w, bias), activation, DType::f32);
      const Tensor xf = x.to(DType::f32), wf = w.to(DType::f32);
      double worst = 0;
      for (std::int64_t r = 0; r < rows; ++r)
        for (std::int64_t o = 0; o < out; ++o) {
          double y = bias.data<float>()[o];
          for (std::int64_t i = 0; i < in; ++i)
            y += static_cast<double>(xf.data<float>()[r * in + i]) * wf.data<float>()[o * in + i];
          if (activation == Activation::gelu_tanh)
            y = 0.5 * y * (1 + std::tanh(std::sqrt(2 / M_PI) * (y + 0.044715 * y * y * y)));
          if (activation == Activation::silu) y = y / (1 + std::exp(-y));
          worst = std::max(worst, std::abs(found.data<float>()[r * out + o] - y));
        }
      EXPECT_LT(worst, 5e-5) << rows << "x" << in << "x" << out;
    }
  const LinearPtr layer = backend->prepare_linear(random_tensor({4, 8}, seed), {});
  EXPECT_THROW(backend->linear(random_tensor({2, 9}, seed), *layer, Activation::none, DType::f32), Error);
}

TEST_P(Operations, ARowOfAProductIsTheSameInABatch) {
  if (testing::on_gpu()) GTEST_SKIP() << "a GPU's batches are compared as whole pictures";
  for (const auto& [in, out] : {std::array{16L, 256L}, std::array{256L, 768L}, std::array{1024L, 256L}}) {
    const Tensor x = random_tensor({4096, in}, seed).to(GetParam());
    const LinearPtr layer =
        backend->prepare_linear(random_tensor({out, in}, seed + 1, 0.2F), random_tensor({out}, seed));
    for (const std::int64_t rows : {1L, 2L, 8L, 20L, 31L, 32L, 50L, 72L, 99L, 128L, 1024L}) {
      const Tensor alone = backend->linear(x.rows(0, rows), *layer, Activation::none, DType::f32);
      for (const std::int64_t batch : {2L, 3L, 4L}) {
        const Tensor together = backend->linear(x.rows(0, batch * rows), *layer, Activation::none, DType::f32);
        EXPECT_EQ(std::memcmp(alone.raw(), together.raw(), alone.bytes()), 0)
            << rows << " rows of " << batch * rows << ", " << in << " to " << out;
      }
    }
  }
}

TEST_P(Operations, CrossAttentionOverTextsOfDifferentLength) {
  for (const int longest : {64, 65}) {  // of the third text: one stage of keys on a GPU, and two; the second is empty
    const std::vector<int> offsets = {0, 5, 5, 5 + longest};
    Tensor lengths = Tensor::empty(DType::i32, {4});
    std::copy(offsets.begin(), offsets.end(), lengths.data<std::int32_t>());
    for (const auto& [n, heads, dim] : {std::array{1L, 2L, 64L}, std::array{50L, 4L, 16L}, std::array{33L, 3L, 20L}}) {
      const Tensor q = random_tensor({3, n, heads, dim}, seed).to(GetParam()),
                   kv = random_tensor({70, 2, heads, dim}, seed + 1).to(GetParam());
      const Tensor found = backend->cross_attention(q, kv, lengths, longest, 0.3F, false).to(DType::f32);
      const Tensor qf = q.to(DType::f32), kvf = kv.to(DType::f32);
      double worst = 0;
      for (std::int64_t r = 0; r < 3 * n; ++r)
        for (std::int64_t h = 0; h < heads; ++h) {
          const int begin = offsets[r / n], end = offsets[r / n + 1];
          const auto key = [&, heads = heads, dim = dim](int t, int part, std::int64_t d) {
            return kvf.data<float>()[((t * 2 + part) * heads + h) * dim + d];
          };
          std::vector<double> weights;
          double total = 0;
          for (int t = begin; t < end; ++t) {
            double dot = 0;
            for (std::int64_t d = 0; d < dim; ++d)
              dot += static_cast<double>(qf.data<float>()[(r * heads + h) * dim + d]) * key(t, 0, d);
            weights.push_back(std::exp(dot * 0.3));
            total += weights.back();
          }
          for (std::int64_t d = 0; d < dim; ++d) {
            double want = 0;
            for (int t = begin; t < end; ++t) want += weights[t - begin] / total * key(t, 1, d);
            worst = std::max(worst, std::abs(found.data<float>()[(r * heads + h) * dim + d] - want));
          }
        }
      EXPECT_LT(worst, bf16() ? 2e-2 : 1e-5);
    }
  }
}

/// Tokens of x [B, n, H, D] moved to their places.
Tensor moved(const Tensor& x, const TokenMap& map) {
  Tensor out = x.to(x.dtype());
  const std::int64_t n = map.grid.tokens();
  const std::size_t bytes = x.bytes() / static_cast<std::size_t>(x.dim(0) * n);
  for (std::int64_t b = 0; b < x.dim(0); ++b)
    for (int token = 0; token < n; ++token) {
      const std::int64_t place = map.place(token / map.grid.w, token % map.grid.w);
      std::memcpy(out.data<std::byte>() + (b * n + place) * static_cast<std::int64_t>(bytes),
                  x.data<std::byte>() + (b * n + token) * static_cast<std::int64_t>(bytes), bytes);
    }
  return out;
}

TEST_P(Operations, ResizedResidualIsAdded) {
  // Of maps that lie in tiles: the same numbers at their places.
  const auto expect_resized_by_place = [&](const Tensor& cache, const TokenMap& from, const Tensor& start,
                                           const TokenMap& to, const Tensor& by_rows) {
    Tensor found = moved(start, to);
    backend->add_resized(found, moved(cache, from), from, to);
    const Tensor wanted = moved(by_rows, to);
    EXPECT_EQ(std::memcmp(found.raw(), wanted.raw(), found.bytes()), 0);
  };
  for (const auto& [from, to] :
       {std::pair{Grid{8, 8}, Grid{12, 12}}, std::pair{Grid{5, 3}, Grid{9, 14}}, std::pair{Grid{1, 1}, Grid{4, 2}}}) {
    const Tensor cache = random_tensor({2, from.tokens(), 2, 6}, seed),
                 start = random_tensor({2, to.tokens(), 2, 6}, seed + 1).to(GetParam());
    Tensor found = start.to(GetParam());
    backend->add_resized(found, cache, from, to);
    const Tensor before = start.to(DType::f32), after = found.to(DType::f32);
    double worst = 0;
    for (int b = 0; b < 2; ++b)
      for (int y = 0; y < to.h; ++y)
        for (int x = 0; x < to.w; ++x) {
          const double sy = std::max((y + 0.5) * from.h / to.h - 0.5, 0.0),
                       sx = std::max((x + 0.5) * from.w / to.w - 0.5, 0.0);
          const int y0 = static_cast<int>(sy), x0 = static_cast<int>(sx);
          const int y1 = std::min(y0 + 1, from.h - 1), x1 = std::min(x0 + 1, from.w - 1);
          for (int c = 0; c < 12; ++c) {
            const auto at = [&, from = from](int row, int column) {
              return cache.data<float>()[((b * from.tokens()) + row * from.w + column) * 12 + c];
            };
            const double value = (1 - (sy - y0)) * ((1 - (sx - x0)) * at(y0, x0) + (sx - x0) * at(y0, x1)) +
                                 (sy - y0) * ((1 - (sx - x0)) * at(y1, x0) + (sx - x0) * at(y1, x1));
            const std::int64_t i = ((b * to.tokens()) + y * to.w + x) * 12 + c;
            worst = std::max(worst, std::abs(after.data<float>()[i] - before.data<float>()[i] - value));
          }
        }
    // Places on the map are f32, so their fractions are known to some 5e-7, and are multiplied by differences up to 8.
    EXPECT_LT(worst, bf16() ? 3e-2 : 1e-5);
    expect_resized_by_place(cache, {from, {3, 2}}, start, {to, {2, 3}}, found);
  }
}

TEST_P(Operations, SplitQkvNormalisesScalesAndRotates) {
  const std::int64_t n = 9, heads = 3, dim = 20;
  const Tensor qkv = random_tensor({2, n, 3, heads, dim}, seed), rope = random_tensor({n, dim / 2, 2}, seed + 1),
               head_scale = random_tensor({heads}, seed + 2);
  for (const bool norm : {true, false}) {
    Tensor q = Tensor::zeros(GetParam(), {2, heads, n, dim}), k = Tensor::zeros(GetParam(), {2, heads, 15, dim}),
           v = Tensor::zeros(GetParam(), {2, heads, 15, dim});
    backend->split_qkv(
        qkv, {.heads = 3, .l2_norm = norm, .head_scale = norm ? head_scale : Tensor(), .rope = rope, .offset = 4}, q, k,
        v);
    const Tensor qf = q.to(DType::f32), kf = k.to(DType::f32), vf = v.to(DType::f32);
    double worst = 0;
    for (std::int64_t b = 0; b < 2; ++b)
      for (std::int64_t i = 0; i < n; ++i)
        for (std::int64_t h = 0; h < heads; ++h)
          for (int part = 0; part < 3; ++part) {
            const float* x = qkv.data<float>() + (((b * n + i) * 3 + part) * heads + h) * dim;
            double length = 0;
            for (std::int64_t d = 0; d < dim; ++d) length += static_cast<double>(x[d]) * x[d];
            double factor = norm && part < 2 ? 1 / std::sqrt(length) : 1;
            if (norm && part == 0) factor *= head_scale.data<float>()[h];
            const float* found = part == 0 ? qf.data<float>() + ((b * heads + h) * n + i) * dim
                                           : (part == 1 ? kf : vf).data<float>() + ((b * heads + h) * 15 + 4 + i) * dim;
            for (std::int64_t p = 0; p < dim / 2; ++p) {
              const double c = part < 2 ? rope.data<float>()[(i * dim / 2 + p) * 2] : 1,
                           s = part < 2 ? rope.data<float>()[(i * dim / 2 + p) * 2 + 1] : 0;
              const double a = x[2 * p] * factor, e = x[2 * p + 1] * factor;
              worst = std::max(
                  {worst, std::abs(found[2 * p] - (c * a - s * e)), std::abs(found[2 * p + 1] - (s * a + c * e))});
            }
          }
    EXPECT_LT(worst, bf16() ? 5e-2 : 2e-6);
  }
}

INSTANTIATE_TEST_SUITE_P(Types, Operations, ::testing::Values(DType::f32, DType::bf16),
                         [](const auto& one) { return std::string(name_of(one.param)); });

}  // namespace
}  // namespace sparvar
