// Attention plans and scale schedules.
#include <fmt/format.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <variant>

#include "attention/csla.h"
#include "bindings.h"
#include "core/resolutions.h"
#include "pipeline/picture_shape.h"
#include "sparvar/attention_plan.h"
#include "sparvar/error.h"
#include "sparvar/pipeline.h"

namespace sparvar::python {
namespace {

constexpr const char* kMethods[] = {"dense", "csla", "cs4a", "probe"};

/// Infinity's grids of a ratio and a size, whatever a model has.
Grids table_schedule(const std::string& aspect, const std::string& size) {
  ModelConfig any;
  any.schedule = *schedule_1m(1.0);
  any.rope_grid = any.schedule.back();
  return grids_of(picture_shape(any, aspect, size, static_cast<int>(any.schedule.size())).schedule);
}

std::optional<int> decision_scale(const AttentionPlan& plan, int layer, int scale) {
  const auto* method = std::get_if<Cs4aAttention>(&plan.method(layer, scale));
  return method == nullptr ? std::nullopt : std::optional(method->decision_scale);
}

}  // namespace

ScaleSchedule schedule_of(const Grids& grids) {
  constexpr int kMostScales = 64, kMostSide = 4096;
  if (grids.empty() || grids.size() > kMostScales)
    throw Error(ErrorKind::usage, fmt::format("schedule: expected 1 to {} grids, found {}", kMostScales, grids.size()));
  ScaleSchedule out;
  for (const auto& [h, w] : grids) {
    if (h < 1 || w < 1 || h > kMostSide || w > kMostSide)
      throw Error(ErrorKind::usage,
                  fmt::format("schedule: a grid of {}x{}; sides are 1 to {} tokens", h, w, kMostSide));
    out.push_back({h, w});
  }
  return out;
}

Grids grids_of(const ScaleSchedule& schedule) {
  Grids out;
  for (const Grid& grid : schedule) out.emplace_back(grid.h, grid.w);
  return out;
}

void bind_plans(nb::module_& m) {
  m.def("table_schedule", &table_schedule, nb::arg("aspect"), nb::arg("size"),
        "Grids [(h, w), ...] of Infinity's schedule of a ratio (width:height) and a size (0.06M ... 1M).");
  m.def(
      "picture_schedule",
      [](const std::string& model_dir, const std::string& aspect, const std::string& size) {
        return grids_of(picture_schedule(model_dir, aspect, size));
      },
      nb::arg("model_dir"), nb::arg("aspect"), nb::arg("size"));
  m.def(
      "published_windows", [](int scales) { return published_csla(scales, CslaAttention::Form::lists).windows; },
      nb::arg("scales"), "CSLA's window by key scale, of a model with so many scales.");
  m.def("aspect_names", &aspect_names);
  m.def("preset_names", &AttentionPlan::preset_names);
  m.def("bundled_model_dir", &bundled_model_dir);

  nb::class_<AttentionPlan>(m, "AttentionPlan", "Rules that say which keys each group of queries reads.")
      .def_static("from_json", &AttentionPlan::from_json, nb::arg("text"), nb::arg("where"))
      .def_static("from_file", &AttentionPlan::from_file, nb::arg("path"))
      .def_static("preset", &AttentionPlan::preset, nb::arg("name"), nb::arg("layers"), nb::arg("scales"))
      .def("to_json", &AttentionPlan::to_json)
      .def_ro("name", &AttentionPlan::name)
      .def_prop_ro("prunes", [](const AttentionPlan& plan) { return plan.pruning.has_value(); })
      .def_prop_ro("is_static", &AttentionPlan::is_static)
      .def(
          "method",
          [](const AttentionPlan& plan, int layer, int scale) { return kMethods[plan.method(layer, scale).index()]; },
          nb::arg("layer"), nb::arg("scale"), "dense, csla, cs4a or probe")
      .def("decision_scale", &decision_scale, nb::arg("layer"), nb::arg("scale"), "Of a cs4a rule, else None.");
}

}  // namespace sparvar::python
