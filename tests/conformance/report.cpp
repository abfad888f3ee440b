#include "conformance/report.h"

#include <fmt/format.h>

#include <cmath>
#include <fstream>

#include "pipeline/device.h"
#include "sparvar/error.h"

namespace sparvar::conformance {

double max_difference(const Tensor& a, const Tensor& b) {
  if (a.size() != b.size()) return INFINITY;
  const Tensor x = a.to(DType::f32);
  const Tensor y = b.to(DType::f32);
  double worst = 0;
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const double difference = std::abs(static_cast<double>(x.data<float>()[i]) - y.data<float>()[i]);
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
  }
  return worst;
}

std::int64_t differing_bytes(const Tensor& a, const Tensor& b) {
  if (a.bytes() != b.bytes()) return static_cast<std::int64_t>(std::max(a.bytes(), b.bytes()));
  std::int64_t count = 0;
  for (std::size_t i = 0; i < a.bytes(); ++i) count += a.data<std::uint8_t>()[i] != b.data<std::uint8_t>()[i] ? 1 : 0;
  return count;
}

std::int64_t integer(const Tensor& x, std::int64_t i) {
  switch (x.dtype()) {
    case DType::i64:
      return x.data<std::int64_t>()[i];
    case DType::i16:
      return x.data<std::int16_t>()[i];
    case DType::u8:
      return x.data<std::uint8_t>()[i];
    default:
      return x.data<std::int32_t>()[i];
  }
}

nlohmann::json read_json(const std::string& path) {
  std::ifstream file(path);
  if (!file) throw Error(ErrorKind::input, fmt::format("{}: cannot be read", path));
  return nlohmann::json::parse(file);
}

ScaleSchedule read_schedule(const nlohmann::json& scales) {
  ScaleSchedule schedule;
  for (const auto& scale : scales) {
    if (scale.is_number())
      schedule.push_back({scale.get<int>(), scale.get<int>()});
    else
      schedule.push_back({scale.at(scale.size() - 2).get<int>(), scale.at(scale.size() - 1).get<int>()});
  }
  return schedule;
}

void Report::line(const std::string& name, const std::string& text, bool good) {
  ++checks_;
  failures_ += good ? 0 : 1;
  fmt::print("{:6} {:24} {:28} {}\n", good ? "ok" : "FAILED", folder_, name, text);
}

void Report::note(const std::string& name, const std::string& text) const {
  fmt::print("{:6} {:24} {:28} {}\n", "", folder_, name, text);
}

Settings Settings::reference() const {
  Settings other = *this;
  other.device = against;
  other.bf16 = against_bf16;
  other.order = {};
  other.own_choices = !shares_choices();
  return other;
}

std::unique_ptr<Backend> Settings::backend(DType type) const {
  PipelineOptions options;
  options.precision = type == DType::bf16 ? Precision::bf16 : Precision::f32;
  options.device = device;
  if (fp8 && type == DType::bf16) options.weights = WeightFormat::fp8;
  return std::move(open_device(options).backend);
}

void Report::compare(const std::string& name, const Tensor& found, const Tensor& expected, double tolerance) {
  if (found.size() != expected.size())
    return line(name, fmt::format("expected shape {}, found {}", to_string(expected.shape()), to_string(found.shape())),
                false);
  value(name, max_difference(found, expected), tolerance);
}

void Report::within(const std::string& name, const Tensor& found, const Tensor& expected,
                    const std::vector<float>& bounds) {
  if (found.size() != expected.size() || static_cast<std::int64_t>(bounds.size()) != expected.size())
    return line(name, fmt::format("expected shape {}, found {}", to_string(expected.shape()), to_string(found.shape())),
                false);
  const Tensor x = found.to(DType::f32), y = expected.to(DType::f32);
  double worst = 0, share = 0;
  for (std::size_t i = 0; i < bounds.size(); ++i) {
    const double difference = std::abs(static_cast<double>(x.data<float>()[i]) - y.data<float>()[i]);
    if (!(difference <= worst)) worst = std::isnan(difference) ? INFINITY : difference;
    share = std::max(share, std::isnan(difference) ? INFINITY : difference / bounds[i]);
  }
  line(name, fmt::format("largest difference {:.2e}, {:.2f} of its bound", worst, share), share <= 1);
}

void Report::value(const std::string& name, double difference, double tolerance) {
  line(name, fmt::format("largest difference {:.2e} (at most {:.1e})", difference, tolerance), difference <= tolerance);
}

void Report::count(const std::string& name, std::int64_t differing, std::int64_t total, std::int64_t allowed) {
  line(name, fmt::format("{} of {} differ (at most {})", differing, total, allowed), differing <= allowed);
}

void Report::at_least(const std::string& name, double value, double bound) {
  line(name, fmt::format("{:.4f} (at least {})", value, bound), value >= bound);
}

}  // namespace sparvar::conformance
