// What the benchmarks share: comma lists that make a grid, and tables whose rows say how to make them again.
#pragma once

#include <CLI/CLI.hpp>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "attention/token_order.h"
#include "flags.h"
#include "sparvar/pipeline.h"

namespace sparvar::cli {

enum class TableFormat { text, markdown, csv, json };

/// The axes that every benchmark has.
struct BenchGrid {
  std::vector<Precision> precisions = {Precision::bf16};
  std::vector<int> threads;  // empty: all cores
  int repeat = 5;
  TableFormat format = TableFormat::text;
  bool quiet = false;
};

/// Declares --dtype, --threads, -r, --format, --json and --quiet.
void add_bench_grid(CLI::App& command, BenchGrid& grid);
/// --threads, or the number of cores.
std::vector<int> threads_of(const BenchGrid& grid);

/// Declares a comma list of numbers.
void add_integers(CLI::App& command, const std::string& name, std::vector<int>& target, const Range<int>& range,
                  const std::string& help);
/// Declares a comma list of presets and JSON files.
void add_plans(CLI::App& command, const std::string& name, std::vector<std::string>& target, const std::string& help);

/// Declares --token-order: a comma list of orders in which tokens lie inside the transformer.
void add_token_orders(CLI::App& command, std::vector<TokenOrder>& target);
/// As --token-order takes it: rows, or the tile's height x width.
std::string name_of(const TokenOrder& order);

/// Rows of named values. All rows have the keys of the first; a row's `command` makes it again.
class BenchTable {
 public:
  explicit BenchTable(std::string title) : title_(std::move(title)) {}
  void add(nlohmann::ordered_json row) { rows_.push_back(std::move(row)); }
  const std::vector<nlohmann::ordered_json>& rows() const { return rows_; }
  /// Machine and commit: once above the table, in every row of a CSV.
  std::string to_string(TableFormat format) const;

 private:
  std::string title_;
  std::vector<nlohmann::ordered_json> rows_;
};

/// How many times faster `row` is than the row of dense attention that is like it but for the plan; null where the
/// table has none. `alike`: keys that have to be equal; `seconds`: the key that is compared.
nlohmann::ordered_json against_dense(const BenchTable& table, const nlohmann::ordered_json& row,
                                     const std::vector<std::string>& alike, const std::string& seconds);

/// A line of progress on stderr.
void tell(const BenchGrid& grid, const std::string& what);

}  // namespace sparvar::cli
