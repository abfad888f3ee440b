// An evaluation as one HTML page that needs no other file.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "pipeline/evaluate.h"

namespace sparvar {

/// A picture of the page: one of the worst cases, dense, sparse and their difference side by side.
struct PagePicture {
  std::string caption;
  std::vector<std::uint8_t> webp;  // the bytes of a WebP file
};

struct PageVariant {
  std::string name;
  VariantSummary summary;
  std::vector<PagePicture> worst;
};

/// `title` and `notes` (one paragraph each) are plain text.
std::string evaluation_page(const std::string& title, const std::vector<std::string>& notes,
                            const std::vector<PageVariant>& variants);

std::string base64(const std::vector<std::uint8_t>& bytes);

}  // namespace sparvar
