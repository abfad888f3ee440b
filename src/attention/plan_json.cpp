// Plans as JSON: {"name": "...", "rules": [{"layers": [0, -1], "scales": [10, -1], "method": "probe", "stride": 8,
// ...}]}.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <set>

#include "attention/plan_text.h"
#include "core/nearest_name.h"
#include "sparvar/attention_plan.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

using Json = nlohmann::ordered_json;

constexpr std::size_t kMaxBytes = 1 << 20;
constexpr int kMaxDepth = 16;
constexpr std::size_t kMaxMembers = 64;  // of one object; a lookup is linear
constexpr std::size_t kMaxItems = 64;
constexpr std::size_t kMaxRules = 10000;

/// What a value is, for messages: "string", "array of 3".
std::string kind(const Json& value) {
  return value.is_array() ? fmt::format("array of {}", value.size()) : value.type_name();
}

/// Reads the members of one JSON object; every member must be asked for.
class Members {
 public:
  Members(const Json& object, std::string where) : object_(object), where_(std::move(where)) {
    if (!object.is_object()) fail(fmt::format("expected an object, found {}", object.type_name()));
  }
  [[noreturn]] void fail(const std::string& what) const {
    throw Error(ErrorKind::input, fmt::format("{}: {}", where_, what));
  }

  const Json* find(const char* key) {
    known_.emplace_back(key);
    const auto found = object_.find(key);
    return found == object_.end() ? nullptr : &*found;
  }
  void read(const char* key, int& out) {
    if (const Json* value = find(key)) out = integer(key, *value);
  }
  void read(const char* key, double& out) {
    const Json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_number()) fail(fmt::format("{}: expected a number, found {}", key, value->type_name()));
    out = value->get<double>();
  }
  void read(const char* key, std::vector<double>& out) {
    const Json* value = find(key);
    if (value == nullptr) return;
    const bool numbers = value->is_array() &&
                         std::all_of(value->begin(), value->end(), [](const Json& item) { return item.is_number(); });
    if (!numbers || value->size() > kMaxItems)
      fail(fmt::format("{}: expected a list of at most {} numbers, found {}", key, kMaxItems, kind(*value)));
    out = value->get<std::vector<double>>();
  }
  void read(const char* key, bool& out) {
    const Json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_boolean()) fail(fmt::format("{}: expected true or false, found {}", key, value->type_name()));
    out = value->get<bool>();
  }
  void read(const char* key, std::string& out) {
    const Json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_string()) fail(fmt::format("{}: expected text, found {}", key, value->type_name()));
    out = value->get<std::string>();
  }
  void read(const char* key, std::vector<int>& out) {
    const Json* value = find(key);
    if (value == nullptr) return;
    if (!value->is_array() || value->size() > kMaxItems)
      fail(fmt::format("{}: expected a list of at most {} integers, found {}", key, kMaxItems, kind(*value)));
    out.clear();
    for (const Json& item : *value) out.push_back(integer(key, item));
  }
  void read(const char* key, std::vector<std::string>& out) {
    const Json* value = find(key);
    if (value == nullptr) return;
    const bool texts = value->is_array() &&
                       std::all_of(value->begin(), value->end(), [](const Json& line) { return line.is_string(); });
    if (!texts || value->size() > kMaxItems)
      fail(fmt::format("{}: expected a list of at most {} lines of text, found {}", key, kMaxItems, kind(*value)));
    out = value->get<std::vector<std::string>>();
  }
  void range(const char* key, int& first, int& last) {
    std::vector<int> pair{first, last};
    read(key, pair);
    if (pair.size() != 2) fail(fmt::format("{}: expected [first, last], found {} values", key, pair.size()));
    first = pair[0];
    last = pair[1];
  }
  template <typename Enum>
  void choice(const char* key, Enum& out, const std::vector<std::string>& names) {
    std::string name = names[static_cast<std::size_t>(out)];
    read(key, name);
    const auto found = std::find(names.begin(), names.end(), name);
    if (found == names.end())
      fail(fmt::format("{}: '{}' is not one of {}", key, printable(name), fmt::join(names, ", ")));
    out = static_cast<Enum>(found - names.begin());
  }
  void done() const {
    for (const auto& [key, value] : object_.items())
      if (std::find(known_.begin(), known_.end(), key) == known_.end())
        fail(fmt::format("unknown key '{}'; did you mean '{}'?", printable(key), nearest_name(key, known_)));
  }

 private:
  int integer(const char* key, const Json& value) const {
    // Above 2^63 the signed reading would wrap, so the sign decides how to compare.
    const bool fits = value.is_number_unsigned() ? value.get<std::uint64_t>() <= std::uint64_t{1} << 30
                                                 : value.is_number_integer() && value.get<std::int64_t>() >= -1;
    if (!fits)
      fail(fmt::format("{}: expected a whole number from -1 to 2^30, found {}", key, printable(value.dump(), 40)));
    return value.get<int>();
  }

  const Json& object_;
  std::string where_;
  std::vector<std::string> known_;
};

