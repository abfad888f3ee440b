// sparvar bench attention: one call of attention at a scale, dense and sparse.
#include <fmt/format.h>

#include <memory>

#include "bench_grid.h"
#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "core/resolutions.h"
#include "pipeline/device.h"
#include "pipeline/measure_attention.h"
#include "plan_source.h"
#include "report.h"
#include "weights/geometry.h"

namespace sparvar::cli {
namespace {

struct Settings {
  std::vector<std::string> plans = {"dense", "csla", "sparvar"};
  std::vector<int> scales;  // empty: the last
  std::string geometry, device = "auto";
  int batch = 2, heads = 4, dim = 128;
  std::vector<TokenOrder> orders = {{}};
  BenchGrid grid;
};

/// One row.
struct Case {
  std::string plan;
  int scale = 0;
  Precision precision = Precision::bf16;
  int threads = 0;
  TokenOrder order;
};

PipelineOptions options_of(const Settings& settings, Precision precision, int threads) {
  PipelineOptions options;
  options.device = settings.device;
  options.precision = precision;
  options.threads = threads;
  return options;
}

std::string command_of(const Settings& settings, const Case& of) {
  return fmt::format(
      "sparvar bench attention --device {} --attention {} --token-order {} --scale {} --dtype {} --threads {}{} "
      "--batch {} "
      "--heads {} --dim {} -r {}",
      settings.device, shell_word(of.plan), name_of(of.order), of.scale, name_of(of.precision), of.threads,
      settings.geometry.empty() ? "" : " --geometry " + shell_word(settings.geometry), settings.batch, settings.heads,
      settings.dim, settings.grid.repeat);
}

/// Those of the geometry, or a square 1M picture.
ScaleSchedule schedule_of(Settings& settings) {
  if (settings.geometry.empty()) return *schedule_1m(1.0);
  const ModelConfig config = geometry(settings.geometry);
  settings.heads = config.transformer.num_heads;
  settings.dim = config.transformer.head_dim();
  return config.schedule;
}

nlohmann::ordered_json row_of(const Settings& settings, const Case& of, const AttentionTime& time,
                              const Ceilings& ceilings, const std::string& backend) {
  const auto percent = [](double part, double whole) { return 100 * part / whole; };
  nlohmann::ordered_json row = {{"attention", of.plan},
                                {"scale", of.scale},
                                {"queries", time.queries},
                                {"keys", time.keys},
                                {"token_order", name_of(of.order)},
                                {"dtype", name_of(of.precision)},
                                {"threads", of.threads},
                                {"ms", time.seconds * 1e3},
                                {"against_dense", nullptr},
                                {"pairs_percent", 100 * time.share},
                                {"gflops", time.flops / time.seconds * 1e-9},
                                {"percent_of_product_rate", percent(time.flops / time.seconds, ceilings.flops)},
                                {"gb_s", time.bytes / time.seconds * 1e-9},
                                {"percent_of_floor", percent(time.floor(ceilings), time.seconds)},
                                {"kernel_ms", nullptr},
                                {"kernel_keys", nullptr},
                                {"kernel_gflops", nullptr},
                                {"kernel_percent_of_floor", nullptr},
                                {"kernel_error", nullptr},
                                {"product_tflops", ceilings.flops * 1e-12},
                                {"copy_gb_s", ceilings.bytes * 1e-9},
                                {"backend", backend},
                                {"command", command_of(settings, of)}};
  if (!time.kernel) return row;
  row["kernel_ms"] = time.kernel->seconds * 1e3;
  row["kernel_keys"] = time.kernel->keys;
  row["kernel_gflops"] = time.kernel->flops / time.kernel->seconds * 1e-9;
  row["kernel_percent_of_floor"] = percent(time.kernel_floor(ceilings), time.kernel->seconds);
  row["kernel_error"] = time.kernel->error;
  return row;
}

/// Rows of one device: its plans at every scale.
class AttentionBench {
 public:
  AttentionBench(const Settings& settings, ScaleSchedule schedule)
      : settings_(settings), schedule_(std::move(schedule)) {}

