// The files of an evaluation: report.json, which a later run goes on from, the worst pictures, and index.html.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "pipeline/evaluate.h"

namespace sparvar::cli {

class EvaluationReport {
 public:
  /// `settings`: all that the figures depend on. Makes the folder where it is missing. Throws Error where it cannot be
  /// written, or holds a report of other settings.
  EvaluationReport(std::string folder, nlohmann::ordered_json settings, const GenerateOptions& generate,
                   const std::vector<Variant>& variants, int kept);

  /// Cases that the folder held.
  const std::vector<CaseScores>& known() const { return cases_; }
  /// Keeps a case: its figures, and its pictures where they are among the worst of a variant.
  void add(const CaseScores& scores, const Drawn& dense, const std::vector<Drawn>& drawn);
  /// Writes the report of all cases, and the page. Returns the report.
  nlohmann::ordered_json finish(const ModelInfo& model);

 private:
  nlohmann::ordered_json to_json(bool complete) const;
  void read(const std::string& text);
  std::string worst_path(std::size_t variant, int index) const;
  std::vector<int> worst_of(std::size_t variant) const;
  std::string caption(std::size_t variant, int index) const;

  std::string folder_;
  nlohmann::ordered_json settings_;
  const GenerateOptions& generate_;
  const std::vector<Variant>& variants_;
  int kept_;  // pictures of a variant
  std::vector<CaseScores> cases_;
};

/// A line a variant.
std::string summary_table(const std::vector<Variant>& variants, const std::vector<CaseScores>& cases);

}  // namespace sparvar::cli
