// The extension module sparvar._engine: what Python sees of the engine. One file a part; python/sparvar/ makes the
// friendly interface of it.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <string>
#include <utility>
#include <vector>

#include "sparvar/schedule.h"

namespace sparvar::python {

namespace nb = nanobind;

/// Grids as Python has them: [(h, w), ...].
using Grids = std::vector<std::pair<int, int>>;
ScaleSchedule schedule_of(const Grids& grids);
Grids grids_of(const ScaleSchedule& schedule);

void bind_errors(nb::module_& module);
void bind_plans(nb::module_& module);
void bind_lists(nb::module_& module);
void bind_pipeline(nb::module_& module);
void bind_attention(nb::module_& module);
void bind_analyzer(nb::module_& module);
void bind_convert(nb::module_& module);

}  // namespace sparvar::python
