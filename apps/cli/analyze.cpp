// sparvar analyze: sinks, locality and similarity across scales of a model's attention, as figures and heat maps.
#include "pipeline/analyze.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

#include "bench_grid.h"
#include "commands.h"
#include "common_flags.h"
#include "console.h"
#include "flags.h"
#include "image/atomic_file.h"
#include "interrupt.h"
#include "output.h"
#include "pipeline/heat_map.h"
#include "pipeline/mask_picture.h"
#include "progress.h"
#include "prompts.h"
#include "report.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

constexpr int usual_scales = 3;  // the last ones, where presets are sparse
constexpr int map_side = 1024;   // of a heat map, in pixels
constexpr int local_scales = 3;  // key scales whose distances are reported: the own one and those before
constexpr std::size_t most_prompts = 1000;

struct Settings {
  std::vector<std::string> prompts;
  std::string file;
  std::vector<int> scales;  // empty: the last three
  int side = 16;
  std::uint64_t seed = 0;
  std::string folder;
  PipelineOptions pipeline;
  bool json = false;
  bool quiet = false;
};

/// Six decimals are more than a sample knows.
Json number(double value) { return std::isfinite(value) ? Json(std::round(value * 1e6) / 1e6) : Json(); }

Json numbers(const auto& values) {
  Json out = Json::array();
  for (const double value : values) out.push_back(number(value));
  return out;
}

Json distances_json(const HeadSums& head, int k) {
  Json out = Json::array();
  for (int j = std::max(0, k + 1 - local_scales); j <= k; ++j) {
    const Distances& at = head.distances[static_cast<std::size_t>(j)];
    std::vector<double> weight, keys;
    for (int bin = 0; bin < kDistanceBins; ++bin) {
      weight.push_back(at.weight[static_cast<std::size_t>(bin)] / head.queries);
      keys.push_back(at.keys[static_cast<std::size_t>(bin)] / head.queries);
    }
    out.push_back({{"key_scale", j},
                   {"mean", number(head.mean_distance(j))},
                   {"weight", numbers(weight)},
                   {"keys", numbers(keys)}});
  }
  return out;
}

Json head_json(const HeadSums& head, int k, int sink_scales) {
  std::vector<double> mass, similarity;
  for (int j = 0; j <= k; ++j) {
    mass.push_back(head.mass_share(j));
    similarity.push_back(head.similarity[static_cast<std::size_t>(j)].value());
  }
  return {{"sinks", number(head.sinks(sink_scales))},          {"windows", number(head.window_share())},
          {"similarity_mean", number(head.mean_similarity())}, {"mass_by_key_scale", numbers(mass)},
          {"similarity_by_key_scale", numbers(similarity)},    {"distances", distances_json(head, k)}};
}

/// Means over heads.
struct Row {
  double sinks = 0, windows = 0, own = 0, distance = 0, similarity = 0;
};

Row mean_of(const std::vector<HeadSums>& heads, int k, int sink_scales) {
  Row row;
  const auto count = static_cast<double>(heads.size());
  for (const HeadSums& head : heads) {
    row.sinks += head.sinks(sink_scales) / count;
    row.windows += head.window_share() / count;
    row.own += head.mass_share(k) / count;
    row.distance += head.mean_distance(k) / count;
    row.similarity += head.mean_similarity() / count;
  }
  return row;
}

/// Means over the scales that were looked at, by layer.
std::map<int, Row> rows_by_layer(const AttentionAnalyzer& analyzer) {
  const AnalyzerOptions& options = analyzer.options();
  std::map<int, Row> rows;
  const auto count = static_cast<double>(options.scales.size());
  for (const auto& [at, heads] : analyzer.sums()) {
    const Row row = mean_of(heads, at.second, options.windows.sink_scales);
    Row& sum = rows[at.first];
    sum.sinks += row.sinks / count;
    sum.windows += row.windows / count;
    sum.own += row.own / count;
    sum.distance += row.distance / count;
    sum.similarity += row.similarity / count;
  }
  return rows;
}

