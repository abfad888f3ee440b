#include "picture_info.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "console.h"
#include "report.h"
#include "sparvar/pipeline.h"
#include "weights/fingerprint.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

std::string text_of(const ImageMetadata& texts, std::string_view keyword) {
  for (const auto& [name, value] : texts)
    if (name == keyword) return value;
  return {};
}

/// The settings object; null where there is none.
Json settings_of(const ImageMetadata& texts) { return Json::parse(text_of(texts, "settings"), nullptr, false); }

/// One number where all are equal, else a comma list.
std::string numbers(const Json& values) {
  std::string list, first;
  bool same = true;
  for (const Json& value : values) {
    const std::string text = fmt::format("{}", value.get<double>());
    if (list.empty()) first = text;
    same = same && text == first;
    list += (list.empty() ? "" : ",") + text;
  }
  return same ? first : list;
}

bool of_bundled_model(const std::string& hash) {
  try {
    return fingerprint(bundled_model_dir()) == hash;
  } catch (const Error&) {
    return false;
  }
}

/// Is it the plan that the bundled model's pictures of this size are drawn with where none is named?
bool is_bundled_plan(const Json& plan, const std::string& aspect, const std::string& size) {
  try {
    const ModelInfo model = model_outline("");
    std::optional<AttentionPlan> own = model_plan("");
    if (!own || picture_schedule("", aspect, size).size() != model.schedule.size()) return false;
    own->note.clear();  // pictures do not keep it
    return Json::parse(own->to_json()) == plan;
  } catch (const Error&) {
    return false;
  }
}

/// The preset of this name and of these rules, or empty. A preset depends on the number of scales and layers, which the
/// picture does not say: rules are compared for all that make sense.
std::string preset_name(const Json& plan) {
  if (!plan.is_object() || !plan.contains("name") || !plan["name"].is_string()) return {};
  auto name = plan["name"].get<std::string>();
  const std::vector<std::string> names = AttentionPlan::preset_names();
  if (std::find(names.begin(), names.end(), name) == names.end()) return {};
  for (const int scales : {13, 12, 10, 7})
    for (int layers = 1; layers <= 64; ++layers)
      if (Json::parse(AttentionPlan::preset(name, layers, scales).to_json()) == plan) return name;
  return {};
}

}  // namespace

std::string redraw_command(const ImageMetadata& texts) {
  const Json s = settings_of(texts);
  const std::string prompt = text_of(texts, "prompt");
  if (!s.is_object() || prompt.empty()) return {};
  try {
    std::string out = "sparvar generate";
    const auto add = [&out](const std::string& flag, const std::string& value) {
      out += fmt::format(" {} {}", flag, shell_word(value));
    };
    add("--seed", text_of(texts, "seed"));
    if (const auto picture = s.at("picture").get<std::uint64_t>(); picture > 0)
      add("--first-picture", std::to_string(picture));
    add("--cfg", numbers(s.at("cfg")));
    add("--tau", numbers(s.at("tau")));
    add("--top-k", std::to_string(s.at("top_k").get<int>()));
    add("--top-p", fmt::format("{}", s.at("top_p").get<double>()));
    if (s.at("greedy").get<bool>()) out += " --greedy";
    for (const char* name : {"aspect", "size"})
      if (const auto value = s.at(name).get<std::string>(); !value.empty()) add(fmt::format("--{}", name), value);
    if (const int skipped = s.at("skip_scales").get<int>(); skipped > 0) add("--skip-scales", std::to_string(skipped));
    if (const int until = s.at("uncond_until").get<int>(); until >= 0) add("--uncond-until", std::to_string(until));
    add("--dtype", s.at("dtype").get<std::string>());
    if (s.value("weights", "") == "fp8") add("--weights", "fp8");  // not in older files
    const bool bundled = of_bundled_model(text_of(texts, "model_hash"));
    if (const std::string preset = preset_name(s.at("plan")); !preset.empty())
      add("--attention", preset);
    else if (!bundled ||
             !is_bundled_plan(s.at("plan"), s.at("aspect").get<std::string>(), s.at("size").get<std::string>()))
      add("--plan", "PLAN.json");
    if (!bundled) add("--model", "MODEL_DIR");
    return out + " -- " + shell_word(prompt);
  } catch (const nlohmann::json::exception&) {  // settings of another program, or of another version of ours
    return {};
  }
}

std::string plan_text(const ImageMetadata& texts) {
  const Json s = settings_of(texts);
  return s.is_object() && s.contains("plan") ? s["plan"].dump(2) + "\n" : "";
}

std::string picture_report(const std::string& path, bool json) {
  const ImageMetadata texts = read_image_metadata(path);
  const std::string command = redraw_command(texts);
  if (json) {
    Json object = Json::object();
    for (const auto& [keyword, value] : texts) object[keyword] = value;
    if (const Json settings = settings_of(texts); settings.is_object()) object["settings"] = settings;
    return dump({{"picture", path}, {"texts", object}, {"command", command.empty() ? Json() : Json(command)}});
  }
  if (texts.empty()) return fmt::format("{}: holds no texts that say how it was made\n", path);
  std::string out;
  for (const auto& [keyword, value] : texts) out += fmt::format("{:<12}  {}\n", keyword, value);
  if (command.empty()) return out + "It was not drawn by `sparvar generate`, or by another version.\n";
  out += "\nDraws it again:\n" + command + "\n";
  if (command.find(" --plan PLAN.json") != std::string::npos)
    out += fmt::format("PLAN.json: sparvar info {} --plan-out PLAN.json\n", shell_word(path));
  if (command.find(" --model MODEL_DIR") != std::string::npos)
    out += fmt::format("MODEL_DIR: the folder of the model {} with the hash {} (sparvar info --model DIR tells it)\n",
                       text_of(texts, "model"), text_of(texts, "model_hash"));
  return out;
}

}  // namespace sparvar::cli