const std::vector<std::string> kForms = {"lists", "blocks"};
const std::vector<std::string> kCentres = {"published", "half_pixel"};
const std::vector<std::string> kCarries = {"ratio", "group", "grid"};
const std::vector<std::string> kMethods = {"dense", "csla", "cs4a", "probe"};

void read_group(Members& members, QueryGroup& group, const std::string& where) {
  const Json* value = members.find("group");
  if (value == nullptr) return;
  Members inner(*value, where + ", group");
  group.rows = 0;
  inner.read("tile_h", group.tile_h);
  inner.read("tile_w", group.tile_w);
  inner.read("rows", group.rows);
  inner.done();
}

AttentionMethod read_method(const std::string& name, Members& members, const std::string& where) {
  if (name == "csla") {
    CslaAttention m;
    members.read("windows", m.windows);
    members.read("sink_scales", m.sink_scales);
    members.choice("form", m.form, kForms);
    members.choice("centre", m.centre, kCentres);
    read_group(members, m.group, where);
    members.read("block", m.block);
    return m;
  }
  if (name == "cs4a") {
    Cs4aAttention m;
    members.read("decision_scale", m.decision_scale);
    members.read("share", m.share);
    members.read("granularity", m.granularity);
    read_group(members, m.group, where);
    members.choice("carry", m.carry, kCarries);
    members.read("own_windows", m.own_windows);
    members.read("residual", m.residual);
    return m;
  }
  if (name == "probe") {
    ProbeAttention m;
    members.read("stride", m.stride);
    members.read("share", m.share);
    read_group(members, m.group, where);
    members.read("window", m.window);
    members.read("window_scales", m.window_scales);
    members.read("sink_scales", m.sink_scales);
    members.read("residual", m.residual);
    return m;
  }
  if (name != "dense")
    members.fail(fmt::format("method: '{}' is not one of {}", printable(name), fmt::join(kMethods, ", ")));
  return DenseAttention{};
}

AttentionRule read_rule(const Json& json, const std::string& where) {
  Members members(json, where);
  AttentionRule rule;
  members.range("layers", rule.first_layer, rule.last_layer);
  members.range("scales", rule.first_scale, rule.last_scale);
  std::string method;
  members.read("method", method);
  if (!json.contains("method")) members.fail(fmt::format("method is missing; allowed: {}", fmt::join(kMethods, ", ")));
  rule.method = read_method(method, members, where);
  members.done();
  return rule;
}

TokenPruning read_pruning(const Json& json, const std::string& where) {
  Members members(json, where);
  TokenPruning pruning;
  members.read("first_scale", pruning.first_scale);
  members.read("keep", pruning.keep);
  members.done();
  return pruning;
}

/// Parses with duplicate keys, deep nesting and crowded objects refused before the parser keeps what is inside.
Json parse(const std::string& text, const std::string& where) {
  if (text.size() > kMaxBytes)
    throw Error(ErrorKind::input, fmt::format("{}: {} bytes; a plan has at most {}", where, text.size(), kMaxBytes));
  std::vector<std::set<std::string>> open;
  const auto refuse = [&](const std::string& what) {
    throw Error(ErrorKind::input, fmt::format("{}: {}", where, what));
  };
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth > kMaxDepth) refuse(fmt::format("nested more than {} levels deep", kMaxDepth));
    if (event == Json::parse_event_t::object_start) open.emplace_back();
    if (event == Json::parse_event_t::object_end) open.pop_back();
    if (event == Json::parse_event_t::key) {
      const auto key = parsed.get<std::string>();
      if (!open.back().insert(key).second) refuse(fmt::format("key '{}' is there twice", printable(key)));
      if (open.back().size() > kMaxMembers) refuse(fmt::format("an object with more than {} keys", kMaxMembers));
    }
    return true;
  };
  try {
    return Json::parse(text, watch);
  } catch (const Json::out_of_range&) {
    throw Error(ErrorKind::input, fmt::format("{}: a number too large for a double; allowed: finite numbers", where));
  } catch (const nlohmann::json::exception& error) {
    throw Error(ErrorKind::input, fmt::format("{}: not JSON: {}", where, printable(error.what(), 160)));
  }
}

