#include "pipeline/picture_shape.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <optional>
#include <vector>

#include "core/resolutions.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

/// 16:9 is the tables' 7:4, which is 1.6 % narrower.
constexpr double kSameRatio = 0.02;

/// The ratios as people say them: width to height, the tables' being height to width.
struct Aspect {
  int w, h;
  double ratio() const { return static_cast<double>(h) / w; }
  std::string name() const { return fmt::format("{}:{}", w, h); }
};
constexpr Aspect kAspects[] = {{1, 1}, {4, 5}, {5, 4}, {3, 4}, {4, 3}, {2, 3}, {3, 2}, {4, 7},
                               {7, 4}, {1, 2}, {2, 1}, {2, 5}, {5, 2}, {1, 3}, {3, 1}};

std::optional<double> positive(std::string_view text) {
  double value = 0;
  const auto [stop, status] = std::from_chars(text.data(), text.data() + text.size(), value);
  const bool whole = status == std::errc{} && stop == text.data() + text.size();
  if (!whole || !std::isfinite(value) || value <= 0) return std::nullopt;
  return value;
}

double distance(double a, double b) { return std::abs(std::log(a / b)); }

const Aspect& nearest_aspect(double ratio) {
  return *std::min_element(std::begin(kAspects), std::end(kAspects), [ratio](const Aspect& a, const Aspect& b) {
    return distance(a.ratio(), ratio) < distance(b.ratio(), ratio);
  });
}

const Resolution& resolution_of_aspect(const std::string& aspect) {
  const std::size_t colon = aspect.find(':');
  std::optional<double> w, h;
  if (colon != std::string::npos) {
    w = positive(std::string_view(aspect).substr(0, colon));
    h = positive(std::string_view(aspect).substr(colon + 1));
  }
  if (!w || !h)
    throw Error(ErrorKind::usage, fmt::format("aspect: expected width:height, such as 3:4, found '{}'; there are {}",
                                              aspect, aspect_names()));
  const double ratio = *h / *w;
  const Aspect& nearest = nearest_aspect(ratio);
  if (distance(nearest.ratio(), ratio) > kSameRatio)
    throw Error(ErrorKind::usage,
                fmt::format("aspect: Infinity's schedules have no {}; the nearest is {} (there are {})", aspect,
                            nearest.name(), aspect_names()));
  const std::vector<Resolution>& all = resolutions_1m();
  return *std::min_element(all.begin(), all.end(), [&nearest](const Resolution& a, const Resolution& b) {
    return distance(a.ratio, nearest.ratio()) < distance(b.ratio, nearest.ratio());
  });
}

/// The size's name that is nearest in megapixels to what was asked for; the largest of at most `levels` scales.
std::string_view nearest_size(const std::string& size, int levels) {
  std::string number = size;
  if (!number.empty() && (number.back() == 'M' || number.back() == 'm')) number.pop_back();
  const double asked = positive(number).value_or(1.0);
  std::string_view best = kSizes[0].name;
  double best_distance = INFINITY;
  for (const auto& [name, scales] : kSizes) {
    const double d = distance(*positive(name.substr(0, name.size() - 1)), asked);
    if (scales > levels || d >= best_distance) continue;
    best = name;
    best_distance = d;
  }
  return best;
}

int scales_of(const std::string& size, int levels) {
  const std::optional<int> scales = scales_of_size(size);
  if (!scales)
    throw Error(ErrorKind::usage,
                fmt::format("size: there is no {}; the nearest is {} (there are 0.06M, 0.25M, 0.60M, 1M)",
                            size.empty() ? "such one" : size, nearest_size(size, levels)));
  if (*scales > levels)
    throw Error(ErrorKind::usage,
                fmt::format("size: {} has {} scales and this model has embeddings for {}; the nearest "
                            "it has is {}",
                            size, *scales, levels, nearest_size(size, levels)));
  return *scales;
}

}  // namespace

std::string aspect_names() {
  std::vector<std::string> names;
  for (const Aspect& aspect : kAspects) names.push_back(aspect.name());
  return fmt::format("{}", fmt::join(names, ", "));
}

PictureShape picture_shape(const ModelConfig& config, const std::string& aspect, const std::string& size, int levels) {
  if (aspect.empty() && size.empty()) return {config.schedule, config.rope_grid};
  const Resolution* own = resolution_of(config.schedule);
  if (own == nullptr)
    throw Error(ErrorKind::usage,
                fmt::format("{}: this model has scales of its own, up to {}x{}, and not Infinity's ratios and sizes; "
                            "leave it out",
                            aspect.empty() ? "size" : "aspect", config.schedule.back().h, config.schedule.back().w));
  const Resolution& resolution = aspect.empty() ? *own : resolution_of_aspect(aspect);
  const auto scales =
      static_cast<std::ptrdiff_t>(size.empty() ? static_cast<int>(config.schedule.size()) : scales_of(size, levels));
  return {{resolution.schedule.begin(), resolution.schedule.begin() + scales}, resolution.schedule.back()};
}

}  // namespace sparvar
