#include "bits/codes.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>

#include "core/parallel.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

/// Throws unless `x` is f32 [B, d, h, w] with no empty axis and `to` is a grid.
void check_map(const Tensor& x, Grid to, const char* what) {
  const bool is_map = x.rank() == 4 && x.dtype() == DType::f32 && x.size() > 0;
  if (!is_map)
    throw Error(ErrorKind::usage, fmt::format("{} takes an F32 map [B, d, h, w], got {} {}", what, name_of(x.dtype()),
                                              to_string(x.shape())));
  if (to.h < 1 || to.w < 1)
    throw Error(ErrorKind::usage, fmt::format("{} to a grid of {}x{} tokens is impossible", what, to.h, to.w));
}

Tensor empty_map(const Tensor& like, Grid to) {
  return Tensor::empty(DType::f32, {like.dim(0), like.dim(1), to.h, to.w});
}

/// The two neighbours of an output position along one axis and the weight of the second.
struct Tap {
  std::int64_t low = 0;
  std::int64_t high = 0;
  float weight = 0;
};

// Half-pixel centres in f32, clamped at the low border: what the models were trained and released with.
std::vector<Tap> bilinear_taps(std::int64_t in, std::int64_t out) {
  std::vector<Tap> taps(static_cast<std::size_t>(out));
  const float scale = static_cast<float>(in) / static_cast<float>(out);
  for (std::int64_t i = 0; i < out; ++i) {
    const float centre = std::max(0.0F, scale * (static_cast<float>(i) + 0.5F) - 0.5F);
    const auto low = std::min(static_cast<std::int64_t>(centre), in - 1);
    taps[static_cast<std::size_t>(i)] = {low, std::min(low + 1, in - 1), centre - static_cast<float>(low)};
  }
  return taps;
}

struct Span {
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Cell i of an adaptive pooling covers every input that it touches; neighbouring cells may overlap.
std::vector<Span> area_spans(std::int64_t in, std::int64_t out) {
  std::vector<Span> spans(static_cast<std::size_t>(out));
  for (std::int64_t i = 0; i < out; ++i)
    spans[static_cast<std::size_t>(i)] = {i * in / out, ((i + 1) * in + out - 1) / out};
  return spans;
}

double sum_of(const float* plane, std::int64_t width, Span rows, Span columns) {
  double sum = 0;
  for (std::int64_t y = rows.begin; y < rows.end; ++y)
    for (std::int64_t x = columns.begin; x < columns.end; ++x) sum += plane[y * width + x];
  return sum;
}

Grid grid_of(const Tensor& map) { return {static_cast<int>(map.dim(2)), static_cast<int>(map.dim(3))}; }

/// Where bit `bit` of token (row, col) lies in a [d, h, w] map; pixel_shuffle(2) where patchify.
struct CodeLayout {
  Grid tokens;
  std::int64_t bits = 0;
  bool patchify = false;

  std::int64_t channels() const { return patchify ? bits / 4 : bits; }
  Grid map() const { return patchify ? Grid{2 * tokens.h, 2 * tokens.w} : tokens; }
  std::int64_t offset(std::int64_t row, std::int64_t col, std::int64_t bit) const {
    if (!patchify) return (bit * tokens.h + row) * tokens.w + col;
    const std::int64_t y = 2 * row + (bit % 4) / 2;
    const std::int64_t x = 2 * col + bit % 2;
    return ((bit / 4) * 2 * tokens.h + y) * 2 * tokens.w + x;
  }
};

/// Calls visit(element of [n, bits], element of [d, h, w]) for one picture.
template <typename Visit>
void for_each_bit(const CodeLayout& layout, Visit visit) {
  std::int64_t word = 0;
  for (std::int64_t row = 0; row < layout.tokens.h; ++row)
    for (std::int64_t col = 0; col < layout.tokens.w; ++col)
      for (std::int64_t bit = 0; bit < layout.bits; ++bit) visit(word++, layout.offset(row, col, bit));
}

void subtract(Tensor& a, const Tensor& b) {
  for (std::int64_t i = 0; i < a.size(); ++i) a.data<float>()[i] -= b.data<float>()[i];
}

void add(Tensor& a, const Tensor& b) {
  for (std::int64_t i = 0; i < a.size(); ++i) a.data<float>()[i] += b.data<float>()[i];
}

/// Map f32 [1, d, h, w] -> bits U8 [1, h, w, d]: 1 where positive.
Tensor signs(const Tensor& map) {
  const std::int64_t d = map.dim(1);
  const std::int64_t positions = map.dim(2) * map.dim(3);
  Tensor bits = Tensor::empty(DType::u8, {1, map.dim(2), map.dim(3), d});
  for (std::int64_t p = 0; p < positions; ++p)
    for (std::int64_t c = 0; c < d; ++c)
      bits.data<std::uint8_t>()[p * d + c] = map.data<float>()[c * positions + p] > 0 ? 1 : 0;
  return bits;
}

}  // namespace

