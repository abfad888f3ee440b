// The authors' CSLA mask: lists of keys against it, and the keys that a device really reads.
#include "attention/csla.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <random>
#include <set>

#include "backend/backend.h"
#include "conformance/attention_bound.h"
#include "conformance/report.h"
#include "models/attention_runner.h"

namespace sparvar::conformance {
namespace {

/// Bounds as the fixture writes them: [positions, k + 1, 2].
std::int64_t differing_bounds(const ScaleSchedule& schedule, int k, const CslaAttention& method, bool rows,
                              const Tensor& expected) {
  std::int64_t wrong = 0;
  for (int j = 0; j <= k; ++j) {
    const std::vector<Bounds> bounds = axis_bounds(schedule, k, j, method, rows);
    for (std::size_t i = 0; i < bounds.size(); ++i) {
      const std::int64_t at = (static_cast<std::int64_t>(i) * (k + 1) + j) * 2;
      wrong += integer(expected, at) != bounds[i].begin || integer(expected, at + 1) != bounds[i].end ? 1 : 0;
    }
  }
  return wrong;
}

/// Keys of single-query lists against the fixture's visible_per_query and visible_per_key.
void compare_visible(const ScaleSchedule& schedule, int k, const CslaAttention& method, const TensorFile& io,
                     const std::string& at, Report& report) {
  CslaAttention single = method;
  single.group = {1, 1, 1};
  const QueryTiles tiles = csla_tiles(schedule[k], single);
  const KeyLists lists = csla_lists(schedule, k, single, tiles);
  std::vector<std::int64_t> per_key(first_keys(schedule, k).back(), 0);
  for (const KeyRun& run : lists.runs)
    for (int i = 0; i < run.count; ++i) ++per_key[run.begin + i];
  if (io.has(at + "visible_per_query")) {
    std::int64_t wrong = 0;
    for (int q = 0; q < tiles.count(); ++q)
      wrong += integer(io.get(at + "visible_per_query"), q) != lists.keys_in(0, q) ? 1 : 0;
    report.count(at + "visible_per_query", wrong, tiles.count());
  }
  if (io.has(at + "visible_per_key")) {
    std::int64_t wrong = 0;
    for (std::size_t key = 0; key < per_key.size(); ++key)
      wrong += integer(io.get(at + "visible_per_key"), static_cast<std::int64_t>(key)) != per_key[key] ? 1 : 0;
    report.count(at + "visible_per_key", wrong, static_cast<std::int64_t>(per_key.size()));
  }
}

void compare_blocks(const ScaleSchedule& schedule, int k, CslaAttention method, const Tensor& packed,
                    const std::string& name, Report& report) {
  method.form = CslaAttention::Form::blocks;
  const QueryTiles tiles = csla_tiles(schedule[k], method);
  const KeyLists lists = csla_lists(schedule, k, method, tiles);
  const int keys = first_keys(schedule, k).back();
  const int key_blocks = (keys + method.block - 1) / method.block;
  std::int64_t wrong = 0;
  for (int t = 0; t < tiles.count(); ++t) {
    std::set<int> blocks;
    for (std::int64_t r = lists.offset[t]; r < lists.offset[t + 1]; ++r)
      for (int key = lists.runs[r].begin; key < lists.runs[r].begin + lists.runs[r].count; ++key)
        blocks.insert(key / method.block);
    for (int b = 0; b < key_blocks; ++b) {
      const bool expected = ((packed.data<std::uint8_t>()[t * packed.dim(1) + b / 8] >> (b % 8)) & 1) != 0;
      wrong += expected != blocks.contains(b) ? 1 : 0;
    }
  }
  report.count(name, wrong, static_cast<std::int64_t>(tiles.count()) * key_blocks);
}

/// Keys that each tile of queries may read, as the fixture says: [tiles][keys].
using Visible = std::vector<std::vector<bool>>;

/// The union over each tile's queries of what their row and column see.
Visible visible_tokens(const ScaleSchedule& schedule, int k, const QueryTiles& tiles, const Tensor& rows,
                       const Tensor& columns) {
  const std::vector<int> first = first_keys(schedule, k);
  const auto bound = [k](const Tensor& bounds, int position, int j, int end) {
    return static_cast<int>(integer(bounds, (static_cast<std::int64_t>(position) * (k + 1) + j) * 2 + end));
  };
  Visible seen(static_cast<std::size_t>(tiles.count()), std::vector<bool>(first.back()));
  for (int t = 0; t < tiles.count(); ++t)
    for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i) {
      const int y = tiles.rows[i] / schedule[k].w, x = tiles.rows[i] % schedule[k].w;
      for (int j = 0; j <= k; ++j)
        for (int v = bound(rows, y, j, 0); v < bound(rows, y, j, 1); ++v)
          for (int u = bound(columns, x, j, 0); u < bound(columns, x, j, 1); ++u)
            seen[t][first[j] + v * schedule[j].w + u] = true;
    }
  return seen;
}

Visible visible_blocks(const QueryTiles& tiles, int keys, int block, const Tensor& packed) {
  Visible seen(static_cast<std::size_t>(tiles.count()), std::vector<bool>(keys));
  for (int t = 0; t < tiles.count(); ++t)
    for (int key = 0; key < keys; ++key) {
      const int b = key / block;
      seen[t][key] = ((packed.data<std::uint8_t>()[t * packed.dim(1) + b / 8] >> (b % 8)) & 1) != 0;
    }
  return seen;
}

/// Runs the method on the device. All queries are zero, so that every key that is read weighs the same: the output is
/// the mean of their values, which are 1 or -1, and the sum of the weights is their number. One key too many or too few
/// moves both by far more than rounding does.
void run_on_device(const ScaleSchedule& schedule, int k, const CslaAttention& method, const Visible& seen,
                   Backend& device, const std::string& name, Report& report) {
  constexpr std::int64_t kHeads = 2, kDim = 64;
  const std::int64_t n = schedule[k].tokens(), keys = first_keys(schedule, k).back();
  const DType type = device.compute_type();
  Tensor values = Tensor::empty(DType::f32, {1, kHeads, keys, kDim});
  std::minstd_rand random(static_cast<unsigned>(k));
  for (std::int64_t i = 0; i < values.size(); ++i) values.data<float>()[i] = random() >> 16 & 1U ? 1.0F : -1.0F;
  AttentionArgs args{.q = device.zeros(type, {1, kHeads, n, kDim}),
                     .k = device.random(type, {1, kHeads, keys, kDim}, 1, 1.0F),
                     .v = device.upload(values.to(type)),
                     .out = device.zeros(type, {1, n, kHeads, kDim}),
                     .scale = 1.0F,
                     .statistics = device.zeros(DType::f32, {1, kHeads, n, 2})};
  AttentionRunner(device, {name, {{0, -1, k, -1, method}}}, schedule, 1).run(0, k, args);

  const QueryTiles tiles = csla_tiles(schedule[k], method);
  const Tensor sums = device.download(args.statistics);
  Tensor expected = Tensor::empty(DType::f32, args.out.shape());
  std::vector<float> bounds(static_cast<std::size_t>(expected.size()));
  std::int64_t wrong = 0;
  for (int t = 0; t < tiles.count(); ++t) {
    const auto count = std::count(seen[t].begin(), seen[t].end(), true);
    for (std::int64_t h = 0; h < kHeads; ++h) {
      double mean[kDim] = {};
      for (std::int64_t key = 0; key < keys; ++key)
        for (std::int64_t d = 0; seen[t][key] && d < kDim; ++d)
          mean[d] += values.data<float>()[(h * keys + key) * kDim + d] / static_cast<double>(count);
      for (int i = tiles.offset[t]; i < tiles.offset[t + 1]; ++i) {
        const std::int64_t at = (std::int64_t{tiles.rows[i]} * kHeads + h) * kDim;
        for (std::int64_t d = 0; d < kDim; ++d) {
          expected.data<float>()[at + d] = static_cast<float>(mean[d]);
          bounds[at + d] = static_cast<float>(1e-6 + (type == DType::bf16 ? kBf16Rounding * std::abs(mean[d]) : 0));
        }
        const float* statistics = sums.data<float>() + (h * n + tiles.rows[i]) * 2;
        const double read = std::exp(static_cast<double>(statistics[0])) * statistics[1];
        wrong += std::abs(read - static_cast<double>(count)) < 0.25 ? 0 : 1;
      }
    }
  }
  report.count(name + " keys", wrong, n * kHeads);
  report.within(name + " out", device.download(args.out), expected, bounds);
}

/// The method as each query sees it, as tiles read it, and as published.
void run_forms(const ScaleSchedule& schedule, int k, CslaAttention method, const TensorFile& io, const std::string& at,
               Backend& device, Report& report) {
  const auto tensor = [&](const char* name) { return io.has(at + name) ? io.get(at + name) : Tensor(); };
  const Tensor rows = tensor("row_bounds"), columns = tensor("col_bounds"), blocks = tensor("block_mask_packed");
  if (rows.defined() && columns.defined())
    for (const QueryGroup& group : {QueryGroup{1, 1, 0}, method.group}) {
      method.group = group;
      const Visible seen = visible_tokens(schedule, k, csla_tiles(schedule[k], method), rows, columns);
      run_on_device(schedule, k, method, seen, device, fmt::format("{}{}x{}", at, group.tile_h, group.tile_w), report);
    }
  if (!blocks.defined()) return;
  method.form = CslaAttention::Form::blocks;
  const QueryTiles tiles = csla_tiles(schedule[k], method);
  const Visible seen = visible_blocks(tiles, first_keys(schedule, k).back(), method.block, blocks);
  run_on_device(schedule, k, method, seen, device, at + "blocks", report);
}

}  // namespace

