#include "image/canvas.h"

#include <fmt/format.h>

#include <algorithm>

#include "sparvar/error.h"

namespace sparvar {
namespace {

std::size_t offset(const Image& image, int x, int y) {
  return (static_cast<std::size_t>(y) * static_cast<std::size_t>(image.width) + static_cast<std::size_t>(x)) * 3;
}

bool continues_a_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

/// Bytes of the first `count` characters.
std::size_t bytes_of(std::string_view text, int count) {
  std::size_t at = 0;
  while (at < text.size() && count > 0) {
    ++at;
    while (at < text.size() && continues_a_character(text[at])) ++at;
    --count;
  }
  return at;
}

}  // namespace

Image blank(int width, int height, Colour colour) {
  Image image{width, height, std::vector<std::uint8_t>(3 * static_cast<std::size_t>(width) * height)};
  fill(image, 0, 0, width, height, colour);
  return image;
}

Colour pixel(const Image& image, int x, int y) {
  const std::uint8_t* at = image.rgb.data() + offset(image, x, y);
  return {at[0], at[1], at[2]};
}

void fill(Image& image, int x, int y, int width, int height, Colour colour) {
  const int right = std::min(x + width, image.width);
  const int bottom = std::min(y + height, image.height);
  for (int row = std::max(y, 0); row < bottom; ++row)
    for (int column = std::max(x, 0); column < right; ++column) {
      std::uint8_t* at = image.rgb.data() + offset(image, column, row);
      at[0] = colour.r;
      at[1] = colour.g;
      at[2] = colour.b;
    }
}

void paste(Image& image, const Image& part, int x, int y) {
  const int left = std::max(x, 0);
  const int right = std::min(x + part.width, image.width);
  if (left >= right) return;
  for (int row = std::max(y, 0); row < std::min(y + part.height, image.height); ++row)
    std::copy_n(part.rgb.data() + offset(part, left - x, row - y), 3 * static_cast<std::size_t>(right - left),
                image.rgb.data() + offset(image, left, row));
}

Image amplified_difference(const Image& a, const Image& b, int gain) {
  if (a.width != b.width || a.height != b.height || a.rgb.size() != b.rgb.size())
    throw Error(ErrorKind::usage, fmt::format("pictures of {}x{} and {}x{} pixels have no difference", a.width,
                                              a.height, b.width, b.height));
  Image out{a.width, a.height, std::vector<std::uint8_t>(a.rgb.size())};
  for (std::size_t i = 0; i < a.rgb.size(); ++i)
    out.rgb[i] = static_cast<std::uint8_t>(std::clamp(128 + gain * (int{b.rgb[i]} - int{a.rgb[i]}), 0, 255));
  return out;
}

int characters(std::string_view text) {
  return static_cast<int>(std::count_if(text.begin(), text.end(), [](char c) { return !continues_a_character(c); }));
}

std::vector<std::string> wrapped(std::string_view text, int columns) {
  columns = std::max(columns, 1);
  std::vector<std::string> lines;
  while (characters(text) > columns) {
    std::size_t end = bytes_of(text, columns);
    std::size_t next = end;
    if (text[end] == ' ') {
      ++next;
    } else if (const std::size_t space = text.substr(0, end).rfind(' '); space != std::string_view::npos && space > 0) {
      end = space;
      next = space + 1;
    }
    lines.emplace_back(text.substr(0, end));
    text.remove_prefix(next);
  }
  lines.emplace_back(text);
  return lines;
}

}  // namespace sparvar
