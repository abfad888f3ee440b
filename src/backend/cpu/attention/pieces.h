// Tiles cut to what one kernel call takes.
#pragma once

#include <cstdint>
#include <vector>

#include "attention/key_lists.h"

namespace sparvar {

/// At most kMaxTileQueries queries of a tile; the pieces of a tile share its list.
struct Piece {
  int tile;
  std::int32_t first;  // in QueryTiles::rows
  std::int32_t count;
};

std::vector<Piece> pieces_of(const QueryTiles& tiles);

}  // namespace sparvar