  void measure(Precision precision, int threads) {
    const Device device = open_device(options_of(settings_, precision, threads));
    const Ceilings ceilings = measure_ceilings(*device.backend);
    for (const int scale : settings_.scales)
      for (const TokenOrder& order : settings_.orders)
        for (const std::string& plan : settings_.plans)
          add(*device.backend, {plan, scale, precision, device.gpu ? 1 : threads, order}, ceilings);
  }
  const BenchTable& table() const { return table_; }

 private:
  void add(Backend& backend, const Case& of, const Ceilings& ceilings) {
    tell(settings_.grid, command_of(settings_, of));
    const AttentionTime time = measure_attention(backend,
                                                 {schedule_, plan_of(of.plan, 1, static_cast<int>(schedule_.size())),
                                                  of.scale, settings_.batch, settings_.heads, settings_.dim, of.order},
                                                 settings_.grid.repeat);
    nlohmann::ordered_json row = row_of(settings_, of, time, ceilings, backend.describe());
    row["against_dense"] = against_dense(table_, row, {"scale", "token_order", "dtype", "threads"}, "ms");
    table_.add(std::move(row));
  }

  const Settings& settings_;
  ScaleSchedule schedule_;
  BenchTable table_{
      fmt::format("Attention of one layer, batch {}, {} heads of {}: medians of warm calls. ms: all from q, k, v to "
                  "the output, keys "
                  "chosen in it; kernel: attention to the lists alone, its error against double precision; floor: the "
                  "larger of the "
                  "arithmetic at the rate of a large product and of q, k, v and the output at the rate of a copy",
                  settings_.batch, settings_.heads, settings_.dim)};
};

void bench(Settings& settings) {
  ScaleSchedule schedule = schedule_of(settings);
  const int last = static_cast<int>(schedule.size()) - 1;
  if (settings.scales.empty()) settings.scales = {last};
  for (const int scale : settings.scales)
    if (scale > last) throw Error(ErrorKind::usage, fmt::format("--scale {}: the scales are 0 to {}", scale, last));
  const bool gpu = open_device(options_of(settings, settings.grid.precisions.front(), 0), true).gpu;
  AttentionBench bench(settings, std::move(schedule));
  for (const Precision precision : settings.grid.precisions)
    for (const int threads : gpu ? std::vector<int>{0} : threads_of(settings.grid)) bench.measure(precision, threads);
  print(bench.table().to_string(settings.grid.format));
}

}  // namespace

void add_bench_attention(CLI::App& group, Action& chosen) {
  CLI::App* command = group.add_subcommand("attention", "Times attention at a scale");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  add_plans(*command, "--attention", settings->plans, "Attention plans, presets and JSON files (dense,csla,sparvar)");
  add_integers(*command, "--scale", settings->scales, {0, 63}, "Scales, counted from 0, one or a list (the last)");
  command->add_option("--device", settings->device, kDeviceHelp)->type_name("NAME");
  CLI::Option* geometry =
      command->add_option("--geometry", settings->geometry,
                          "Scales and heads of infinity-8b, infinity-2b, infinity-125m or FILE.json "
                          "(a square picture of 1M)");
  geometry->type_name("NAME");
  add_number(*command, "--batch", settings->batch, Range<int>{1, 64}, "Pictures and their unconditional halves (2)");
  add_number(*command, "--heads", settings->heads, Range<int>{1, 256}, "Heads (4)")->excludes(geometry);
  add_number(*command, "--dim", settings->dim, Range<int>{8, 256}, "Channels of a head (128)")->excludes(geometry);
  add_token_orders(*command, settings->orders);
  add_bench_grid(*command, settings->grid);
  command->callback([settings, &chosen] { chosen = [settings] { bench(*settings); }; });
}

}  // namespace sparvar::cli