Json group_json(const QueryGroup& group) {
  return group.rows > 0 ? Json{{"tile_h", group.tile_h}, {"tile_w", group.tile_w}, {"rows", group.rows}}
                        : Json{{"tile_h", group.tile_h}, {"tile_w", group.tile_w}};
}

void write(Json& out, const DenseAttention&) { out["method"] = "dense"; }

void write(Json& out, const CslaAttention& m) {
  out["method"] = "csla";
  out["windows"] = m.windows;
  out["sink_scales"] = m.sink_scales;
  out["form"] = kForms[static_cast<std::size_t>(m.form)];
  out["centre"] = kCentres[static_cast<std::size_t>(m.centre)];
  out["group"] = group_json(m.group);
  out["block"] = m.block;
}

void write(Json& out, const Cs4aAttention& m) {
  out["method"] = "cs4a";
  out["decision_scale"] = m.decision_scale;
  out["share"] = m.share;
  out["granularity"] = m.granularity;
  out["group"] = group_json(m.group);
  out["carry"] = kCarries[static_cast<std::size_t>(m.carry)];
  out["own_windows"] = m.own_windows;
  out["residual"] = m.residual;
}

void write(Json& out, const ProbeAttention& m) {
  out["method"] = "probe";
  out["stride"] = m.stride;
  out["share"] = m.share;
  out["group"] = group_json(m.group);
  out["window"] = m.window;
  out["window_scales"] = m.window_scales;
  out["sink_scales"] = m.sink_scales;
  out["residual"] = m.residual;
}

}  // namespace

AttentionPlan AttentionPlan::from_json(const std::string& text, const std::string& where) {
  const Json json = parse(text, where);
  Members members(json, where);
  AttentionPlan plan{"unnamed", {}};
  members.read("name", plan.name);
  members.read("note", plan.note);
  const Json* rules = members.find("rules");
  if (const Json* pruning = members.find("pruning")) plan.pruning = read_pruning(*pruning, where + ": pruning");
  members.done();
  if (rules == nullptr) members.fail("rules is missing; allowed: a list of rules");
  if (!rules->is_array() || rules->size() > kMaxRules)
    members.fail(fmt::format("rules: expected a list of at most {} rules, found {}", kMaxRules, kind(*rules)));
  for (std::size_t i = 0; i < rules->size(); ++i)
    plan.rules.push_back(read_rule((*rules)[i], fmt::format("{}: rule {}", where, i)));
  try {
    plan.validate();
  } catch (const Error& error) {
    throw Error(ErrorKind::input, fmt::format("{}: {}", where, error.what()));
  }
  return plan;
}

AttentionPlan AttentionPlan::from_file(const std::string& path) {
  const auto refuse = [&](const std::string& what) {
    throw Error(ErrorKind::input, fmt::format("{}: {}", path, what));
  };
  std::error_code error;
  const std::filesystem::file_status status = std::filesystem::status(path, error);
  if (status.type() == std::filesystem::file_type::not_found) refuse("no such plan file");
  if (error) refuse(fmt::format("cannot be opened: {}", error.message()));
  // Opening a pipe that nobody writes to would wait for ever.
  if (!std::filesystem::is_regular_file(status))
    refuse(std::filesystem::is_directory(status) ? "expected a plan file, found a folder"
                                                 : "expected a plan file, found something that is not a file");
  errno = 0;
  std::ifstream file(path, std::ios::binary);
  if (!file) refuse(fmt::format("cannot be opened: {}", std::strerror(errno)));
  // One byte more than allowed: the size that the system states need not be what there is to read.
  std::string text(kMaxBytes + 1, '\0');
  file.read(text.data(), static_cast<std::streamsize>(text.size()));
  if (file.bad()) refuse("cannot be read");
  text.resize(static_cast<std::size_t>(file.gcount()));
  if (text.size() > kMaxBytes) refuse(fmt::format("too large for a plan; allowed: {} bytes", kMaxBytes));
  return from_json(text, path);
}

std::string AttentionPlan::to_json() const {
  Json json{{"name", name}};
  if (!note.empty()) json["note"] = note;
  json["rules"] = Json::array();
  for (const AttentionRule& rule : rules) {
    Json out;
    out["layers"] = {rule.first_layer, rule.last_layer};
    out["scales"] = {rule.first_scale, rule.last_scale};
    std::visit([&](const auto& method) { write(out, method); }, rule.method);
    json["rules"].push_back(std::move(out));
  }
  if (pruning) json["pruning"] = {{"first_scale", pruning->first_scale}, {"keep", pruning->keep}};
  return json.dump(2, ' ', false, Json::error_handler_t::replace);
}

}  // namespace sparvar
