#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "sparvar/attention_plan.h"
#include "sparvar/error.h"

namespace sparvar {
namespace {

TEST(Plan, PresetsSurviveJson) {
  for (const std::string& name : AttentionPlan::preset_names())
    for (const int scales : {7, 10, 12, 13}) {
      const AttentionPlan plan = AttentionPlan::preset(name, 32, scales);
      EXPECT_NO_THROW(plan.validate()) << name;
      EXPECT_EQ(AttentionPlan::from_json(plan.to_json(), name), plan) << plan.to_json();
      if (scales == 7) {
        EXPECT_TRUE(plan.rules.empty()) << name << ": seven scales are dense";
      }
      if (name == "fastvar") {
        EXPECT_EQ(plan.pruning.has_value(), scales > 8) << scales;
        EXPECT_FALSE(plan.pruning && plan.is_static());
      } else if (scales == 13 && name != "dense") {
        EXPECT_FALSE(std::holds_alternative<DenseAttention>(plan.method(0, 10)) ||
                     std::holds_alternative<DenseAttention>(plan.method(31, 12)))
            << name;
        EXPECT_TRUE(std::holds_alternative<DenseAttention>(plan.method(0, 9))) << name;
      }
    }
}

TEST(Plan, TheShareOfTokensThatRunCanBeNamed) {
  const AttentionPlan plan = AttentionPlan::preset("fastvar:0.4", 8, 13);
  EXPECT_EQ(plan.pruning, (TokenPruning{10, {0.4}}));
  EXPECT_EQ(plan.name, "fastvar:0.4");
  EXPECT_FALSE(AttentionPlan::preset("fastvar:1", 8, 7).pruning);
  for (const char* bad :
       {"fastvar:", "fastvar:0", "fastvar:1.01", "fastvar:-0.5", "fastvar:0.4x", "fastvar:nan", "fastvar :0.4"})
    EXPECT_THROW(AttentionPlan::preset(bad, 8, 13), Error) << bad;
}

TEST(Plan, WithoutTheCacheNothingElseDiffers) {
  AttentionPlan plan = AttentionPlan::preset("cs4a", 8, 13);
  std::get<Cs4aAttention>(plan.rules.at(0).method).residual = false;
  EXPECT_EQ(AttentionPlan::preset("cs4a-nocache", 8, 13).rules, plan.rules);
}

TEST(Plan, ANoteIsKeptAndChangesNothing) {
  const AttentionPlan plan = AttentionPlan::from_json(R"({"note": ["a", "b \u00e9"], "rules": []})", "here");
  EXPECT_EQ(plan.note, (std::vector<std::string>{"a", "b \u00e9"}));
  EXPECT_EQ(AttentionPlan::from_json(plan.to_json(), "again"), plan);
  EXPECT_EQ(AttentionPlan{}.to_json().find("note"), std::string::npos);
  for (const char* bad : {R"({"note": "a", "rules": []})", R"({"note": [1], "rules": []})"})
    EXPECT_THROW(AttentionPlan::from_json(bad, "here"), Error) << bad;
}

TEST(Plan, PublishedSplitsTheLayers) {
  const AttentionPlan plan = AttentionPlan::preset("published", 40, 13);
  EXPECT_TRUE(std::holds_alternative<Cs4aAttention>(plan.method(10, 12)));
  EXPECT_TRUE(std::holds_alternative<CslaAttention>(plan.method(11, 12)));
}

TEST(Plan, WindowsStayWithTheLastScales) {
  const AttentionPlan plan = AttentionPlan::preset("csla", 8, 12);
  EXPECT_EQ(std::get<CslaAttention>(plan.rules.at(0).method).windows,
            (std::vector<int>{-1, -1, -1, -1, -1, -1, -1, 1, 1, 3, 5, 7}));
}

TEST(Plan, SparseScalesShiftWithTheSchedule) {
  const std::pair<int, int> first_of[] = {{9, 8}, {10, 8}, {11, 8}, {12, 9}, {13, 10}, {14, 11}};
  for (const std::string& name : AttentionPlan::preset_names()) {
    if (name == "fastvar") {
      for (const auto& [scales, first] : first_of)
        EXPECT_EQ(AttentionPlan::preset(name, 8, scales).pruning->first_scale, first);
    }
    if (name == "dense" || name == "fastvar") continue;
    for (const auto& [scales, first] : first_of) {
      const AttentionPlan plan = AttentionPlan::preset(name, 8, scales);
      EXPECT_TRUE(std::holds_alternative<DenseAttention>(plan.method(0, first - 1))) << name << " " << scales;
      for (int layer = 0; layer < 8; ++layer)
        for (int scale = first; scale < scales; ++scale)
          EXPECT_FALSE(std::holds_alternative<DenseAttention>(plan.method(layer, scale))) << name << " " << scales;
      if (const auto* cs4a = std::get_if<Cs4aAttention>(&plan.method(0, first))) {
        EXPECT_EQ(cs4a->decision_scale, first) << name << " " << scales;
      }
    }
  }
}

TEST(Plan, BoundOfThePublishedSplit) {
  const std::pair<int, int> bound_of[] = {{1, 0}, {2, 1}, {8, 2}, {16, 4}, {32, 8}, {40, 10}};
  for (const auto& [layers, bound] : bound_of) {
    const AttentionPlan plan = AttentionPlan::preset("published", layers, 13);
    EXPECT_NO_THROW(plan.validate()) << layers;
    EXPECT_TRUE(std::holds_alternative<Cs4aAttention>(plan.method(bound, 12))) << layers;
    EXPECT_TRUE(std::holds_alternative<CslaAttention>(plan.method(bound + 1, 12))) << layers;
  }
}

TEST(Plan, EveryParameterSurvivesJson) {
  CslaAttention csla;
  csla.windows = {-1, 0, 1, 1001};
  csla.sink_scales = 3;
  csla.form = CslaAttention::Form::blocks;
  csla.centre = CslaAttention::Centre::half_pixel;
  csla.group = {3, 5, 77};
  csla.block = 96;
  Cs4aAttention cs4a;
  cs4a.decision_scale = 4;
  cs4a.share = 1.0 / 3;
  cs4a.granularity = 112;
  cs4a.group = {2, 9, 0};
  cs4a.carry = Cs4aAttention::Carry::grid;
  cs4a.own_windows = {};
  cs4a.residual = false;
  ProbeAttention probe;
  probe.stride = 3;
  probe.share = 1;
  probe.group = {1, 1, 5};
  probe.window = 0;
  probe.window_scales = 0;
  probe.sink_scales = 2;
  probe.residual = false;
  const AttentionPlan plan{
      "caf\xc3\xa9 \"x\"\n",
      {{0, 3, 2, 9, csla}, {1, 1, 4, 4, cs4a}, {5, -1, 0, -1, probe}, {0, -1, 1, 1, DenseAttention{}}}};
  EXPECT_EQ(AttentionPlan::from_json(plan.to_json(), "x"), plan) << plan.to_json();
}

TEST(Plan, MissingParametersAreTheDefaults) {
  const AttentionPlan plan = AttentionPlan::from_json(
      R"({"rules": [{"method": "csla"}, {"method": "cs4a"}, {"method": "probe"}, {"method": "cs4a", "group": {"tile_w": 4}}]})",
      "x");
  EXPECT_EQ(plan.rules.at(0), (AttentionRule{0, -1, 10, -1, CslaAttention{}}));
  EXPECT_EQ(plan.rules.at(1).method, AttentionMethod{Cs4aAttention{}});
  EXPECT_EQ(plan.rules.at(2).method, AttentionMethod{ProbeAttention{}});
  EXPECT_EQ(std::get<Cs4aAttention>(plan.rules.at(3).method).group, (QueryGroup{8, 4, 0})) << "tiles replace rows";
}

TEST(Plan, TheFirstRuleThatFitsHolds) {
  ProbeAttention probe;
  AttentionPlan plan{"x", {{2, 3, 5, 6, CslaAttention{}}, {0, -1, 5, -1, probe}}};
  EXPECT_TRUE(std::holds_alternative<CslaAttention>(plan.method(2, 5)));
  EXPECT_TRUE(std::holds_alternative<ProbeAttention>(plan.method(2, 7)));
  EXPECT_TRUE(std::holds_alternative<ProbeAttention>(plan.method(4, 5)));
  EXPECT_TRUE(std::holds_alternative<DenseAttention>(plan.method(2, 4)));
}

struct BadPlan {
  const char* name;
  std::string text;
  std::vector<std::string> says;  // each must be in the message
};

class BadPlans : public ::testing::TestWithParam<BadPlan> {};

TEST_P(BadPlans, OneClearLine) {
  try {
    AttentionPlan::from_json(GetParam().text, "my-plan.json");
    FAIL() << "accepted";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.kind(), ErrorKind::input);
    EXPECT_EQ(message.find('\n'), std::string::npos) << message;
    EXPECT_LT(message.size(), 400U);
    for (const std::string& part : GetParam().says)
      EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
  }
}

std::string crowd() {
  std::string out = R"({"rules": [])";
  for (int i = 0; i < 60000; ++i) out += ",\"" + std::to_string(i) + "\":0";
  return out + "}";
}

std::string many_rules(int count) {
  std::string out = R"({"rules": [)";
  for (int i = 0; i < count; ++i) out += i == 0 ? R"({"method":"dense"})" : R"(,{"method":"dense"})";
  return out + "]}";
}

std::string rule(const std::string& members) { return R"({"rules": [{"scales": [10, -1], )" + members + "}]}"; }

INSTANTIATE_TEST_SUITE_P(
    Table, BadPlans,
    ::testing::Values(
        BadPlan{"crowded", crowd(), {"more than 64 keys"}},
        BadPlan{"rules_10001", many_rules(10001), {"10000", "array of 10001"}},
        BadPlan{"newline_key", R"({"a\nb": 1, "rules": []})", {"unknown key", "a?b"}},
        BadPlan{
            "newline_name", R"({"name": "a\nb", "rules": [{"method": "probe", "stride": 0}]})", {"a?b", "stride is 0"}},
        BadPlan{"long_name",
                R"({"name": ")" + std::string(900000, 'x') + R"(", "rules": [{"method": "probe", "stride": 0}]})",
                {"stride is 0"}},
        BadPlan{"long_form",
                rule(R"("method": "csla", "form": ")" + std::string(5000, 'x') + "\""),
                {"form", "lists, blocks"}},
        BadPlan{"not_utf8", "{\"name\": \"\xff\", \"rules\": []}", {"not JSON"}},
        BadPlan{"nan", rule(R"("method": "probe", "share": NaN)"), {"not JSON"}},
        BadPlan{"wraps_to_minus_1",
                rule(R"("method": "probe", "layers": [0, 18446744073709551615])"),
                {"layers", "18446744073709551615"}},
        BadPlan{"window_wraps", rule(R"("method": "csla", "windows": [18446744073709551615])"), {"windows"}},
        BadPlan{"window_1002", rule(R"("method": "csla", "windows": [1002])"), {"windows is 1002", "1001"}},
        BadPlan{"minus_2", rule(R"("method": "csla", "windows": [-2])"), {"windows", "-2"}},
        BadPlan{"many_windows",
                rule(R"("method": "csla", "windows": [1)" +
                     [] {
                       std::string out;
                       for (int i = 0; i < 64; ++i) out += ",1";
                       return out;
                     }() +
                     "]"),
                {"windows", "array of 65"}},
        BadPlan{"tile_0_with_rows", rule(R"("method": "probe", "group": {"tile_w": 0, "rows": 192})"), {"tile_w is 0"}},
        BadPlan{"rows_negative", rule(R"("method": "probe", "group": {"rows": -1})"), {"rows is -1"}},
        BadPlan{"granularity_0", rule(R"("method": "cs4a", "granularity": 0)"), {"granularity is 0"}},
        BadPlan{"decision_negative", rule(R"("method": "cs4a", "decision_scale": -1)"), {"decision_scale is -1"}},
        BadPlan{"block_0", rule(R"("method": "csla", "block": 0)"), {"block is 0"}},
        BadPlan{"share_text", rule(R"("method": "probe", "share": "x")"), {"share", "a number", "string"}},
        BadPlan{"layer_range", rule(R"("method": "probe", "layers": [3, 2])"), {"last layer is 2"}},
        BadPlan{"rules_missing", R"({"name": "x"})", {"rules is missing"}},
        BadPlan{"empty", "", {"my-plan.json", "not JSON"}}, BadPlan{"not_json", "{", {"my-plan.json", "not JSON"}},
        BadPlan{"no_object", "[]", {"expected an object"}}, BadPlan{"no_rules", "{}", {"rules"}},
        BadPlan{"rules_text", R"({"rules": "x"})", {"rules"}},
        BadPlan{"unknown_top", R"({"rules": [], "nam": "x"})", {"'nam'", "'name'"}},
        BadPlan{"twice", R"({"rules": [], "rules": []})", {"'rules'", "twice"}},
        BadPlan{"deep", R"({"rules": )" + std::string(5000, '[') + std::string(5000, ']') + "}", {"nested"}},
        BadPlan{"huge", std::string((1 << 20) + 1, ' '), {"bytes"}},
        BadPlan{"method", rule(R"("method": "cslaa")"), {"rule 0", "cslaa", "csla"}},
        BadPlan{"no_method", rule(R"("layers": [0, 1])"), {"rule 0", "method is missing", "probe"}},
        BadPlan{"unknown_key", rule(R"("method": "probe", "strid": 4)"), {"'strid'", "'stride'"}},
        BadPlan{"wrong_method_key", rule(R"("method": "csla", "stride": 4)"), {"'stride'"}},
        BadPlan{"type", rule(R"("method": "probe", "stride": "4")"), {"stride", "whole number"}},
        BadPlan{"fraction", rule(R"("method": "probe", "stride": 4.5)"), {"stride", "4.5"}},
        BadPlan{"stride_0", rule(R"("method": "probe", "stride": 0)"), {"stride is 0"}},
        BadPlan{"share_0", rule(R"("method": "probe", "share": 0)"), {"share is 0"}},
        BadPlan{"share_2", rule(R"("method": "cs4a", "share": 2)"), {"share is 2"}},
        BadPlan{"huge_number", rule(R"("method": "probe", "share": 1e999)"), {"too large", "finite"}},
        BadPlan{"huge_integer", rule(R"("method": "probe", "window": 99999999999999999999)"), {"window"}},
        BadPlan{"tile_0", rule(R"("method": "probe", "group": {"tile_h": 0})"), {"tile_h is 0"}},
        BadPlan{"group_key", rule(R"("method": "probe", "group": {"tile": 8})"), {"group", "'tile'"}},
        BadPlan{"form", rule(R"("method": "csla", "form": "list")"), {"form", "'list'", "lists"}},
        BadPlan{"window", rule(R"("method": "csla", "windows": [5000])"), {"windows is 5000"}},
        BadPlan{"decision", rule(R"("method": "cs4a", "decision_scale": 9)"), {"decision_scale = 9"}},
        BadPlan{"range", R"({"rules": [{"scales": [12, 10], "method": "probe"}]})", {"last scale"}},
        BadPlan{"range_length", R"({"rules": [{"scales": [12], "method": "probe"}]})", {"[first, last]"}},
        BadPlan{"bool", rule(R"("method": "probe", "residual": 1)"), {"residual", "true or false"}}),
    [](const auto& one) { return std::string(one.param.name); });

