// sparvar bench attention: one call of attention at a scale, dense and sparse.
#include <fmt/format.h>

#include <memory>

#include "bench_grid.h"
#include "commands.h"
#include "console.h"
#include "core/resolutions.h"
#include "pipeline/measure.h"
#include "plan_source.h"
#include "report.h"
#include "weights/geometry.h"

namespace sparvar::cli {
namespace {

struct Settings {
  std::vector<std::string> plans = {"dense", "csla", "sparvar"};
  std::vector<int> scales;  // empty: the last
  std::string geometry;
  int batch = 2, heads = 4, dim = 128;
  BenchGrid grid;
};

std::string command_of(const Settings& settings, const std::string& plan, int scale, Precision precision, int threads) {
  return fmt::format(
      "sparvar bench attention --attention {} --scale {} --dtype {} --threads {}{} --batch {} --heads {} --dim {} -r "
      "{}",
      plan, scale, name_of(precision), threads, settings.geometry.empty() ? "" : " --geometry " + settings.geometry,
      settings.batch, settings.heads, settings.dim, settings.grid.repeat);
}

/// Those of the geometry, or a square 1M picture.
ScaleSchedule schedule_of(Settings& settings) {
  if (settings.geometry.empty()) return *schedule_1m(1.0);
  const ModelConfig config = geometry(settings.geometry);
  settings.heads = config.transformer.num_heads;
  settings.dim = config.transformer.head_dim();
  return config.schedule;
}

void bench(Settings& settings) {
  const ScaleSchedule schedule = schedule_of(settings);
  const int last = static_cast<int>(schedule.size()) - 1;
  if (settings.scales.empty()) settings.scales = {last};
  for (const int scale : settings.scales)
    if (scale > last) throw Error(ErrorKind::usage, fmt::format("--scale {}: the scales are 0 to {}", scale, last));
  BenchTable table(fmt::format(
      "Attention of one layer, batch {}, {} heads of {}: medians of warm calls; a plan that depends on the picture "
      "chooses its keys in each",
      settings.batch, settings.heads, settings.dim));
  for (const Precision precision : settings.grid.precisions)
    for (const int threads : threads_of(settings.grid)) {
      const std::unique_ptr<Backend> backend =
          make_cpu_backend({.compute = precision == Precision::f32 ? DType::f32 : DType::bf16, .threads = threads});
      const double ceiling = product_rate(*backend);
      for (const int scale : settings.scales)
        for (const std::string& plan : settings.plans) {
          const std::string command = command_of(settings, plan, scale, precision, threads);
          tell(settings.grid, command);
          const AttentionTime time = measure_attention(*backend,
                                                       {schedule, plan_of(plan, 1, static_cast<int>(schedule.size())),
                                                        scale, settings.batch, settings.heads, settings.dim},
                                                       settings.grid.repeat);
          nlohmann::ordered_json row = {{"attention", plan},
                                        {"scale", scale},
                                        {"queries", time.queries},
                                        {"keys", time.keys},
                                        {"dtype", name_of(precision)},
                                        {"threads", threads},
                                        {"ms", time.seconds * 1e3},
                                        {"against_dense", nullptr},
                                        {"pairs_percent", 100 * time.share},
                                        {"gflops", time.flops / time.seconds * 1e-9},
                                        {"percent_of_product_rate", 100 * time.flops / time.seconds / ceiling},
                                        {"backend", backend->describe()},
                                        {"command", command}};
          row["against_dense"] = against_dense(table, row, {"scale", "dtype", "threads"}, "ms");
          table.add(std::move(row));
        }
    }
  print(table.to_string(settings.grid.format));
}

}  // namespace

void add_bench_attention(CLI::App& group, Action& chosen) {
  CLI::App* command = group.add_subcommand("attention", "Times attention at a scale, on the CPU");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  add_plans(*command, "--attention", settings->plans, "Attention plans, presets and JSON files (dense,csla,sparvar)");
  add_integers(*command, "--scale", settings->scales, {0, 63}, "Scales, counted from 0, one or a list (the last)");
  CLI::Option* geometry =
      command->add_option("--geometry", settings->geometry,
                          "Scales and heads of infinity-8b, infinity-2b, infinity-125m or FILE.json "
                          "(a square picture of 1M)");
  geometry->type_name("NAME");
  add_number(*command, "--batch", settings->batch, Range<int>{1, 64}, "Pictures and their unconditional halves (2)");
  add_number(*command, "--heads", settings->heads, Range<int>{1, 256}, "Heads (4)")->excludes(geometry);
  add_number(*command, "--dim", settings->dim, Range<int>{8, 256}, "Channels of a head (128)")->excludes(geometry);
  add_bench_grid(*command, settings->grid);
  command->callback([settings, &chosen] { chosen = [settings] { bench(*settings); }; });
}

}  // namespace sparvar::cli
