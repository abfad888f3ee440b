#include <gtest/gtest.h>

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
      if (scales == 13 && name != "dense") {
        EXPECT_FALSE(std::holds_alternative<DenseAttention>(plan.method(0, 10)) ||
                     std::holds_alternative<DenseAttention>(plan.method(31, 12)))
            << name;
        EXPECT_TRUE(std::holds_alternative<DenseAttention>(plan.method(0, 9))) << name;
      }
    }
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

std::string rule(const std::string& members) { return R"({"rules": [{"scales": [10, -1], )" + members + "}]}"; }

INSTANTIATE_TEST_SUITE_P(
    Table, BadPlans,
    ::testing::Values(BadPlan{"empty", "", {"my-plan.json", "not JSON"}},
                      BadPlan{"not_json", "{", {"my-plan.json", "not JSON"}},
                      BadPlan{"no_object", "[]", {"expected an object"}}, BadPlan{"no_rules", "{}", {"rules"}},
                      BadPlan{"rules_text", R"({"rules": "x"})", {"rules"}},
                      BadPlan{"unknown_top", R"({"rules": [], "nam": "x"})", {"'nam'", "'name'"}},
                      BadPlan{"twice", R"({"rules": [], "rules": []})", {"'rules'", "twice"}},
                      BadPlan{
                          "deep", R"({"rules": )" + std::string(5000, '[') + std::string(5000, ']') + "}", {"nested"}},
                      BadPlan{"huge", std::string((1 << 20) + 1, ' '), {"bytes"}},
                      BadPlan{"method", rule(R"("method": "cslaa")"), {"rule 0", "cslaa", "csla"}},
                      BadPlan{"no_method", rule(R"("layers": [0, 1])"), {"rule 0", "method"}},
                      BadPlan{"unknown_key", rule(R"("method": "probe", "strid": 4)"), {"'strid'", "'stride'"}},
                      BadPlan{"wrong_method_key", rule(R"("method": "csla", "stride": 4)"), {"'stride'"}},
                      BadPlan{"type", rule(R"("method": "probe", "stride": "4")"), {"stride", "whole number"}},
                      BadPlan{"fraction", rule(R"("method": "probe", "stride": 4.5)"), {"stride", "4.5"}},
                      BadPlan{"stride_0", rule(R"("method": "probe", "stride": 0)"), {"stride is 0"}},
                      BadPlan{"share_0", rule(R"("method": "probe", "share": 0)"), {"share is 0"}},
                      BadPlan{"share_2", rule(R"("method": "cs4a", "share": 2)"), {"share is 2"}},
                      BadPlan{"huge_number", rule(R"("method": "probe", "share": 1e999)"), {"my-plan.json"}},
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

TEST(Plan, MissingFile) { EXPECT_THROW(AttentionPlan::from_file("/nowhere/plan.json"), Error); }

}  // namespace
}  // namespace sparvar
