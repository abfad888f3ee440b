#include "evaluation_report.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>

#include "image/atomic_file.h"
#include "machine.h"
#include "output.h"
#include "pipeline/evaluation_page.h"
#include "report.h"
#include "sparvar/error.h"

namespace sparvar::cli {
namespace {

namespace fs = std::filesystem;
using Json = nlohmann::ordered_json;

constexpr int gain = 4;           // of the difference in a picture
constexpr int page_quality = 80;  // of WebP

std::string read_file(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) throw Error(ErrorKind::system, fmt::format("{}: cannot be opened", path));
  return {std::istreambuf_iterator<char>(in), {}};
}

void write_text(const std::string& path, const std::string& text) {
  write_file_atomically(path, {reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

Json number(double value) { return std::isfinite(value) ? Json(value) : Json(); }
double number_of(const Json& json) { return json.is_null() ? NAN : json.get<double>(); }

Json score_json(const Score& score) {
  return {{"psnr", score.psnr},
          {"equal", score.psnr >= kEqualPsnr},
          {"ssim", number(score.ssim)},
          {"detail_error", score.detail_error},
          {"seconds", score.seconds},
          {"dense_seconds", score.dense_seconds},
          {"share_of_pairs_last_scales", score.pairs},
          {"share_of_pairs", score.all_pairs},
          {"warm", score.warm}};
}

Score score_of(const Json& json) {
  return {.psnr = json.at("psnr"),
          .ssim = number_of(json.at("ssim")),
          .detail_error = json.at("detail_error"),
          .seconds = json.at("seconds"),
          .dense_seconds = json.at("dense_seconds"),
          .pairs = json.at("share_of_pairs_last_scales"),
          .all_pairs = json.at("share_of_pairs"),
          .warm = json.at("warm")};
}

Json spread_json(const Spread& spread) {
  return {{"mean", number(spread.mean)}, {"worst", number(spread.worst)}, {"deviation", number(spread.deviation)}};
}

Json summary_json(const VariantSummary& s) {
  return {{"psnr", spread_json(s.psnr)},
          {"ssim", spread_json(s.ssim)},
          {"detail_error", spread_json(s.detail_error)},
          {"equal", s.equal},
          {"seconds", s.seconds},
          {"dense_seconds", s.dense_seconds},
          {"speed_up", s.speed_up},
          {"share_of_pairs_last_scales", s.pairs},
          {"share_of_pairs", s.all_pairs}};
}

void make_folder(const std::string& folder) {
  std::error_code failed;
  if (!fs::exists(folder, failed)) fs::create_directory(folder, failed);
  if (failed)
    throw Error(ErrorKind::system, fmt::format("{}: cannot be made: {}; make it first", folder, failed.message()));
  require_writable_folder(folder, "-o");
}

}  // namespace

EvaluationReport::EvaluationReport(std::string folder, Json settings, const GenerateOptions& generate,
                                   const std::vector<Variant>& variants, int kept)
    : folder_(std::move(folder)),
      settings_(std::move(settings)),
      generate_(generate),
      variants_(variants),
      kept_(kept) {
  make_folder(folder_);
  make_folder(folder_ + "/worst");
  std::error_code ignored;
  if (fs::exists(folder_ + "/report.json", ignored)) read(read_file(folder_ + "/report.json"));
}

void EvaluationReport::read(const std::string& text) {
  const std::string path = folder_ + "/report.json";
  try {
    const Json json = Json::parse(text);
    if (json.at("settings") != settings_)
      throw Error(ErrorKind::usage, fmt::format("{}: a report of other settings; give another folder with -o, or "
                                                "remove this file to begin anew",
                                                path));
    const int total = static_cast<int>(generate_.prompts.size()) * generate_.pictures_per_prompt;
    for (const Json& one : json.at("cases")) {
      CaseScores scores{one.at("index"), {}};
      for (const Json& score : one.at("scores")) scores.scores.push_back(score_of(score));
      if (scores.scores.size() != variants_.size() || scores.index < 0 || scores.index >= total)
        throw Error(ErrorKind::input, fmt::format("{}: case {} does not fit the settings; remove this file to begin "
                                                  "anew",
                                                  path, scores.index));
      cases_.push_back(std::move(scores));
    }
  } catch (const nlohmann::json::exception&) {
    throw Error(
        ErrorKind::input,
        fmt::format("{}: not a report of this program; give another folder with -o, or remove this file", path));
  }
}

std::string EvaluationReport::worst_path(std::size_t variant, int index) const {
  return fmt::format("{}/worst/{:02}-{:05}.webp", folder_, variant, index);
}

std::vector<int> EvaluationReport::worst_of(std::size_t variant) const {
  std::vector<int> worst = summary_of(cases_, variant).worst;
  worst.resize(std::min(worst.size(), static_cast<std::size_t>(kept_)));
  return worst;
}

std::string EvaluationReport::caption(std::size_t variant, int index) const {
  const auto found =
      std::find_if(cases_.begin(), cases_.end(), [index](const CaseScores& c) { return c.index == index; });
  const Score& score = found->scores.at(variant);
  return fmt::format("{} (seed {}, picture {}): {:.2f} dB, SSIM {:.4f}, detail error {:.2f}",
                     options_of_case(generate_, index).prompts.front(), generate_.seed, index, score.psnr, score.ssim,
                     score.detail_error);
}

void EvaluationReport::add(const CaseScores& scores, const Drawn& dense, const std::vector<Drawn>& drawn) {
  cases_.push_back(scores);
  for (std::size_t v = 0; v < variants_.size(); ++v) {
    const std::vector<int> worst = worst_of(v);
    if (std::find(worst.begin(), worst.end(), scores.index) == worst.end()) continue;
    Comparison one{dense, {drawn[v]}, 0};
    one.plans.front().plan.name = variants_[v].name;
    write_image(worst_path(v, scores.index), comparison_sheet(one, caption(v, scores.index), gain), ImageFormat::webp,
                {}, page_quality);
  }
  write_text(folder_ + "/report.json", dump(to_json(false)));
}

Json EvaluationReport::to_json(bool complete) const {
  Json variants = Json::array();
  for (std::size_t v = 0; v < variants_.size(); ++v) {
    Json one = {{"name", variants_[v].name},
                {"summary", summary_json(summary_of(cases_, v))},
                {"skip_scales", variants_[v].skip_scales},
                {"uncond_until", variants_[v].uncond_until < 0 ? Json() : Json(variants_[v].uncond_until)},
                {"plan", Json::parse(variants_[v].plan.to_json())}};
    Json worst = Json::array();
    for (const int index : worst_of(v))
      worst.push_back({{"index", index}, {"picture", fs::path(worst_path(v, index)).filename().string()}});
    one["worst"] = std::move(worst);
    variants.push_back(std::move(one));
  }
  Json cases = Json::array();
  for (const CaseScores& one : cases_) {
    Json scores = Json::array();
    for (const Score& score : one.scores) scores.push_back(score_json(score));
    cases.push_back({{"index", one.index},
                     {"prompt", options_of_case(generate_, one.index).prompts.front()},
                     {"scores", std::move(scores)}});
  }
  return {
      {"complete", complete}, {"folder", folder_}, {"variants", variants}, {"cases", cases}, {"settings", settings_}};
}

Json EvaluationReport::finish(const ModelInfo& model) {
  std::sort(cases_.begin(), cases_.end(), [](const auto& a, const auto& b) { return a.index < b.index; });
  Json report = to_json(true);
  report["model"] = cli::to_json(model);
  report["machine"] = machine_json(model);
  report["version"] = SPARVAR_VERSION;
  report["commit"] = commit();
  std::vector<PageVariant> page;
  std::vector<std::string> kept;
  for (std::size_t v = 0; v < variants_.size(); ++v) {
    page.push_back({variants_[v].name, summary_of(cases_, v), {}});
    for (const int index : worst_of(v)) {
      kept.push_back(fs::path(worst_path(v, index)).filename().string());
      std::error_code ignored;
      if (!fs::exists(worst_path(v, index), ignored)) continue;  // somebody removed it
      const std::string bytes = read_file(worst_path(v, index));
      page.back().worst.push_back({caption(v, index), {bytes.begin(), bytes.end()}});
    }
  }
  const std::vector<std::string> notes = {
      fmt::format("{} pictures of {} prompts, seed {}, {}; {}.", cases_.size(), generate_.prompts.size(),
                  generate_.seed, settings_.at("dtype").get<std::string>(), model.backend),
      fmt::format("Model {} ({}); sparvar {} ({}); {}.", fs::path(model.model_dir).filename().string(),
                  model.model_hash, SPARVAR_VERSION, commit(), this_machine().processor),
      "Every variant against dense attention with the same prompt and random numbers. Detail error: what a Gaussian "
      "blur takes away, root mean square of the difference in 8-bit levels. Pairs: query-key pairs computed, of "
      "those of dense attention with guidance at all scales; decision scales and probes are counted. Seconds are "
      "medians of warm pictures. Equal pictures count as 100 dB."};
  write_text(folder_ + "/index.html", evaluation_page("sparvar evaluate", notes, page));
  write_text(folder_ + "/report.json", dump(report));
  for (const auto& entry : fs::directory_iterator(folder_ + "/worst")) {  // pictures that others have displaced
    const std::string name = entry.path().filename().string();
    const bool ours = name.ends_with(".webp") && name.find_first_not_of("0123456789-") == name.size() - 5;
    std::error_code ignored;
    if (ours && std::find(kept.begin(), kept.end(), name) == kept.end()) fs::remove(entry.path(), ignored);
  }
  return report;
}

std::string summary_table(const std::vector<Variant>& variants, const std::vector<CaseScores>& cases) {
  std::size_t width = 8;
  for (const Variant& variant : variants) width = std::max(width, variant.name.size());
  std::string out = fmt::format(
      "{:{}}      PSNR   worst      +-     SSIM   worst  detail   pairs     all  seconds  dense  speed-up\n", "variant",
      width);
  for (std::size_t v = 0; v < variants.size(); ++v) {
    const VariantSummary s = summary_of(cases, v);
    out += fmt::format(
        "{:{}}  {:5.2f} dB  {:6.2f}  {:6.2f}  {:7.4f}  {:6.4f}  {:6.2f} {:6.1f}% {:6.1f}% {:8.3f} {:6.3f}  {:7.2f}x\n",
        variants[v].name, width, s.psnr.mean, s.psnr.worst, s.psnr.deviation, s.ssim.mean, s.ssim.worst,
        s.detail_error.mean, 100 * s.pairs, 100 * s.all_pairs, s.seconds, s.dense_seconds, s.speed_up);
  }
  return out +
         "pairs: query-key pairs computed of dense attention's, last three scales and all; detail: RMS error of "
         "fine detail, 8-bit levels\n";
}

}  // namespace sparvar::cli
