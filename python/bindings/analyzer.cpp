// What attention looks like: the counting behind `sparvar analyze`, fed by a pipeline or by the caller's probabilities.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>

#include <optional>
#include <span>

#include "bindings.h"
#include "pipeline/analyze.h"
#include "sparvar/error.h"

namespace sparvar::python {
namespace {

using Maps = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void make(AttentionAnalyzer* memory, const Grids& grids, const std::vector<int>& scales, int side,
          const std::vector<int>& windows, int sink_scales) {
  CslaAttention counted;
  counted.windows = windows;
  counted.sink_scales = sink_scales;
  counted.centre = CslaAttention::Centre::half_pixel;
  new (memory) AttentionAnalyzer(AnalyzerOptions{schedule_of(grids), scales, side, counted});
}

void require_scale(const AttentionAnalyzer& analyzer, int scale) {
  if (scale < 0 || scale >= static_cast<int>(analyzer.options().schedule.size()))
    throw Error(ErrorKind::usage, "analyze: a scale that the schedule does not have");
}

std::vector<std::int32_t> queries(const AttentionAnalyzer& analyzer, int scale) {
  require_scale(analyzer, scale);
  return sampled_tokens(analyzer.options().schedule[static_cast<std::size_t>(scale)], analyzer.options().side);
}

std::vector<std::int32_t> parents(const AttentionAnalyzer& analyzer, int scale) {
  require_scale(analyzer, scale - 1);
  std::vector<std::int32_t> tokens = queries(analyzer, scale);
  const ScaleSchedule& schedule = analyzer.options().schedule;
  for (std::int32_t& token : tokens)
    token =
        token_under(token, schedule[static_cast<std::size_t>(scale)], schedule[static_cast<std::size_t>(scale) - 1]);
  return tokens;
}

void count(AttentionAnalyzer& analyzer, int layer, int scale, const Maps& rows, const std::optional<Maps>& before) {
  const std::size_t heads = rows.shape(0), size = rows.shape(1) * rows.shape(2);
  const std::size_t size_before = before ? before->shape(1) * before->shape(2) : 0;
  if (before && before->shape(0) != heads)
    throw Error(ErrorKind::usage, "analyze: the scale below has another number of heads");
  const float* const at = rows.data();
  const float* const at_before = before ? before->data() : nullptr;
  const nb::gil_scoped_release released;
  for (std::size_t head = 0; head < heads; ++head)
    analyzer.count(
        layer, scale, static_cast<int>(head), static_cast<int>(heads), {at + head * size, size},
        before ? std::span<const float>(at_before + head * size_before, size_before) : std::span<const float>());
}

/// Shares of one query, of each head; by key scale where a name says so.
nb::dict result_of(int layer, int scale, const std::vector<HeadSums>& heads, int sink_scales) {
  using Numbers = std::vector<double>;
  Numbers sinks, windows, similarity_mean;
  std::vector<Numbers> mass, distance, similarity;
  std::vector<std::vector<Numbers>> weight, keys;
  for (const HeadSums& head : heads) {
    sinks.push_back(head.sinks(sink_scales));
    windows.push_back(head.window_share());
    similarity_mean.push_back(head.mean_similarity());
    mass.emplace_back();
    distance.emplace_back();
    similarity.emplace_back();
    weight.emplace_back();
    keys.emplace_back();
    for (int j = 0; j <= scale; ++j) {
      mass.back().push_back(head.mass_share(j));
      distance.back().push_back(head.mean_distance(j));
      similarity.back().push_back(head.similarity[static_cast<std::size_t>(j)].value());
      const Distances& sums = head.distances[static_cast<std::size_t>(j)];
      weight.back().emplace_back(sums.weight.begin(), sums.weight.end());
      keys.back().emplace_back(sums.keys.begin(), sums.keys.end());
      for (double& one : weight.back().back()) one /= head.queries;
      for (double& one : keys.back().back()) one /= head.queries;
    }
  }
  nb::dict out;
  out["layer"] = layer;
  out["scale"] = scale;
  out["queries"] = static_cast<std::int64_t>(heads.front().queries);
  out["sinks"] = sinks;
  out["windows"] = windows;
  out["similarity_mean"] = similarity_mean;
  out["mass"] = mass;
  out["distance"] = distance;
  out["similarity"] = similarity;
  out["weight"] = weight;
  out["keys"] = keys;
  return out;
}

nb::list results(const AttentionAnalyzer& analyzer) {
  nb::list out;
  for (const auto& [at, heads] : analyzer.sums())
    out.append(result_of(at.first, at.second, heads, analyzer.options().windows.sink_scales));
  return out;
}

}  // namespace

void bind_analyzer(nb::module_& m) {
  m.attr("distance_bins") = kDistanceBins;
  nb::class_<AttentionAnalyzer>(m, "Analyzer", "Sinks, locality and similarity across scales; see sparvar.analyze.")
      .def("__init__", &make, nb::arg("schedule"), nb::arg("scales"), nb::arg("side"), nb::arg("windows"),
           nb::arg("sink_scales"))
      .def("queries", &queries, nb::arg("scale"), "Tokens whose probabilities are counted.")
      .def("parents", &parents, nb::arg("scale"), "For each of them the token of the scale below that lies under it.")
      .def("count", &count, nb::arg("layer"), nb::arg("scale"), nb::arg("rows"), nb::arg("before").none(),
           "rows: float32 (heads, queries, keys); before: (heads, queries, keys of the scale below), or None.")
      .def("results", &results, "A dict for each (layer, scale): lists by head, then by key scale, then by distance.");
}

}  // namespace sparvar::python
