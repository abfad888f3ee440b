#include "models/token_pruning.h"

#include <fmt/format.h>

#include <algorithm>
#include <cstring>

#include "attention/cs4a.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

void check(const Tensor& x) {
  if (x.place() != Place::host || x.dtype() != DType::f32 || x.rank() != 3)
    throw Error(ErrorKind::usage, fmt::format("tokens are pruned on the CPU, in f32 [B, n, C]; found {} {}",
                                              name_of(x.dtype()), to_string(x.shape())));
}

}  // namespace

std::vector<std::int32_t> farthest_rows(const Tensor& x, int count) {
  check(x);
  const std::int64_t rows = x.dim(1), channels = x.dim(2);
  const auto* values = x.data<float>();
  std::vector<double> mean(static_cast<std::size_t>(channels));
  for (std::int64_t i = 0; i < rows; ++i)
    for (std::int64_t c = 0; c < channels; ++c)
      mean[static_cast<std::size_t>(c)] += values[i * channels + c] / static_cast<double>(rows);
  std::vector<float> distances(static_cast<std::size_t>(rows));
  for (std::int64_t i = 0; i < rows; ++i) {
    double sum = 0;
    for (std::int64_t c = 0; c < channels; ++c) {
      const double difference = values[i * channels + c] - mean[static_cast<std::size_t>(c)];
      sum += difference * difference;
    }
    distances[static_cast<std::size_t>(i)] = static_cast<float>(sum);
  }
  std::vector<std::int32_t> out(static_cast<std::size_t>(count));
  select_top(distances.data(), static_cast<int>(rows), count, out.data());
  return out;
}

Tensor rows_taken(const Tensor& x, const std::vector<std::int32_t>& rows) {
  check(x);
  const std::int64_t count = static_cast<std::int64_t>(rows.size()), channels = x.dim(2);
  Tensor out = Tensor::empty(DType::f32, {x.dim(0), count, channels});
  for (std::int64_t b = 0; b < x.dim(0); ++b)
    for (std::int64_t i = 0; i < count; ++i)
      std::copy_n(x.data<float>() + (b * x.dim(1) + rows[static_cast<std::size_t>(i)]) * channels, channels,
                  out.data<float>() + (b * count + i) * channels);
  return out;
}

void put_rows(Tensor& x, const std::vector<std::int32_t>& rows, const Tensor& from) {
  check(x);
  check(from);
  const std::int64_t count = static_cast<std::int64_t>(rows.size()), channels = x.dim(2);
  if (from.shape() != Shape{x.dim(0), count, channels})
    throw Error(ErrorKind::usage,
                fmt::format("{} are not {} rows of {}", to_string(from.shape()), count, to_string(x.shape())));
  for (std::int64_t b = 0; b < x.dim(0); ++b)
    for (std::int64_t i = 0; i < count; ++i)
      std::copy_n(from.data<float>() + (b * count + i) * channels, channels,
                  x.data<float>() + (b * x.dim(1) + rows[static_cast<std::size_t>(i)]) * channels);
}

}  // namespace sparvar
