#include "pipeline/svg_plot.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>

namespace sparvar {
namespace {

constexpr int kWidth = 640, kHeight = 400;
constexpr int kLeft = 60, kRight = 20, kTop = 34, kBottom = 48;
constexpr int kTicks = 6;
constexpr double kLabelHeight = 14, kLabelWidth = 120;

/// Values to pixels along one axis; ticks are its ends and what lies between.
struct Axis {
  std::vector<double> ticks;
  double from = 0, to = 0;  // pixels of the first and the last tick
  double at(double value) const {
    return from + (to - from) * (value - ticks.front()) / (ticks.back() - ticks.front());
  }
};

/// Decimals that tell ticks apart.
std::string number(double value, double step) {
  const int decimals = std::clamp(static_cast<int>(-std::floor(std::log10(step) + 1e-9)), 0, 9);
  return fmt::format("{:.{}f}", value == 0 ? 0.0 : value, decimals);
}

std::string text_at(double x, double y, const std::string& anchor, const std::string& text,
                    const std::string& more = "") {
  return fmt::format(R"(<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>)", x, y, anchor, more, escaped(text)) +
         "\n";
}

std::string line_between(double x1, double y1, double x2, double y2, const std::string& colour) {
  return fmt::format(R"(<line x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke="{}"/>)", x1, y1, x2, y2, colour) +
         "\n";
}

std::string frame(const Axis& x, const Axis& y, const PlotAxes& axes) {
  std::string out;
  for (const double tick : x.ticks) {
    out += line_between(x.at(tick), y.to, x.at(tick), y.from, "#ddd");
    out += text_at(x.at(tick), y.from + 16, "middle", number(tick, x.ticks[1] - x.ticks[0]));
  }
  for (const double tick : y.ticks) {
    out += line_between(x.from, y.at(tick), x.to, y.at(tick), "#ddd");
    out += text_at(x.from - 6, y.at(tick) + 4, "end", number(tick, y.ticks[1] - y.ticks[0]));
  }
  out += text_at(kWidth / 2.0, 18, "middle", axes.title, R"( font-weight="bold")");
  out += text_at((x.from + x.to) / 2, kHeight - 10, "middle", axes.x);
  const double middle = (y.from + y.to) / 2;
  out += text_at(14, middle, "middle", axes.y, fmt::format(" transform=\"rotate(-90 14 {:.1f})\"", middle));
  return out;
}

/// Where the names go: beside their points, moved down where they would cover each other.
std::vector<double> label_heights(const std::vector<PlotPoint>& points, const Axis& x, const Axis& y) {
  std::vector<std::size_t> order(points.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::sort(order.begin(), order.end(), [&](auto a, auto b) { return points[a].y > points[b].y; });
  std::vector<double> heights(points.size());
  for (std::size_t i = 0; i < order.size(); ++i) {
    double height = y.at(points[order[i]].y) + 4;
    for (std::size_t j = 0; j < i; ++j)
      if (std::abs(x.at(points[order[j]].x) - x.at(points[order[i]].x)) < kLabelWidth &&
          std::abs(height - heights[order[j]]) < kLabelHeight)
        height = heights[order[j]] + kLabelHeight;
    heights[order[i]] = height;
  }
  return heights;
}

std::string drawn_points(const std::vector<PlotPoint>& points, const std::vector<std::string>& colours, const Axis& x,
                         const Axis& y) {
  std::string out;
  const std::vector<double> heights = label_heights(points, x, y);
  for (std::size_t i = 0; i < points.size(); ++i) {
    const double px = x.at(points[i].x), py = y.at(points[i].y);
    out += line_between(px, y.at(points[i].low), px, y.at(points[i].high), colours[i]);
    out += fmt::format(R"(<circle cx="{:.1f}" cy="{:.1f}" r="4" fill="{}"><title>{}: {:.4g}, {:.4g}</title></circle>)",
                       px, py, colours[i], escaped(points[i].name), points[i].x, points[i].y) +
           "\n";
    const bool left = px + kLabelWidth > kWidth;
    out += text_at(left ? px - 8 : px + 8, heights[i], left ? "end" : "start", points[i].name,
                   fmt::format(R"( fill="{}")", colours[i]));
  }
  return out;
}

}  // namespace

std::string plot_colour(std::size_t index) {
  constexpr std::array<const char*, 10> kColours = {"#1f5fa8", "#c04a1c", "#2c8a3d", "#8a3ca0", "#7a5a1a",
                                                    "#0f8a8a", "#b0246a", "#555555", "#6a7a10", "#3a3ac0"};
  return kColours[index % kColours.size()];
}

std::string escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&')
      out += "&amp;";
    else if (c == '<')
      out += "&lt;";
    else if (c == '>')
      out += "&gt;";
    else if (c == '"')
      out += "&quot;";
    else if (c == '\'')
      out += "&#39;";
    else
      out += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return out;
}

std::vector<double> round_ticks(double low, double high, int count) {
  if (high < low) std::swap(low, high);
  if (high - low < 1e-9 * std::max(1.0, std::abs(high))) {
    const double room = std::max(std::abs(high) * 0.1, 1e-3);
    low -= room;
    high += room;
  }
  const double rough = (high - low) / std::max(count - 1, 1);
  const double power = std::pow(10.0, std::floor(std::log10(rough)));
  double step = power;
  for (const double factor : {1.0, 2.0, 5.0, 10.0}) {
    step = factor * power;
    if (step >= rough) break;
  }
  std::vector<double> ticks;
  const double first = std::floor(low / step + 1e-9), last = std::ceil(high / step - 1e-9);
  for (double tick = first; tick <= last; ++tick) ticks.push_back(tick * step);
  return ticks;
}

std::string scatter_plot(const std::vector<PlotPoint>& given, const PlotAxes& axes) {
  std::vector<PlotPoint> points;
  std::vector<std::string> colours;
  for (std::size_t i = 0; i < given.size(); ++i) {
    const PlotPoint& p = given[i];
    if (!std::isfinite(p.x) || !std::isfinite(p.y) || !std::isfinite(p.low) || !std::isfinite(p.high)) continue;
    points.push_back(p);
    colours.push_back(plot_colour(i));
  }
  std::string out = fmt::format(
      R"(<svg viewBox="0 0 {0} {1}" width="{0}" height="{1}" font-family="sans-serif" font-size="12" role="img">)",
      kWidth, kHeight);
  out += "\n";
  if (points.empty()) return out + text_at(kWidth / 2.0, kHeight / 2.0, "middle", "nothing to plot") + "</svg>\n";
  double x_low = points[0].x, x_high = x_low, y_low = points[0].y, y_high = y_low;
  for (const PlotPoint& p : points) {
    x_low = std::min(x_low, p.x);
    x_high = std::max(x_high, p.x);
    y_low = std::min({y_low, p.y, p.low, p.high});
    y_high = std::max({y_high, p.y, p.low, p.high});
  }
  const Axis x{round_ticks(x_low, x_high, kTicks), kLeft, kWidth - kRight};
  const Axis y{round_ticks(y_low, y_high, kTicks), kHeight - kBottom, kTop};
  return out + frame(x, y, axes) + drawn_points(points, colours, x, y) + "</svg>\n";
}

}  // namespace sparvar