TEST(Plan, UnknownPresetNamesTheNearest) {
  try {
    AttentionPlan::preset("sparvr", 8, 13);
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::usage);
    EXPECT_NE(std::string(error.what()).find("'sparvar'"), std::string::npos) << error.what();
  }
}

template <typename Call>
std::string refusal(ErrorKind kind, Call&& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    return error.what();
  }
  ADD_FAILURE() << "accepted";
  return "";
}

TEST(Plan, ValidateNamesTheValue) {
  const auto message = [](const AttentionMethod& method) {
    return refusal(ErrorKind::usage, [&] { AttentionPlan{"mine", {{0, -1, 10, -1, method}}}.validate(); });
  };
  const auto has = [](const std::string& text, const std::string& part) {
    return text.find(part) != std::string::npos;
  };
  ProbeAttention probe;
  for (const double share : {std::nan(""), HUGE_VAL, -HUGE_VAL, 0.0, -0.1, 1.0001}) {
    probe.share = share;
    const std::string text = message(probe);
    EXPECT_TRUE(has(text, "mine") && has(text, "share") && has(text, "allowed")) << text;
  }
  Cs4aAttention cs4a;
  cs4a.granularity = 0;
  EXPECT_TRUE(has(message(cs4a), "granularity is 0"));
  CslaAttention csla;
  csla.group = {8, 0, 192};
  EXPECT_TRUE(has(message(csla), "tile_w is 0"));
  csla.group = {8, 8, -1};
  EXPECT_TRUE(has(message(csla), "rows is -1"));
  const AttentionPlan crowded{"mine", std::vector<AttentionRule>(10001)};
  EXPECT_TRUE(has(refusal(ErrorKind::usage, [&] { crowded.validate(); }), "10001 rules"));
}

