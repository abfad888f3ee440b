// sparvar bench: what a picture and its parts cost on this machine.
#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>

#include "bench_grid.h"
#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "machine.h"
#include "pipeline/device.h"
#include "pipeline/measure.h"
#include "plan_source.h"
#include "progress.h"
#include "report.h"
#include "weights/geometry.h"

namespace sparvar::cli {
namespace {

constexpr int kAllScales = -1;  // of --uncond-until

struct Settings {
  std::string geometry, model;
  bool random_weights = false;
  std::string device = "auto";
  std::vector<std::string> plans = {"dense"};
  std::vector<WeightFormat> weights = {WeightFormat::plain};
  std::vector<int> skip_scales = {0};
  std::vector<int> uncond_until = {kAllScales};
  std::vector<int> batches = {1};
  std::vector<TokenOrder> orders = {{}};
  int text_tokens = 40;
  std::string prompt = "grinning face, noto style";
  BenchGrid grid;
};

/// One point of the grid.
struct Point {
  Precision precision = Precision::bf16;
  WeightFormat weights = WeightFormat::plain;
  int threads = 0;
  int batch = 1;
  int skip_scales = 0;
  int uncond_until = kAllScales;
  TokenOrder order;
  std::string plan;

  bool same_model(const Point& other) const {
    return precision == other.precision && weights == other.weights && threads == other.threads;
  }
  std::string guidance() const { return uncond_until == kAllScales ? "all" : std::to_string(uncond_until); }
};

PipelineOptions pipeline_of(const Settings& settings, const Point& point) {
  PipelineOptions options;
  options.model_dir = settings.model;
  options.precision = point.precision;
  options.threads = point.threads;
  options.device = settings.device;
  options.weights = point.weights;
  return options;
}

std::string command_of(const Settings& settings, const Point& point) {
  std::string source = settings.model.empty() ? "" : " --model " + shell_word(settings.model);
  if (settings.geometry.empty()) source += " --prompt " + shell_word(settings.prompt);
  if (!settings.geometry.empty())
    source = fmt::format(" --geometry {} --random-weights --text-tokens {}", settings.geometry, settings.text_tokens);
  std::string drawn;
  if (point.weights == WeightFormat::fp8) drawn += " --weights fp8";
  if (point.skip_scales > 0) drawn += fmt::format(" --skip-scales {}", point.skip_scales);
  if (point.uncond_until != kAllScales) drawn += fmt::format(" --uncond-until {}", point.uncond_until);
  if (point.order != TokenOrder()) drawn += " --token-order " + name_of(point.order);
  return fmt::format("sparvar bench model{} --device {} --attention {} --dtype {}{} --threads {} --batch {} -r {}",
                     source, settings.device, point.plan, name_of(point.precision), drawn, point.threads, point.batch,
                     settings.grid.repeat);
}

double gib(std::int64_t bytes) { return static_cast<double>(bytes) / (1LL << 30); }

/// Share of the time that the linear layers alone would take at the rate of a large product.
double share_of_ceiling(const Measurement& m, double rate) {
  double scales = 0;
  for (const ScaleTiming& scale : m.scales) scales += scale.seconds;
  return m.linear_flops / rate / scales;
}

nlohmann::ordered_json to_json(const Settings& settings, const Point& point, const Measurement& m, double rate) {
  nlohmann::ordered_json scales = nlohmann::ordered_json::array();
  for (const ScaleTiming& scale : m.scales)
    scales.push_back({{"grid", {scale.grid.h, scale.grid.w}}, {"seconds", scale.seconds}});
  nlohmann::ordered_json products = nlohmann::ordered_json::array();
  for (const ProductTime& p : m.products)
    products.push_back({{"rows", p.rows}, {"in", p.in}, {"out", p.out}, {"seconds", p.seconds}});
  return {{"geometry", settings.geometry},
          {"attention", point.plan},
          {"dtype", name_of(point.precision)},
          {"weights", name_of(point.weights, point.precision)},
          {"batch", point.batch},
          {"skip_scales", point.skip_scales},
          {"uncond_until", point.guidance()},
          {"token_order", name_of(point.order)},
          {"repeat", settings.grid.repeat},
          {"text_tokens", settings.text_tokens},
          {"backend", m.backend},
          {"parameters", m.parameters},
          {"scales", scales},
          {"text_seconds", m.text},
          {"decode_seconds", m.decode},
          {"total_seconds", m.total},
          {"first_seconds", m.first},
          {"linear_tflop", m.linear_flops * 1e-12},
          {"product_tflops", rate * 1e-12},
          {"share_of_product_rate", share_of_ceiling(m, rate)},
          {"products", products},
          {"planned_weights_bytes", m.memory.weights},
          {"planned_working_bytes", m.memory.working},
          {"device_bytes", m.device_bytes},
          {"host_peak_bytes", peak_memory_bytes()},
          {"commit", commit()},
          {"command", command_of(settings, point)}};
}

std::string to_text(const Settings& settings, const Point& point, const Measurement& m, double rate) {
  std::string out = fmt::format("{}, {:.2f} billion random parameters, batch {}, attention {}, weights {}\non {}\n\n",
                                settings.geometry, static_cast<double>(m.parameters) * 1e-9, point.batch, point.plan,
                                name_of(point.weights, point.precision), m.backend);
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
  out += fmt::format("total    {:8.4f} s, median of {}; the first took {:.2f} s\n", m.total, settings.grid.repeat,
                     m.first);
  out += fmt::format(
      "linear layers {:.1f} TFLOP; a large product runs at {:.0f} TFLOP/s, so they need {:.0f} % of the "
      "scales' time\n",
      m.linear_flops * 1e-12, rate * 1e-12, 100 * share_of_ceiling(m, rate));
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

MeasureOptions measure_options(const Settings& settings, const Point& point) {
  MeasureOptions options;
  options.geometry = settings.geometry;
  options.pipeline = pipeline_of(settings, point);
  options.text_tokens = settings.text_tokens;
  if (!settings.grid.quiet) options.on_progress = [](const std::string& what) { fmt::print(stderr, "{}\n", what); };
  options.on_load = load_bar(settings.grid.quiet);
  return options;
}

MeasuredRun measured_run(const Settings& settings, const Point& point) {
  const ModelConfig config = geometry(settings.geometry);
  return {.plan = plan_of(point.plan, config.transformer.depth, static_cast<int>(config.schedule.size())),
          .order = point.order,
          .batch = point.batch,
          .skip_scales = point.skip_scales,
          .uncond_until = point.uncond_until,
          .repeat = settings.grid.repeat};
}

/// What a row of the table says of a point.
struct Measured {
  PictureTimes times;
  std::string backend;
  std::int64_t gpu_bytes = 0;  // 0: not known
  std::string refused;         // why there is nothing else
};

/// Rows of a table; the model of the point before is used again where it is the same.
class ModelBench {
 public:
  explicit ModelBench(const Settings& settings) : settings_(settings) {}

  void measure(const Point& point) {
    tell(settings_.grid, command_of(settings_, point));
    const Measured measured = try_point(point);
    const auto value = [&](double number) {
      return measured.refused.empty() ? nlohmann::ordered_json(number) : nlohmann::ordered_json();
    };
    const PictureTimes& times = measured.times;
    nlohmann::ordered_json row = {{"attention", point.plan},
                                  {"weights", name_of(point.weights, point.precision)},
                                  {"skip_scales", point.skip_scales},
                                  {"uncond_until", point.guidance()},
                                  {"token_order", name_of(point.order)},
                                  {"dtype", name_of(point.precision)},
                                  {"threads", point.threads},
                                  {"batch", point.batch},
                                  {"total_s", value(times.total)},
                                  {"against_dense", nullptr},
                                  {"first_s", value(times.first)},
                                  {"text_s", value(times.text)},
                                  {"scales_s", value(sum_of(times.scales, &ScaleTiming::seconds))},
                                  {"attention_s", value(sum_of(times.scales, &ScaleTiming::attention_seconds))},
                                  {"decode_s", value(times.decode)},
                                  {"gpu_gib", nullptr},
                                  {"backend", measured.backend},
                                  {"refused", nullptr},
                                  {"command", command_of(settings_, point)}};
    if (measured.gpu_bytes > 0) row["gpu_gib"] = gib(measured.gpu_bytes);
    if (!measured.refused.empty()) row["refused"] = measured.refused;
    row["against_dense"] = against_dense(
        table_, row, {"weights", "skip_scales", "uncond_until", "token_order", "dtype", "threads", "batch"}, "total_s");
    table_.add(std::move(row));
  }
  /// Throws what the first point was refused for where no point was measured.
  const BenchTable& table() const {
    if (!any_ && first_refusal_) throw *first_refusal_;
    return table_;
  }

 private:
  /// A plan that the device does not run, or memory that it has not, is a line of the table and not the end of it.
  Measured try_point(const Point& point) {
    try {
      const Measured measured = settings_.geometry.empty() ? measure_pipeline(point) : measure_geometry(point);
      any_ = true;
      return measured;
    } catch (const Error& error) {
      if (error.kind() != ErrorKind::usage && !requiring_) throw;
      if (!first_refusal_) first_refusal_ = error;
      tell(settings_.grid, std::string("refused: ") + error.what());
      return {.times = {}, .backend = {}, .gpu_bytes = 0, .refused = error.what()};
    }
  }

  Measured measure_pipeline(const Point& point) {
    requiring_ = false;
    if (!pipeline_ || !point.same_model(loaded_)) {
      pipeline_.reset();  // before the next takes memory
      pipeline_.emplace(Pipeline::load(pipeline_of(settings_, point)));
      loaded_ = point;
    }
    const ModelInfo& model = pipeline_->info();
    GenerateOptions options;
    options.prompts = {settings_.prompt};
    options.pictures_per_prompt = options.batch = point.batch;
    options.skip_scales = point.skip_scales;
    options.uncond_until = point.uncond_until;
    options.plan = plan_of(point.plan, model.layers, static_cast<int>(model.schedule.size()));
    return {measure_pictures(*pipeline_, options, settings_.grid.repeat), model.backend, 0, {}};
  }

  Measured measure_geometry(const Point& point) {
    requiring_ = true;
    if (!model_ || !point.same_model(loaded_)) {
      model_.reset();
      model_ = std::make_unique<MeasuredModel>(measure_options(settings_, point));
      loaded_ = point;
    }
    const MeasuredRun run = measured_run(settings_, point);
    model_->require(run);
    requiring_ = false;
    const Measurement m = model_->measure(run);
    return {{m.first, m.text, m.decode, m.total, m.scales}, m.backend, m.device_bytes, {}};
  }

  const Settings& settings_;
  BenchTable table_{"Whole pictures, medians of warm runs in seconds; first_s: the cold run before them"};
  std::optional<Pipeline> pipeline_;
  std::unique_ptr<MeasuredModel> model_;
  Point loaded_;
  bool requiring_ = false;  // nothing but what a point needs is being found out
  bool any_ = false;
  std::optional<Error> first_refusal_;
};

/// Those of one model beside each other.
std::vector<Point> points_of(const Settings& settings) {
  std::vector<Point> points;
  for (const Precision precision : settings.grid.precisions)
    for (const WeightFormat weights : settings.weights)
      for (const int threads : threads_of(settings.grid))
        for (const int batch : settings.batches)
          for (const int skipped : settings.skip_scales)
            for (const int until : settings.uncond_until)
              for (const TokenOrder& order : settings.orders)
                for (const std::string& plan : settings.plans)
                  points.push_back({precision, weights, threads, batch, skipped, until, order, plan});
  return points;
}

void bench(const Settings& settings) {
  if (!settings.geometry.empty() && !settings.random_weights)
    throw Error(ErrorKind::usage, "bench model: add --random-weights (a geometry has no weights of its own)");
  if (settings.random_weights && settings.geometry.empty())
    throw Error(ErrorKind::usage, "bench model: --random-weights needs a --geometry");
  if (!settings.geometry.empty() && !settings.model.empty())
    throw Error(ErrorKind::usage, "bench model: --geometry and --model exclude each other");
  if (settings.geometry.empty() && settings.orders != std::vector<TokenOrder>{{}})
    throw Error(ErrorKind::usage, "bench model: --token-order needs a --geometry");
  const std::vector<Point> points = points_of(settings);
  (void)open_device(pipeline_of(settings, points.front()), true);  // a device that is not there is all there is to say
  const TableFormat format = settings.grid.format;
  // One geometry alone is reported scale by scale.
  if (!settings.geometry.empty() && points.size() == 1 &&
      (format == TableFormat::text || format == TableFormat::json)) {
    const Point& point = points.front();
    MeasuredModel model(measure_options(settings, point));
    const Measurement result = model.measure(measured_run(settings, point));
    const double rate = model.rate();
    print(format == TableFormat::json ? dump(to_json(settings, point, result, rate))
                                      : to_text(settings, point, result, rate));
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
  command
      ->add_option_function<std::string>(
          "--weights",
          [settings](const std::string& text) {
            settings->weights.clear();
            for (const std::string& name : comma_list("--weights", text))
              settings->weights.push_back(parse_weights(name));
          },
          "Of the transformer's blocks: bf16, as --dtype says, fp8 on Hopper GPUs, or both as a list (bf16)")
      ->type_name("bf16|fp8[,...]");
  add_integers(*command, "--skip-scales", settings->skip_scales, {0, 2},
               "Scales left out at the end, one number or a list (0)");
  command
      ->add_option_function<std::string>(
          "--uncond-until",
          [settings](const std::string& text) {
            settings->uncond_until.clear();
            for (const std::string& part : comma_list("--uncond-until", text))
              settings->uncond_until.push_back(part == "all" ? kAllScales
                                                             : parse_number("--uncond-until", part, Range<int>{0, 64}));
          },
          "Guidance ends at scale N, one number or a list; all: it does not end (all)")
      ->type_name("N[,N...]");
  add_integers(*command, "--batch", settings->batches, {1, 64}, "Pictures at once, one number or a list (1)");
  add_number(*command, "--text-tokens", settings->text_tokens, Range<int>{1, 512}, "Of each prompt of a geometry (40)");
  command->add_option("--prompt", settings->prompt, "What a model draws (grinning face, noto style)")
      ->type_name("TEXT");
  add_token_orders(*command, settings->orders);
  add_bench_grid(*command, settings->grid);
  command->callback([settings, &chosen] { chosen = [settings] { bench(*settings); }; });
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
