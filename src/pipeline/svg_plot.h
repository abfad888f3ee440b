// Plots as SVG text, for pages that need nothing else.
#pragma once

#include <string>
#include <vector>

namespace sparvar {

/// A point with a line from `low` to `high` through it.
struct PlotPoint {
  std::string name;
  double x = 0;
  double y = 0;
  double low = 0;
  double high = 0;
};

struct PlotAxes {
  std::string title, x, y;  // UTF-8
};

/// Points, each with its name and in its own colour, on axes with round numbers. Points that are not finite are left
/// out.
std::string scatter_plot(const std::vector<PlotPoint>& points, const PlotAxes& axes);

/// The colour of point `index`: "#rrggbb".
std::string plot_colour(std::size_t index);

/// Text as it may stand in HTML and SVG, in quotes too; control characters become spaces.
std::string escaped(const std::string& text);

/// Round numbers that cover [low, high]: at least two, about `count` of them.
std::vector<double> round_ticks(double low, double high, int count);

}  // namespace sparvar
