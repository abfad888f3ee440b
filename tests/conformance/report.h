// What a conformance run prints: one line a tensor, the largest difference against its tolerance, bits that differ.
#pragma once

#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "attention/token_order.h"
#include "backend/backend.h"
#include "core/tensor.h"
#include "sparvar/schedule.h"
#include "weights/safetensors.h"

namespace sparvar::conformance {

struct Settings {
  bool bf16 = false;      // compute type of the whole-model kinds
  bool fp8 = false;       // weights of their blocks; with bf16
  std::string model_dir;  // of the bundled model
  std::string device = "cpu";
  std::string against;                // a device: compares with it and not with the fixture's values
  bool against_bf16 = false;          // its compute type
  std::string attention = "dense";    // a preset or a JSON file, of `against`
  std::optional<double> most_margin;  // of `against`; where not given, 1e-3 in f32 and none in bf16
  TokenOrder order;                   // of `device`; `against` has rows
  bool own_choices = false;           // of `against`: each side's choices of keys are its own
  int scales = 0;                     // of `against`: the first ones only; 0: all

  DType compute() const { return bf16 ? DType::bf16 : DType::f32; }
  std::unique_ptr<Backend> backend(DType type) const;
  /// The same run on the device that is compared with.
  Settings reference() const;
  /// f32, and keys in one order: what both sides choose can be compared, and one can follow the other.
  bool shares_choices() const { return !own_choices && !bf16 && !against_bf16 && order == TokenOrder(); }
  std::string side() const { return device + (bf16 ? " bf16" : " f32"); }
};

class Report {
 public:
  explicit Report(std::string folder) : folder_(std::move(folder)) {}
  /// Prints and remembers the largest absolute difference; sizes that differ are a failure.
  void compare(const std::string& name, const Tensor& found, const Tensor& expected, double tolerance);
  void value(const std::string& name, double difference, double tolerance);
  /// A bound for every element, all above 0.
  void within(const std::string& name, const Tensor& found, const Tensor& expected, const std::vector<float>& bounds);
  /// Bits or ids that must be equal.
  void count(const std::string& name, std::int64_t differing, std::int64_t total, std::int64_t allowed = 0);
  void at_least(const std::string& name, double value, double bound);
  void check(const std::string& name, const std::string& text, bool good) { line(name, text, good); }
  /// A line that nothing is judged by.
  void note(const std::string& name, const std::string& text) const;
  bool passed() const { return failures_ == 0 && checks_ > 0; }
  int checks() const { return checks_; }
  int failures() const { return failures_; }

 private:
  void line(const std::string& name, const std::string& text, bool good);
  std::string folder_;
  int checks_ = 0;
  int failures_ = 0;
};

double max_difference(const Tensor& a, const Tensor& b);
/// Element i of a tensor of whole numbers.
std::int64_t integer(const Tensor& x, std::int64_t i);
std::int64_t differing_bytes(const Tensor& a, const Tensor& b);
nlohmann::json read_json(const std::string& path);
ScaleSchedule read_schedule(const nlohmann::json& scales);  // [t, h, w], [h, w] or n

void run_infinity(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report);
void run_vae(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report);
void run_t5(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report);
void run_csla(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report);
void run_cs4a(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report);
void run_bundled(const std::string& dir, const nlohmann::json& config, const Settings& settings, Report& report);

}  // namespace sparvar::conformance
