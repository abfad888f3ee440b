// Lists of keys as arrays: what a static plan shows to each tile of queries at one scale.
#include "lists.h"

#include <fmt/format.h>
#include <nanobind/stl/shared_ptr.h>

#include <cstring>
#include <variant>

#include "attention/csla.h"
#include "sparvar/attention_plan.h"
#include "sparvar/error.h"

namespace sparvar::python {
namespace {

constexpr int kDenseTile = 64;

template <typename T>
using Vector = nb::ndarray<nb::numpy, T, nb::ndim<1>>;
template <typename T>
using Given = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
Vector<T> copied(const T* values, std::size_t count) {
  auto* held = new T[std::max<std::size_t>(count, 1)];
  const nb::capsule owner(held, [](void* memory) noexcept { delete[] static_cast<T*>(memory); });
  if (count > 0) std::memcpy(held, values, count * sizeof(T));
  return {held, {count}, owner};
}

std::shared_ptr<Lists> of_plan(const AttentionPlan& plan, const Grids& grids, int layer, int scale) {
  const ScaleSchedule schedule = schedule_of(grids);
  if (scale < 0 || scale >= static_cast<int>(schedule.size()))
    throw Error(ErrorKind::usage, fmt::format("scale {}: the schedule has 0 to {}", scale, schedule.size() - 1));
  plan.validate();
  auto out = std::make_shared<Lists>();
  out->keys = first_keys(schedule, scale).back();
  const AttentionMethod& method = plan.method(layer, scale);
  if (const auto* csla = std::get_if<CslaAttention>(&method)) {
    out->tiles = csla_tiles(schedule[scale], *csla);
    out->lists = csla_lists(schedule, scale, *csla, out->tiles);
  } else if (std::holds_alternative<DenseAttention>(method)) {
    out->tiles = row_tiles(schedule[scale].tokens(), kDenseTile);
    out->lists = all_keys(out->tiles, out->keys);
  } else {
    throw Error(ErrorKind::usage, fmt::format("layer {}, scale {}: this plan chooses its keys while it runs: it has no "
                                              "lists beforehand (dense and csla have)",
                                              layer, scale));
  }
  return out;
}

std::shared_ptr<Lists> of_arrays(const Given<std::int32_t>& tile_offset, const Given<std::int32_t>& rows,
                                 const Given<std::int64_t>& list_offset, const Given<std::int32_t>& begin,
                                 const Given<std::int32_t>& count, int keys) {
  auto out = std::make_shared<Lists>();
  out->keys = keys;
  out->tiles.offset.assign(tile_offset.data(), tile_offset.data() + tile_offset.size());
  out->tiles.rows.assign(rows.data(), rows.data() + rows.size());
  if (out->tiles.offset.empty() || begin.size() != count.size())
    throw Error(ErrorKind::usage, "lists of keys: no tile offsets, or runs of different lengths");
  out->lists.tiles = out->tiles.count();
  out->lists.offset.assign(list_offset.data(), list_offset.data() + list_offset.size());
  for (std::size_t i = 0; i < begin.size(); ++i) out->lists.runs.push_back({begin.data()[i], count.data()[i]});
  require_sound(out->tiles, out->lists);
  for (const KeyRun& run : out->lists.runs)
    if (run.begin + run.count > keys)
      throw Error(ErrorKind::usage, fmt::format("lists of keys: key {} of {}", run.begin + run.count - 1, keys));
  return out;
}

}  // namespace

void bind_lists(nb::module_& m) {
  nb::class_<Lists>(m, "Lists", "Tiles of queries and, for each, the runs of keys that it reads.")
      .def_static("of_plan", &of_plan, nb::arg("plan"), nb::arg("schedule"), nb::arg("layer"), nb::arg("scale"))
      .def_static("of_arrays", &of_arrays, nb::arg("tile_offset"), nb::arg("rows"), nb::arg("list_offset"),
                  nb::arg("begin"), nb::arg("count"), nb::arg("keys"))
      .def_prop_ro("queries", &Lists::queries)
      .def_ro("keys", &Lists::keys)
      .def_prop_ro("share_of_pairs", [](const Lists& a) { return share_of_pairs(a.tiles, a.lists, a.keys); })
      .def_prop_ro(
          "tile_offset", [](const Lists& a) { return copied(a.tiles.offset.data(), a.tiles.offset.size()); },
          nb::rv_policy::move)
      .def_prop_ro(
          "rows", [](const Lists& a) { return copied(a.tiles.rows.data(), a.tiles.rows.size()); }, nb::rv_policy::move)
      .def_prop_ro(
          "list_offset", [](const Lists& a) { return copied(a.lists.offset.data(), a.lists.offset.size()); },
          nb::rv_policy::move)
      .def_prop_ro(
          "runs",
          [](const Lists& a) {
            static_assert(sizeof(KeyRun) == 2 * sizeof(std::int32_t));
            return copied(reinterpret_cast<const std::int32_t*>(a.lists.runs.data()), 2 * a.lists.runs.size());
          },
          nb::rv_policy::move, "begin, count, begin, count, ...");
}

}  // namespace sparvar::python
