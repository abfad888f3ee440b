// Sparse attention: the authors' CSLA mask, and CS4A from the column sums to the carried lists and outputs.
#include <fmt/format.h>

#include <algorithm>
#include <set>

#include "attention/cs4a.h"
#include "attention/csla.h"
#include "backend/backend.h"
#include "conformance/report.h"
#include "models/attention_runner.h"

namespace sparvar::conformance {
namespace {

std::int64_t integer(const Tensor& x, std::int64_t i) {
  switch (x.dtype()) {
    case DType::i64:
      return x.data<std::int64_t>()[i];
    case DType::i16:
      return x.data<std::int16_t>()[i];
    case DType::u8:
      return x.data<std::uint8_t>()[i];
    default:
      return x.data<std::int32_t>()[i];
  }
}

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

std::vector<Grid> grids(const nlohmann::json& scales) { return read_schedule(scales); }

}  // namespace

void run_csla(const std::string& dir, const nlohmann::json& config, Report& report) {
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  for (const auto& entry : config.at("cases")) {
    const ScaleSchedule schedule = grids(entry.at("scale_schedule"));
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
    }
  }
}

namespace {

/// Buffers of scale k; out is [B, n, H, D] where the fixture writes [B, H, n, D].
AttentionArgs buffers(const TensorFile& io, int k) {
  const Tensor q = io.get(fmt::format("q.s{}", k)).to(DType::f32);
  return {.q = q,
          .k = io.get("k_all").to(DType::f32),
          .v = io.get("v_all").to(DType::f32),
          .out = Tensor::empty(DType::f32, {q.dim(0), q.dim(2), q.dim(1), q.dim(3)}),
          .scale = 1.0F,
          .statistics = Tensor::empty(DType::f32, {q.dim(0), q.dim(1), q.dim(2), 2})};
}

Tensor heads_first(const Tensor& x) {
  const std::int64_t b = x.dim(0), n = x.dim(1), h = x.dim(2), d = x.dim(3);
  Tensor out = Tensor::empty(DType::f32, {b, h, n, d});
  for (std::int64_t i = 0; i < x.size(); ++i) {
    const std::int64_t c = i % d, head = i / d % h, row = i / (d * h) % n, batch = i / (d * h * n);
    out.data<float>()[((batch * h + head) * n + row) * d + c] = x.data<float>()[i];
  }
  return out;
}

/// Lists that hold other keys than the fixture's indices [B, H, groups, L].
void compare_lists(const KeyLists& lists, const Tensor& expected, const std::string& name, Report& report) {
  const std::int64_t length = expected.dim(3);
  std::int64_t wrong = 0;
  for (std::int64_t i = 0; i < lists.lists * static_cast<std::int64_t>(lists.tiles); ++i) {
    std::set<std::int64_t> want, found;
    for (std::int64_t j = 0; j < length; ++j) want.insert(integer(expected, i * length + j));
    for (std::int64_t r = lists.offset[i]; r < lists.offset[i + 1]; ++r)
      for (int key = 0; key < lists.runs[r].count; ++key) found.insert(lists.runs[r].begin + key);
    wrong += want != found ? 1 : 0;
  }
  report.count(name, wrong, static_cast<std::int64_t>(lists.lists) * lists.tiles);
}

KeyLists lists_from(const Tensor& indices, int keys) {
  const std::int64_t length = indices.dim(3);
  return build_lists(static_cast<int>(indices.dim(0) * indices.dim(1)), static_cast<int>(indices.dim(2)), keys,
                     [&](int list, int tile, KeySet& set) {
                       for (std::int64_t i = 0; i < length; ++i)
                         set.add(static_cast<int>(integer(indices, (list * indices.dim(2) + tile) * length + i)), 1);
                     });
}

void compare_selection(const TensorFile& io, Backend& backend, const Cs4aAttention& method,
                       const ScaleSchedule& schedule, Selection& selection, Report& report) {
  const int s = method.decision_scale;
  const int keys = first_keys(schedule, s).back();
  AttentionArgs args = buffers(io, s);
  const QueryTiles groups = group_tiles(schedule[s], method.group);
  backend.attention(args, groups, all_keys(groups, keys));
  report.compare(fmt::format("o_dense.s{}", s), heads_first(args.out), io.get(fmt::format("o_dense.s{}", s)), 5e-6);
  const Tensor sums = backend.column_sums(args, groups, keys);
  report.compare("colsum", sums, io.get("colsum"), 5e-5);
  selection = select_keys(sums.data<float>(), static_cast<int>(args.q.dim(0) * args.q.dim(1)), groups.count(), keys,
                          kept_keys(method.share, keys, method.granularity));
  const Tensor& selected = io.get("selected");
  std::int64_t wrong = 0;
  for (int i = 0; i < selection.lists * selection.groups; ++i) {
    std::set<std::int64_t> want, found;
    for (std::int64_t j = 0; j < selected.dim(3); ++j) want.insert(integer(selected, i * selected.dim(3) + j));
    for (int j = 0; j < selection.count; ++j)
      found.insert(selection.keys[static_cast<std::size_t>(i) * selection.count + j]);
    wrong += want != found ? 1 : 0;
  }
  report.count("selected", wrong, static_cast<std::int64_t>(selection.lists) * selection.groups);
}

void compare_group_maps(const TensorFile& io, const Cs4aAttention& method, const ScaleSchedule& schedule, int k,
                        Report& report) {
  const QueryTiles tiles = group_tiles(schedule[k], method.group);
  const int groups_s = group_tiles(schedule[method.decision_scale], method.group).count();
  if (const std::string name = fmt::format("group_of_S.s{}", k); io.has(name)) {
    std::int64_t wrong = 0;
    for (int g = 0; g < tiles.count(); ++g)
      wrong += integer(io.get(name), g) != group_of_decision(g, tiles.count(), groups_s) ? 1 : 0;
    report.count(name, wrong, tiles.count());
  }
  if (const std::string name = fmt::format("local_run.s{}", k); io.has(name)) {
    const Tensor& expected = io.get(name);
    const auto runs = local_runs(schedule[k], first_keys(schedule, k)[k],
                                 method.own_windows[k - method.decision_scale - 1], tiles, method.granularity);
    std::int64_t wrong = 0;
    for (int g = 0; g < tiles.count(); ++g)
      wrong += integer(expected, g * expected.dim(1)) != runs[g].begin || expected.dim(1) != runs[g].count ? 1 : 0;
    report.count(name, wrong, tiles.count());
  }
}

}  // namespace