TEST(Plan, PrunedScalesRunTheShareThatIsKept) {
  AttentionPlan plan;
  EXPECT_EQ(plan.tokens_run(12, {64, 64}), 4096);
  plan.pruning = {.first_scale = 10, .keep = {0.5, 0.1}};
  EXPECT_EQ(plan.tokens_run(9, {32, 32}), 1024);
  EXPECT_EQ(plan.tokens_run(10, {3, 5}), 8);
  EXPECT_EQ(plan.tokens_run(11, {48, 48}), 230);
  EXPECT_EQ(plan.tokens_run(12, {64, 64}), 410) << "the last share is that of all scales to come";
  EXPECT_EQ(plan.tokens_run(11, {1, 2}), 1) << "a scale has a token";
}

TEST(Plan, PruningIsCheckedAndReadFromJson) {
  AttentionPlan plan{"mine", {{0, -1, 8, 9, ProbeAttention{}}}};
  plan.pruning = {.first_scale = 10, .keep = {0.25, 0.125}};
  EXPECT_NO_THROW(plan.validate());
  EXPECT_EQ(AttentionPlan::from_json(plan.to_json(), "x"), plan);
  EXPECT_EQ(AttentionPlan::from_json(R"({"rules": [], "pruning": {}})", "x").pruning, TokenPruning{});
  const auto has = [](const std::string& text, const std::string& part) {
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  const auto says = [&](const std::string& json, const std::string& part) {
    has(refusal(ErrorKind::input, [&] { AttentionPlan::from_json(json, "x"); }), part);
  };
  says(R"({"rules": [], "pruning": []})", "expected an object");
  says(R"({"rules": [], "pruning": {"first_scal": 3}})", "did you mean 'first_scale'?");
  says(R"({"rules": [], "pruning": {"keep": [0.5, "a"]}})", "keep: expected a list");
  says(R"({"rules": [], "pruning": {"keep": []}})", "number of keep is 0");
  says(R"({"rules": [], "pruning": {"keep": [0.5, 0]}})", "keep is 0");
  says(R"({"rules": [], "pruning": {"first_scale": 0}})", "first_scale is 0");
  says(R"({"rules": [{"method": "csla", "scales": [9, 10]}], "pruning": {}})", "end at 9");
  plan.rules[0].last_scale = -1;
  has(refusal(ErrorKind::usage, [&] { plan.validate(); }), "tokens are pruned");
}

TEST(Plan, Files) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "sparvar_plan_files";
  std::filesystem::create_directories(folder);
  const auto write = [&](const char* name, const std::string& text) {
    std::ofstream(folder / name, std::ios::binary) << text;
    return (folder / name).string();
  };
  const auto says = [](const std::string& path, const std::string& part) {
    const std::string text = refusal(ErrorKind::input, [&] { AttentionPlan::from_file(path); });
    EXPECT_EQ(text.rfind(path, 0), 0U) << text;
    EXPECT_NE(text.find(part), std::string::npos) << text;
  };
  const AttentionPlan plan = AttentionPlan::preset("published", 8, 13);
  EXPECT_EQ(AttentionPlan::from_file(write("good.json", plan.to_json())), plan);
  // A plan of exactly the size allowed, and one byte more.
  const std::string text = plan.to_json();
  EXPECT_EQ(AttentionPlan::from_file(write("full.json", text + std::string((1 << 20) - text.size(), ' '))), plan);
  says(write("large.json", text + std::string((1 << 20) - text.size() + 1, ' ')), "too large");
  says(write("empty.json", ""), "not JSON");
  says((folder / "missing.json").string(), "no such plan file");
  says(folder.string(), "found a folder");
  says("/dev/null", "not a file");
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace sparvar
