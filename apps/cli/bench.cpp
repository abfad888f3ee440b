// sparvar bench: what a picture and its parts cost on this machine.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench_grid.h"
#include "commands.h"
#include "console.h"
#include "device_flag.h"
#include "machine.h"
#include "pipeline/device.h"
#include "pipeline/measure.h"
#include "plan_source.h"
#include "progress.h"
#include "report.h"
#include "weights/geometry.h"

namespace sparvar::cli {
namespace {

struct Settings {
  std::string geometry, model;
  bool random_weights = false;
  std::string device = "auto";
  std::vector<std::string> plans = {"dense"};
  std::vector<int> batches = {1};
  int text_tokens = 40;
  std::string prompt = "grinning face, noto style";
  BenchGrid grid;
};

/// One point of the grid.
struct Point {
  std::string plan;
  Precision precision = Precision::bf16;
  int threads = 0;
  int batch = 1;
};

double gib(std::int64_t bytes) { return static_cast<double>(bytes) / (1LL << 30); }

/// Share of the time that the linear layers alone would take at the rate of a large product.
double share_of_ceiling(const Measurement& m) {
  double scales = 0;
  for (const ScaleTiming& scale : m.scales) scales += scale.seconds;
  return m.linear_flops / m.product_rate / scales;
}

nlohmann::ordered_json to_json(const MeasureOptions& options, const Measurement& m) {
  nlohmann::ordered_json scales = nlohmann::ordered_json::array();
  for (const ScaleTiming& scale : m.scales)
    scales.push_back({{"grid", {scale.grid.h, scale.grid.w}}, {"seconds", scale.seconds}});
  nlohmann::ordered_json products = nlohmann::ordered_json::array();
  for (const ProductTime& p : m.products)
    products.push_back({{"rows", p.rows}, {"in", p.in}, {"out", p.out}, {"seconds", p.seconds}});
  return {{"geometry", options.geometry},
          {"attention", options.plan.name},
          {"dtype", name_of(options.pipeline.precision)},
          {"batch", options.batch},
          {"repeat", options.repeat},
          {"text_tokens", options.text_tokens},
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

std::string to_text(const MeasureOptions& options, const Measurement& m) {
  std::string out =
      fmt::format("{}, {:.2f} billion random parameters, batch {}, attention {}\non {}\n\n", options.geometry,
                  static_cast<double>(m.parameters) * 1e-9, options.batch, options.plan.name, m.backend);
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
  out += fmt::format("total    {:8.4f} s, median of {}; the first took {:.2f} s\n", m.total, options.repeat, m.first);
  out += fmt::format(
      "linear layers {:.1f} TFLOP; a large product runs at {:.0f} TFLOP/s, so they need {:.0f} % of the "
      "scales' time\n",
      m.linear_flops * 1e-12, m.product_rate * 1e-12, 100 * share_of_ceiling(m));
  if (m.memory.total > 0)
    out += fmt::format("GPU memory {:.2f} GiB: planned {:.2f} weights, {:.2f} cache and activations\n",
                       gib(m.device_bytes), gib(m.memory.weights), gib(m.memory.working));
  return out;
}

double sum_of(const std::vector<ScaleTiming>& scales, double ScaleTiming::*part) {
  double sum = 0;
  for (const ScaleTiming& scale : scales) sum += scale.*part;
  return sum;
}

/// Shows the bytes of loading; the bar is gone when they are all there.
std::function<void(const Progress&)> load_bar(bool quiet) {
  return [display = std::make_shared<ProgressDisplay>(quiet)](const Progress& progress) {
    display->show(progress);
    if (progress.bytes_done == progress.bytes_total) display->clear();
  };
}

PipelineOptions pipeline_of(const Settings& settings, const Point& point) {
  return {settings.model, point.precision, point.threads, settings.device, load_bar(settings.grid.quiet)};
}

std::string command_of(const Settings& settings, const Point& point) {
  std::string source = settings.model.empty() ? "" : " --model " + shell_word(settings.model);
  if (settings.geometry.empty()) source += " --prompt " + shell_word(settings.prompt);
  if (!settings.geometry.empty())
    source = fmt::format(" --geometry {} --random-weights --text-tokens {}", settings.geometry, settings.text_tokens);
  return fmt::format("sparvar bench model{} --device {} --attention {} --dtype {} --threads {} --batch {} -r {}",
                     source, settings.device, point.plan, name_of(point.precision), point.threads, point.batch,
                     settings.grid.repeat);
}

MeasureOptions measure_options(const Settings& settings, const Point& point) {
  MeasureOptions options;
  options.geometry = settings.geometry;
  options.pipeline = pipeline_of(settings, point);
  const ModelConfig config = geometry(settings.geometry);
  options.plan = plan_of(point.plan, config.transformer.depth, static_cast<int>(config.schedule.size()));
  options.batch = point.batch;
  options.repeat = settings.grid.repeat;
  options.text_tokens = settings.text_tokens;
  if (!settings.grid.quiet) options.on_progress = [](const std::string& what) { fmt::print(stderr, "{}\n", what); };
  options.on_load = load_bar(settings.grid.quiet);
  return options;
}

/// One row of the table; the model of the point before is used again where only the plan or the batch is another.
class ModelBench {
 public:
  explicit ModelBench(const Settings& settings) : settings_(settings) {}

  void measure(const Point& point) {
    tell(settings_.grid, command_of(settings_, point));
    PictureTimes times;
    std::string backend;
    if (settings_.geometry.empty()) {
      Pipeline& pipeline = load(point);
      times = measure_pictures(pipeline, generation(point, pipeline.info()), settings_.grid.repeat);
      backend = pipeline.info().backend;
    } else {
      const Measurement m = measure_model(measure_options(settings_, point));
      times = {m.first, m.text, m.decode, m.total, m.scales};
      backend = m.backend;
    }
    nlohmann::ordered_json row = {{"attention", point.plan},
                                  {"dtype", name_of(point.precision)},
                                  {"threads", point.threads},
                                  {"batch", point.batch},
                                  {"total_s", times.total},
                                  {"against_dense", nullptr},
                                  {"first_s", times.first},
                                  {"text_s", times.text},
                                  {"scales_s", sum_of(times.scales, &ScaleTiming::seconds)},
                                  {"attention_s", sum_of(times.scales, &ScaleTiming::attention_seconds)},
                                  {"decode_s", times.decode},
                                  {"backend", backend},
                                  {"command", command_of(settings_, point)}};
    row["against_dense"] = against_dense(table_, row, {"dtype", "threads", "batch"}, "total_s");
    table_.add(std::move(row));
  }
  const BenchTable& table() const { return table_; }

 private:
  Pipeline& load(const Point& point) {
    if (!pipeline_ || point.precision != loaded_.precision || point.threads != loaded_.threads) {
      pipeline_.reset();  // before the next takes memory
      pipeline_.emplace(Pipeline::load(pipeline_of(settings_, point)));
      loaded_ = point;
    }
    return *pipeline_;
  }

  GenerateOptions generation(const Point& point, const ModelInfo& model) const {
    GenerateOptions options;
    options.prompts = {settings_.prompt};
    options.pictures_per_prompt = options.batch = point.batch;
    options.plan = plan_of(point.plan, model.layers, static_cast<int>(model.schedule.size()));
    return options;
  }

  const Settings& settings_;
  BenchTable table_{"Whole pictures, medians of warm runs in seconds; first_s: the cold run before them"};
  std::optional<Pipeline> pipeline_;
  Point loaded_;
};

std::vector<Point> points_of(const Settings& settings) {
  std::vector<Point> points;
  for (const Precision precision : settings.grid.precisions)
    for (const int threads : threads_of(settings.grid))
      for (const int batch : settings.batches)
        for (const std::string& plan : settings.plans) points.push_back({plan, precision, threads, batch});
  return points;
}

void bench(const Settings& settings) {
  if (!settings.geometry.empty() && !settings.random_weights)
    throw Error(ErrorKind::usage, "bench model: add --random-weights (a geometry has no weights of its own)");
  if (settings.random_weights && settings.geometry.empty())
    throw Error(ErrorKind::usage, "bench model: --random-weights needs a --geometry");
  if (!settings.geometry.empty() && !settings.model.empty())
    throw Error(ErrorKind::usage, "bench model: --geometry and --model exclude each other");
  const std::vector<Point> points = points_of(settings);
  (void)open_device(pipeline_of(settings, points.front()), true);  // a device that is not there is all there is to say
  const TableFormat format = settings.grid.format;
  // One geometry alone is reported scale by scale.
  if (!settings.geometry.empty() && points.size() == 1 &&
      (format == TableFormat::text || format == TableFormat::json)) {
    const MeasureOptions options = measure_options(settings, points.front());
    const Measurement result = measure_model(options);
    nlohmann::ordered_json json = to_json(options, result);
    json["commit"] = commit();
    json["command"] = command_of(settings, points.front());
    print(format == TableFormat::json ? dump(json) : to_text(options, result));
    return;
  }
  ModelBench model(settings);
  for (const Point& point : points) model.measure(point);
  print(model.table().to_string(format));
}

void add_bench_model(CLI::App& group, Action& chosen) {
  CLI::App* command = group.add_subcommand("model", "Times whole pictures, of a model or of a geometry");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  add_plans(*command, "--attention", settings->plans, "Attention plans, presets and JSON files (dense)");
  command->add_option("--model", settings->model, "Folder of the model (the bundled one)")->type_name("DIR");
  command
      ->add_option("--geometry", settings->geometry,
                   "Instead of a model: infinity-8b, infinity-2b, infinity-125m or FILE.json")
      ->type_name("NAME");
  command->add_flag("--random-weights", settings->random_weights, "Random numbers instead of a model's files");
  command->add_option("--device", settings->device, kDeviceHelp)->type_name("NAME");
  add_integers(*command, "--batch", settings->batches, {1, 64}, "Pictures at once, one number or a list (1)");
  add_number(*command, "--text-tokens", settings->text_tokens, Range<int>{1, 512}, "Of each prompt of a geometry (40)");
  command->add_option("--prompt", settings->prompt, "What a model draws (grinning face, noto style)")
      ->type_name("TEXT");
  add_bench_grid(*command, settings->grid);
  command->callback([settings, &chosen] {
    chosen = [settings] { bench(*settings); };
  });
}

}  // namespace

void add_bench(CLI::App& program, Action& chosen) {
  CLI::App* group = program.add_subcommand("bench", "Measures this machine");
  group->require_subcommand(0, 1);
  group->allow_extras();
  add_bench_attention(*group, chosen);
  add_bench_model(*group, chosen);
  add_bench_tokenizer(*group, chosen);
}

}  // namespace sparvar::cli
