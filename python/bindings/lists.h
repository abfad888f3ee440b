// Lists of keys of one scale, for all heads.
#pragma once

#include <nanobind/ndarray.h>

#include "attention/key_lists.h"
#include "bindings.h"

namespace sparvar::python {

struct Lists {
  QueryTiles tiles;
  KeyLists lists;
  int keys = 0;
  int queries() const { return static_cast<int>(tiles.rows.size()); }
};

}  // namespace sparvar::python