void run_csla(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report) {
  const std::unique_ptr<Backend> device = settings.backend(settings.compute());
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  for (const auto& entry : config.at("cases")) {
    const ScaleSchedule schedule = read_schedule(entry.at("scale_schedule"));
    CslaAttention method;
    method.windows = entry.value("win_size", config.at("win_size").get<std::vector<int>>());
    method.sink_scales = entry.value("attn_sink", config.at("attn_sink").get<int>());
    method.block = entry.value("block", config.at("block").get<int>());
    for (const auto& scale : entry.at("scales")) {
      const int k = scale.at("k");
      const std::string at = fmt::format("{}.k{}.", entry.at("name").get<std::string>(), k);
      const auto tensor = [&](const char* name) { return io.has(at + name) ? io.get(at + name) : Tensor(); };
      if (const Tensor rows = tensor("row_bounds"); rows.defined())
        report.count(at + "row_bounds", differing_bounds(schedule, k, method, true, rows), rows.size() / 2);
      if (const Tensor columns = tensor("col_bounds"); columns.defined())
        report.count(at + "col_bounds", differing_bounds(schedule, k, method, false, columns), columns.size() / 2);
      compare_visible(schedule, k, method, io, at, report);
      if (const Tensor blocks = tensor("block_mask_packed"); blocks.defined())
        compare_blocks(schedule, k, method, blocks, at + "block_mask", report);
      run_forms(schedule, k, method, io, at, *device, report);
    }
  }
}

}  // namespace sparvar::conformance
