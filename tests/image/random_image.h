// Pictures of noise for the tests of this room.
#pragma once

#include <random>

#include "sparvar/image.h"

namespace sparvar::testing {

inline Image random_image(int width, int height, unsigned seed) {
  std::mt19937 generator(seed);
  Image image{width, height, std::vector<std::uint8_t>(static_cast<std::size_t>(width * height) * 3)};
  for (auto& value : image.rgb) value = static_cast<std::uint8_t>(generator() >> 9);
  return image;
}

}  // namespace sparvar::testing