Tensor resize_bilinear(const Tensor& x, Grid to) {
  check_map(x, to, "bilinear resize");
  if (grid_of(x) == to) return x;
  const std::int64_t height = x.dim(2);
  const std::int64_t width = x.dim(3);
  const std::vector<Tap> rows = bilinear_taps(height, to.h);
  const std::vector<Tap> columns = bilinear_taps(width, to.w);
  Tensor out = empty_map(x, to);
  parallel_for(x.dim(0) * x.dim(1), [&](std::int64_t plane) {
    const float* from = x.data<float>() + plane * height * width;
    float* target = out.data<float>() + plane * to.tokens();
    for (const Tap& row : rows) {
      const float* upper = from + row.low * width;
      const float* lower = from + row.high * width;
      for (const Tap& column : columns) {
        const float a = (1 - column.weight) * upper[column.low] + column.weight * upper[column.high];
        const float b = (1 - column.weight) * lower[column.low] + column.weight * lower[column.high];
        *target++ = (1 - row.weight) * a + row.weight * b;
      }
    }
  });
  return out;
}

Tensor resize_area(const Tensor& x, Grid to) {
  check_map(x, to, "area resize");
  if (grid_of(x) == to) return x;
  const std::int64_t height = x.dim(2);
  const std::int64_t width = x.dim(3);
  const std::vector<Span> rows = area_spans(height, to.h);
  const std::vector<Span> columns = area_spans(width, to.w);
  Tensor out = empty_map(x, to);
  parallel_for(x.dim(0) * x.dim(1), [&](std::int64_t plane) {
    const float* from = x.data<float>() + plane * height * width;
    float* target = out.data<float>() + plane * to.tokens();
    for (const Span& row : rows)
      for (const Span& column : columns) {
        const auto count = static_cast<double>((row.end - row.begin) * (column.end - column.begin));
        *target++ = static_cast<float>(sum_of(from, width, row, column) / count);
      }
  });
  return out;
}

Tensor bits_to_codes(const Tensor& bits, Grid tokens, bool patchify) {
  const bool fits = bits.rank() == 3 && bits.dtype() == DType::u8 && bits.dim(1) == tokens.tokens() &&
                    bits.dim(2) > 0 && (!patchify || bits.dim(2) % 4 == 0);
  if (!fits)
    throw Error(ErrorKind::usage, fmt::format("bits of a {}x{} grid are U8 [B, {}, bits{}], got {} {}", tokens.h,
                                              tokens.w, tokens.tokens(), patchify ? " divisible by 4" : "",
                                              name_of(bits.dtype()), to_string(bits.shape())));
  const CodeLayout layout{tokens, bits.dim(2), patchify};
  const std::int64_t per_picture = bits.dim(1) * bits.dim(2);
  const auto unit = static_cast<float>(1.0 / std::sqrt(static_cast<double>(layout.channels())));
  Tensor codes = Tensor::empty(DType::f32, {bits.dim(0), layout.channels(), layout.map().h, layout.map().w});
  parallel_for(bits.dim(0), [&](std::int64_t b) {
    const std::uint8_t* from = bits.data<std::uint8_t>() + b * per_picture;
    float* to = codes.data<float>() + b * per_picture;
    for_each_bit(layout, [&](std::int64_t word, std::int64_t code) { to[code] = from[word] != 0 ? unit : -unit; });
  });
  return codes;
}

Tensor codes_to_words(const Tensor& summed, Grid tokens, bool patchify) {
  const std::int64_t channels = summed.rank() == 4 ? summed.dim(1) : 0;
  const CodeLayout layout{tokens, patchify ? 4 * channels : channels, patchify};
  const Tensor resized = resize_bilinear(summed, layout.map());
  const std::int64_t per_picture = layout.bits * tokens.tokens();
  Tensor words = Tensor::empty(DType::f32, {summed.dim(0), tokens.tokens(), layout.bits});
  parallel_for(summed.dim(0), [&](std::int64_t b) {
    const float* from = resized.data<float>() + b * per_picture;
    float* to = words.data<float>() + b * per_picture;
    for_each_bit(layout, [&](std::int64_t word, std::int64_t code) { to[word] = from[code]; });
  });
  return words;
}

Quantized quantize(const Tensor& features, const ScaleSchedule& schedule) {
  if (schedule.empty()) throw Error(ErrorKind::usage, "quantising needs a schedule of at least one scale");
  check_map(features, schedule.front(), "quantising");
  if (features.dim(0) != 1)
    throw Error(ErrorKind::usage,
                fmt::format("pictures are quantised one at a time, got {}", to_string(features.shape())));
  const Grid full = grid_of(features);
  Quantized out;
  out.sum = Tensor::zeros(DType::f32, features.shape());
  Tensor residual = features.to(DType::f32);
  for (const Grid& grid : schedule) {
    out.var_input.push_back(resize_area(out.sum, grid).to(DType::f32));  // a copy: `sum` changes below
    out.residual.push_back(resize_area(residual, grid).to(DType::f32));
    out.bits.push_back(signs(out.residual.back()));
    const Tensor bits = out.bits.back().reshaped({1, grid.tokens(), features.dim(1)});
    const Tensor code = resize_bilinear(bits_to_codes(bits, grid, false), full);
    subtract(residual, code);
    add(out.sum, code);
  }
  return out;
}

}  // namespace sparvar