void run_cs4a(const std::string& dir, const nlohmann::json& config, Report& report) {
  const TensorFile io = TensorFile::open(dir + "/io.safetensors");
  const ScaleSchedule schedule = grids(config.at("scale_schedule"));
  const auto backend = make_cpu_backend({.compute = DType::f32, .threads = 0});
  Cs4aAttention method;
  method.decision_scale = config.at("decision_scale");
  method.share = config.at("top_keys");
  method.granularity = config.at("multiple_of");
  method.group = {1, 1, config.at("group").get<int>()};
  const int s = method.decision_scale;
  const int last = static_cast<int>(schedule.size()) - 1;
  std::vector<int> windows;
  for (int k = s + 1; k <= last; ++k) windows.push_back(config.at("local_windows").value(std::to_string(k), 0));
  method.own_windows = windows;

  Selection selection;
  compare_selection(io, *backend, method, schedule, selection, report);
  for (int k = s + 1; k <= last; ++k) compare_group_maps(io, method, schedule, k, report);

  const std::pair<const char*, Cs4aAttention::Carry> forms[] = {{"group", Cs4aAttention::Carry::group},
                                                                {"ratio", Cs4aAttention::Carry::ratio},
                                                                {"grid", Cs4aAttention::Carry::grid}};
  for (const auto& [form, carry] : forms) {
    method.carry = carry;
    method.own_windows = carry == Cs4aAttention::Carry::group ? windows : std::vector<int>();
    AttentionRunner runner(*backend, {form, {{0, -1, s, -1, method}}}, schedule, 1);
    for (int k = s; k <= last; ++k) {
      AttentionArgs args = buffers(io, k);
      runner.run(0, k, args);
      if (k == s) continue;
      const std::string indices = fmt::format("{}.indices.s{}", form, k);
      if (io.has(indices))
        compare_lists(carry_keys(method, schedule, k, group_tiles(schedule[k], method.group), selection),
                      io.get(indices), indices, report);
      const std::string out = fmt::format("{}.out.s{}", form, k);
      if (io.has(out)) report.compare(out, heads_first(args.out), io.get(out), 5e-6);
    }
  }
  for (int k = s + 1; k <= last; ++k) {
    const std::string name = fmt::format("dup.indices.s{}", k);
    if (!io.has(name)) continue;
    AttentionArgs args = buffers(io, k);
    backend->attention(args, group_tiles(schedule[k], method.group),
                       lists_from(io.get(name), first_keys(schedule, k).back()));
    report.compare(fmt::format("dup.out.s{}", k), heads_first(args.out), io.get(fmt::format("dup.out.s{}", k)), 5e-6);
  }
}

}  // namespace sparvar::conformance
