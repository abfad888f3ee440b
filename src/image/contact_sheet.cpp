#include "image/contact_sheet.h"

#include <algorithm>
#include <cmath>

#include "sparvar/error.h"

namespace sparvar {
namespace {

constexpr int kMargin = 8;

struct Layout {
  int columns = 1, rows = 1;
  int cell_w = 0, cell_h = 0;
  double scale = 1;
};

Layout layout_of(const std::vector<const Image*>& pictures, int columns, int largest) {
  const auto count = static_cast<int>(pictures.size());
  Layout layout;
  layout.columns = std::clamp(columns > 0 ? columns : static_cast<int>(std::ceil(std::sqrt(count))), 1, count);
  layout.rows = (count + layout.columns - 1) / layout.columns;
  int width = 1, height = 1;
  for (const Image* picture : pictures) {
    width = std::max(width, picture->width);
    height = std::max(height, picture->height);
  }
  const auto room = [largest](int cells) { return static_cast<double>(largest - kMargin) / cells - kMargin; };
  layout.scale = std::min({1.0, room(layout.columns) / width, room(layout.rows) / height});
  layout.cell_w = std::max(1, static_cast<int>(width * layout.scale));
  layout.cell_h = std::max(1, static_cast<int>(height * layout.scale));
  return layout;
}

void paste(const Image& picture, Image& sheet, int left, int top) {
  for (int y = 0; y < picture.height; ++y)
    std::copy_n(picture.rgb.data() + static_cast<std::size_t>(y) * static_cast<std::size_t>(picture.width) * 3,
                picture.width * 3,
                sheet.rgb.data() + (static_cast<std::size_t>(top + y) * static_cast<std::size_t>(sheet.width) +
                                    static_cast<std::size_t>(left)) *
                                       3);
}

}  // namespace

Image shrunk(const Image& image, int width, int height) {
  width = std::clamp(width, 1, image.width);
  height = std::clamp(height, 1, image.height);
  if (width == image.width && height == image.height) return image;
  const auto first = [](int i, int from, int to) { return static_cast<int>(static_cast<std::int64_t>(i) * from / to); };
  Image out{width, height, {}};
  out.rgb.reserve(static_cast<std::size_t>(width) * static_cast<std::size_t>(height) * 3);
  for (int y = 0; y < height; ++y)
    for (int x = 0; x < width; ++x) {
      const int y0 = first(y, image.height, height), y1 = std::max(first(y + 1, image.height, height), y0 + 1);
      const int x0 = first(x, image.width, width), x1 = std::max(first(x + 1, image.width, width), x0 + 1);
      unsigned sums[3] = {};
      for (int row = y0; row < y1; ++row)
        for (int column = x0; column < x1; ++column)
          for (int c = 0; c < 3; ++c)
            sums[c] += image.rgb[(static_cast<std::size_t>(row) * static_cast<std::size_t>(image.width) +
                                  static_cast<std::size_t>(column)) *
                                     3 +
                                 static_cast<std::size_t>(c)];
      const auto count = static_cast<unsigned>((y1 - y0) * (x1 - x0));
      for (const unsigned sum : sums) out.rgb.push_back(static_cast<std::uint8_t>((sum + count / 2) / count));
    }
  return out;
}

Image contact_sheet(const std::vector<const Image*>& pictures, int columns, int largest) {
  if (pictures.empty()) throw Error(ErrorKind::usage, "a contact sheet needs a picture");
  const Layout layout = layout_of(pictures, columns, largest);
  Image sheet{
      kMargin + layout.columns * (layout.cell_w + kMargin), kMargin + layout.rows * (layout.cell_h + kMargin), {}};
  sheet.rgb.assign(static_cast<std::size_t>(sheet.width) * static_cast<std::size_t>(sheet.height) * 3, 255);
  for (int i = 0; i < static_cast<int>(pictures.size()); ++i) {
    const Image& picture = *pictures[static_cast<std::size_t>(i)];
    const Image small = shrunk(picture, static_cast<int>(picture.width * layout.scale),
                               static_cast<int>(picture.height * layout.scale));
    paste(small, sheet, kMargin + i % layout.columns * (layout.cell_w + kMargin) + (layout.cell_w - small.width) / 2,
          kMargin + i / layout.columns * (layout.cell_h + kMargin) + (layout.cell_h - small.height) / 2);
  }
  return sheet;
}

}  // namespace sparvar
