// Pictures put together: fills, pictures in pictures, differences, and text in a small bitmap font of our own.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "sparvar/image.h"

namespace sparvar {

struct Colour {
  std::uint8_t r = 0, g = 0, b = 0;
  bool operator==(const Colour&) const = default;
};

Image blank(int width, int height, Colour colour);
Colour pixel(const Image& image, int x, int y);
/// What lies outside the picture is left out, here and in everything below.
void fill(Image& image, int x, int y, int width, int height, Colour colour);
void paste(Image& image, const Image& part, int x, int y);

/// Gray 128 + gain * (b - a) per channel, clamped: equal pictures are even gray. Throws Error(usage) where sizes
/// differ.
Image amplified_difference(const Image& a, const Image& b, int gain);

/// A character is a cell of 6x10 pixels (its glyph of 5x7 or 5x9 and space around it), times `size`.
constexpr int kCellWidth = 6;
constexpr int kCellHeight = 10;

/// ASCII; every other character (a UTF-8 sequence) is drawn as a box.
void draw_text(Image& image, int x, int y, std::string_view text, int size, Colour colour);
/// Characters of UTF-8 text as draw_text counts them.
int characters(std::string_view text);
/// Lines of at most `columns` characters, broken at spaces where there are some.
std::vector<std::string> wrapped(std::string_view text, int columns);

}  // namespace sparvar
