// sparvar bench: what a picture costs on this machine.
#include <fmt/format.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "commands.h"
#include "console.h"
#include "device_flag.h"
#include "flags.h"
#include "machine.h"
#include "pipeline/measure.h"
#include "report.h"

namespace sparvar::cli {
namespace {

struct Settings {
  MeasureOptions measure;
  std::string attention = "dense";
  bool random_weights = false;
  bool json = false;
  bool quiet = false;
};

double gib(std::int64_t bytes) { return static_cast<double>(bytes) / (1LL << 30); }

/// Share of the time that the linear layers alone would take at the rate of a large product.
double share_of_ceiling(const Measurement& m) {
  double scales = 0;
  for (const ScaleTiming& scale : m.scales) scales += scale.seconds;
  return m.linear_flops / m.product_rate / scales;
}

nlohmann::ordered_json to_json(const Settings& settings, const Measurement& m) {
  nlohmann::ordered_json scales = nlohmann::ordered_json::array();
  for (const ScaleTiming& scale : m.scales)
    scales.push_back({{"grid", {scale.grid.h, scale.grid.w}}, {"seconds", scale.seconds}});
  nlohmann::ordered_json products = nlohmann::ordered_json::array();
  for (const ProductTime& p : m.products)
    products.push_back({{"rows", p.rows}, {"in", p.in}, {"out", p.out}, {"seconds", p.seconds}});
  return {{"geometry", settings.measure.geometry},
          {"attention", settings.attention},
          {"dtype", name_of(settings.measure.pipeline.precision)},
          {"batch", settings.measure.batch},
          {"repeat", settings.measure.repeat},
          {"text_tokens", settings.measure.text_tokens},
          {"backend", m.backend},
          {"parameters", m.parameters},
          {"scales", scales},
          {"text_seconds", m.text},
          {"decode_seconds", m.decode},
          {"total_seconds", m.total},
          {"first_seconds", m.first},
          {"linear_tflop", m.linear_flops * 1e-12},
          {"product_tflops", m.product_rate * 1e-12},
          {"share_of_product_rate", share_of_ceiling(m)},
          {"products", products},
          {"planned_weights_bytes", m.memory.weights},
          {"planned_working_bytes", m.memory.working},
          {"device_bytes", m.device_bytes},
          {"host_peak_bytes", peak_memory_bytes()}};
}

std::string to_text(const Settings& settings, const Measurement& m) {
  std::string out =
      fmt::format("{}, {:.2f} billion random parameters, batch {}, attention {}\non {}\n\n", settings.measure.geometry,
                  static_cast<double>(m.parameters) * 1e-9, settings.measure.batch, settings.attention, m.backend);
  out += "scale   tokens   seconds\n";
  double scales = 0;
  for (std::size_t k = 0; k < m.scales.size(); ++k) {
    const ScaleTiming& scale = m.scales[k];
    out += fmt::format("{:5}  {:>7}  {:8.4f}\n", k, fmt::format("{}x{}", scale.grid.h, scale.grid.w), scale.seconds);
    scales += scale.seconds;
  }
  out += fmt::format("text     {:8.4f} s (states to keys and values; no text encoder)\n", m.text);
  out += fmt::format("scales   {:8.4f} s\n", scales);
  out += fmt::format("decode   {:8.4f} s\n", m.decode);
  out += fmt::format("total    {:8.4f} s, median of {}; the first took {:.2f} s\n", m.total, settings.measure.repeat,
                     m.first);
  out += fmt::format(
      "linear layers {:.1f} TFLOP; a large product runs at {:.0f} TFLOP/s, so they need {:.0f} % of the "
      "scales' time\n",
      m.linear_flops * 1e-12, m.product_rate * 1e-12, 100 * share_of_ceiling(m));
  if (m.memory.total > 0)
    out += fmt::format("GPU memory {:.2f} GiB: planned {:.2f} weights, {:.2f} cache and activations\n",
                       gib(m.device_bytes), gib(m.memory.weights), gib(m.memory.working));
  return out;
}

void bench(Settings& settings) {
  if (!settings.random_weights)
    throw Error(ErrorKind::usage, "bench model: add --random-weights (a geometry has no weights of its own)");
  MeasureOptions& measure = settings.measure;
  if (!settings.quiet) measure.on_progress = [](const std::string& what) { fmt::print(stderr, "{}\n", what); };
  measure.plan = AttentionPlan::preset(settings.attention, 1, 13);
  const Measurement result = measure_model(measure);
  print(settings.json ? dump(to_json(settings, result)) : to_text(settings, result));
}

}  // namespace

void add_bench(CLI::App& program, Action& chosen) {
  CLI::App* group = program.add_subcommand("bench", "Measures this machine");
  group->require_subcommand(1);
  CLI::App* command = group->add_subcommand("model", "Times a model of a geometry, scale by scale");
  const auto settings = std::make_shared<Settings>();
  command->add_option("--geometry", settings->measure.geometry, "infinity-8b, infinity-2b, infinity-125m or FILE.json")
      ->type_name("NAME")
      ->required();
  command->add_flag("--random-weights", settings->random_weights, "Random numbers instead of a model's files");
  add_device(*command, settings->measure.pipeline);
  add_precision(*command, settings->measure.pipeline);
  add_number(*command, "--batch", settings->measure.batch, Range<int>{1, 64}, "Pictures at once (1)");
  add_number(*command, "-r,--repeat", settings->measure.repeat, Range<int>{1, 1000}, "Runs; the median counts (5)");
  add_number(*command, "--text-tokens", settings->measure.text_tokens, Range<int>{1, 512}, "Of each prompt (40)");
  add_number(*command, "--threads", settings->measure.pipeline.threads, Range<int>{1, 1024}, "CPU threads (all cores)");
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No progress");
  command->callback([settings, &chosen] { chosen = [settings] { bench(*settings); }; });
}

}  // namespace sparvar::cli