/// Mean over heads of the correlation of A(k, i) with A(k-1, i-1) resized, by i; null where no head has one.
Json similarities_json(const std::vector<HeadSums>& heads) {
  std::vector<double> means;
  for (std::size_t i = 0; i < heads.front().similarity.size(); ++i) {
    double sum = 0, count = 0;
    for (const HeadSums& head : heads)
      if (const double value = head.similarity[i].value(); std::isfinite(value)) {
        sum += value;
        ++count;
      }
    means.push_back(sum / count);
  }
  return numbers(means);
}

Json row_json(const Row& row) {
  return {{"sinks", number(row.sinks)},
          {"windows", number(row.windows)},
          {"own_scale", number(row.own)},
          {"own_distance", number(row.distance)},
          {"similarity", number(row.similarity)}};
}

Json json_report(const Settings& settings, const ModelInfo& model, const AttentionAnalyzer& analyzer,
                 const std::vector<std::string>& maps) {
  const AnalyzerOptions& options = analyzer.options();
  Json results = Json::array();
  for (const auto& [at, heads] : analyzer.sums()) {
    const auto& [layer, k] = at;
    Json each = Json::array();
    for (const HeadSums& head : heads) each.push_back(head_json(head, k, options.windows.sink_scales));
    Json mean = row_json(mean_of(heads, k, options.windows.sink_scales));
    mean["similarity_by_key_scale"] = similarities_json(heads);
    results.push_back({{"layer", layer},
                       {"scale", k},
                       {"queries", heads.front().queries},
                       {"mean", std::move(mean)},
                       {"heads", std::move(each)}});
  }
  Json layers = Json::array();
  for (const auto& [layer, row] : rows_by_layer(analyzer)) {
    layers.push_back({{"layer", layer}});
    layers.back().update(row_json(row));
  }
  return {{"prompts", settings.prompts},
          {"seed", settings.seed},
          {"dtype", name_of(settings.pipeline.precision)},
          {"scales", options.scales},
          {"queries_along_a_side", options.side},
          {"sink_scales", options.windows.sink_scales},
          {"windows_by_key_scale", options.windows.windows},
          {"layers", std::move(layers)},
          {"results", std::move(results)},
          {"heat_maps", maps},
          {"model", to_json(model)},
          {"machine", machine_json(model)}};
}

constexpr const char* columns = "layer    sinks  windows  own scale  distance  similarity\n";

std::string row_line(int layer, const Row& row) {
  return fmt::format("{:5}  {:5.1f} %  {:5.1f} %    {:5.1f} %  {:8.2f}  {:10.3f}\n", layer, 100 * row.sinks,
                     100 * row.windows, 100 * row.own, row.distance, row.similarity);
}

std::string text_report(const AttentionAnalyzer& analyzer, const std::vector<std::string>& written) {
  std::string out;
  for (const std::string& path : written) out += path + "\n";
  const AnalyzerOptions& options = analyzer.options();
  for (const int k : options.scales) {
    const Grid grid = options.schedule[static_cast<std::size_t>(k)];
    out += fmt::format("\nscale {} ({}x{}), means over heads\n{}", k, grid.h, grid.w, columns);
    for (const auto& [at, heads] : analyzer.sums())
      if (at.second == k) out += row_line(at.first, mean_of(heads, k, options.windows.sink_scales));
  }
  out += fmt::format("\nscales {}, means over scales and heads\n{}", fmt::join(options.scales, ", "), columns);
  for (const auto& [layer, row] : rows_by_layer(analyzer)) out += row_line(layer, row);
  return out + fmt::format(
                   "\nsinks: weight on the first {} scales; windows: inside the published windows on the others; own "
                   "scale:\nweight on it, and how far from the query's place, in tokens; similarity: correlation of "
                   "A(k, i)\nwith A(k-1, i-1) resized, mean over i\n",
                   options.windows.sink_scales);
}

std::vector<int> scales_of(const Settings& settings, int scales) {
  std::vector<int> chosen = settings.scales;
  for (int k = std::max(0, scales - usual_scales); settings.scales.empty() && k < scales; ++k) chosen.push_back(k);
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  return chosen;
}

