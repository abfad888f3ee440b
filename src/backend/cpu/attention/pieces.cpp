#include "backend/cpu/attention/pieces.h"

#include "backend/cpu/attention/kernels.h"

namespace sparvar {

std::vector<Piece> pieces_of(const QueryTiles& tiles) {
  std::vector<Piece> pieces;
  for (int t = 0; t < tiles.count(); ++t) {
    const int parts = (tiles.rows_in(t) + kMaxTileQueries - 1) / kMaxTileQueries;
    for (int part = 0; part < parts; ++part) {
      const int begin = tiles.rows_in(t) * part / parts;
      const int end = tiles.rows_in(t) * (part + 1) / parts;
      pieces.push_back({t, tiles.offset[t] + begin, end - begin});
    }
  }
  return pieces;
}

}  // namespace sparvar