void run(Settings& settings) {
  if (!settings.file.empty()) {
    if (!settings.prompts.empty())
      throw Error(ErrorKind::usage, "analyze: prompts come from the command line or from --file, not from both");
    settings.prompts = read_prompts(settings.file);
  }
  if (settings.prompts.empty())
    throw Error(ErrorKind::usage, "analyze: no prompt; attention is that of pictures being drawn");
  if (settings.prompts.size() > most_prompts)
    throw Error(ErrorKind::usage,
                fmt::format("analyze: {} prompts; at most {} are drawn", settings.prompts.size(), most_prompts));
  if (!settings.folder.empty()) require_writable_folder(settings.folder, "-o");
  const std::atomic<bool>* cancel = catch_interrupts();
  ProgressDisplay display(settings.quiet);
  Pipeline pipeline = Pipeline::load(settings.pipeline);
  const ModelInfo& model = pipeline.info();
  const int scales = static_cast<int>(model.schedule.size());
  CslaAttention windows = published_csla(scales, CslaAttention::Form::lists);
  windows.centre = CslaAttention::Centre::half_pixel;
  AttentionAnalyzer analyzer({model.schedule, scales_of(settings, scales), settings.side, windows});
  std::vector<std::string> maps;
  GenerateOptions generate;
  generate.seed = settings.seed;
  generate.batch = 1;
  generate.cancel = cancel;
  generate.on_progress = [&display](const Progress& progress) { display.show(progress); };
  generate.on_attention = [&](int layer, int scale, const AttentionArgs& args) {
    analyzer.observe(layer, scale, args);
  };
  for (std::size_t i = 0; i < settings.prompts.size(); ++i) {
    generate.prompts = {settings.prompts[i]};
    generate.first_picture = i;
    analyzer.on_sample = nullptr;
    if (i == 0 && !settings.folder.empty())
      analyzer.on_sample = [&](const SampledAttention& sample) {
        const std::string name = fmt::format("layer-{:02}-scale-{:02}.png", sample.layer, sample.scale);
        maps.push_back((std::filesystem::path(settings.folder) / name).string());
        write_png(maps.back(),
                  heat_map(sample, model.schedule, tokens_per_pixel_for(model.schedule, sample.scale, map_side)),
                  {{"Software", "sparvar " SPARVAR_VERSION}, {"prompt", settings.prompts[i]}});
      };
    pipeline.generate(generate);
  }
  display.clear();
  const Json json = json_report(settings, model, analyzer, maps);
  std::vector<std::string> written;
  if (!settings.folder.empty()) {
    const std::string text = dump(json);
    written = {fmt::format("{} heat maps in {}", maps.size(), settings.folder),
               (std::filesystem::path(settings.folder) / "attention.json").string()};
    write_file_atomically(written.back(), {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  }
  if (settings.json)
    print(dump(json));
  else if (!settings.quiet)
    print(text_report(analyzer, written));
}

}  // namespace

void add_analyze(CLI::App& program, Action& chosen) {
  CLI::App* command = program.add_subcommand(
      "analyze", "Measures a model's attention: sinks, locality, similarity across scales; heat maps");
  command->allow_extras();
  const auto settings = std::make_shared<Settings>();
  command->add_option("prompt", settings->prompts, "What to draw")
      ->expected(CLI::detail::expected_max_vector_size, CLI::detail::expected_max_vector_size)
      ->multi_option_policy(CLI::MultiOptionPolicy::TakeAll)
      ->allow_extra_args(false)
      ->option_text("PROMPT ...");
  command->add_option("-f,--file", settings->file, "File of prompts, one a line; - is standard input")
      ->type_name("FILE");
  add_integers(*command, "--scales", settings->scales, {0, 63}, "Scales to look at, counted from 0 (the last three)");
  add_number(*command, "--side", settings->side, Range<int>{1, 64},
             "At most N x N queries of a scale, evenly spread, are looked at (16)");
  add_seed(*command, settings->seed, "Seed of the pictures (0)");
  command
      ->add_option("-o,--output", settings->folder,
                   "Existing folder for attention.json and the first picture's heat maps, one a layer and scale")
      ->type_name("DIR");
  add_device(*command, settings->pipeline);
  add_precision(*command, settings->pipeline);
  add_engine(*command, settings->pipeline);
  command->add_flag("--json", settings->json, "One JSON object on standard output");
  command->add_flag("--quiet", settings->quiet, "No progress and no report");
  command->callback([settings, &chosen] { chosen = [settings] { run(*settings); }; });
}

}  // namespace sparvar::cli
