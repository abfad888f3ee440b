#include "bench_grid.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>

#include "machine.h"
#include "plan_source.h"
#include "report.h"

namespace sparvar::cli {
namespace {

using Json = nlohmann::ordered_json;

TableFormat parse_format(const std::string& name) {
  if (name == "text") return TableFormat::text;
  if (name == "md") return TableFormat::markdown;
  if (name == "csv") return TableFormat::csv;
  if (name == "json") return TableFormat::json;
  throw CLI::ValidationError("--format", fmt::format("expected text, md, csv or json, found '{}'", name));
}

Precision parse_dtype(const std::string& name) {
  if (name == "f32") return Precision::f32;
  if (name == "bf16") return Precision::bf16;
  throw CLI::ValidationError("--dtype", fmt::format("expected f32 or bf16, found '{}'", name));
}

std::string cell(const Json& value) {
  if (value.is_null()) return "";
  if (value.is_string()) return value.get<std::string>();
  if (value.is_number_float()) return fmt::format("{:.4g}", value.get<double>());
  return value.dump();
}

std::string quoted(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? std::string("\"\"") : std::string(1, c);
  return out + "\"";
}

std::string machine_line() {
  const Machine machine = this_machine();
  return fmt::format("{}, {} cores, {:.1f} GB, sparvar {} ({})", machine.processor, machine.cores,
                     static_cast<double>(machine.memory_bytes) / 1e9, SPARVAR_VERSION, commit());
}

std::string csv(const std::vector<Json>& rows) {
  std::string out;
  for (const auto& [key, value] : rows.front().items()) out += quoted(key) + ",";
  out += "processor,cores,version,commit\n";
  const Machine machine = this_machine();
  for (const Json& row : rows) {
    for (const auto& [key, value] : row.items()) out += quoted(cell(value)) + ",";
    out += fmt::format("{},{},{},{}\n", quoted(machine.processor), machine.cores, SPARVAR_VERSION, quoted(commit()));
  }
  return out;
}

/// Columns of one width for reading, or with bars for Markdown; commands stand below the former.
std::string table(const std::vector<Json>& rows, bool markdown) {
  std::vector<std::vector<std::string>> cells(1);
  for (const auto& [key, value] : rows.front().items())
    if (markdown || key != "command") cells[0].push_back(key);
  for (const Json& row : rows) {
    cells.emplace_back();
    for (const auto& [key, value] : row.items()) {
      if (key == "command" && !markdown) continue;
      cells.back().push_back(key == "command" ? "`" + cell(value) + "`" : cell(value));
    }
  }
  std::vector<std::size_t> width(cells[0].size());
  for (const auto& line : cells)
    for (std::size_t i = 0; i < line.size(); ++i) width[i] = std::max(width[i], line[i].size());
  std::string out;
  for (std::size_t r = 0; r < cells.size(); ++r) {
    for (std::size_t i = 0; i < cells[r].size(); ++i)
      out += markdown ? "| " + cells[r][i] + " " : fmt::format("{:>{}}  ", cells[r][i], width[i]);
    out += markdown ? "|\n" : "\n";
    if (r > 0 || !markdown) continue;
    for (std::size_t i = 0; i < width.size(); ++i) out += "|---";
    out += "|\n";
  }
  if (markdown) return out;
  out += "\nmade by\n";
  for (const Json& row : rows) out += row.value("command", "") + "\n";
  return out;
}

}  // namespace

void add_bench_grid(CLI::App& command, BenchGrid& grid) {
  command
      .add_option_function<std::string>(
          "--dtype",
          [&grid](const std::string& text) {
            grid.precisions.clear();
            for (const std::string& name : comma_list("--dtype", text)) grid.precisions.push_back(parse_dtype(name));
          },
          "Numbers to compute in: f32, bf16, or both as a list (bf16)")
      ->type_name("f32|bf16[,...]");
  add_integers(command, "--threads", grid.threads, {1, 1024}, "CPU threads, one number or a list (all cores)");
  add_number(command, "-r,--repeat", grid.repeat, Range<int>{1, 1000}, "Warm runs; the median counts (5)");
  command
      .add_option_function<std::string>(
          "--format", [&grid](const std::string& name) { grid.format = parse_format(name); },
          "How the table is written (text)")
      ->type_name("text|md|csv|json");
  command.add_flag_callback(
      "--json", [&grid] { grid.format = TableFormat::json; }, "One JSON object on standard output: --format json");
  command.add_flag("--quiet", grid.quiet, "No progress");
}

std::vector<int> threads_of(const BenchGrid& grid) {
  return grid.threads.empty() ? std::vector<int>{this_machine().cores} : grid.threads;
}

void add_integers(CLI::App& command, const std::string& name, std::vector<int>& target, const Range<int>& range,
                  const std::string& help) {
  command
      .add_option_function<std::string>(
          name,
          [&target, range, name](const std::string& text) {
            target.clear();
            for (const std::string& part : comma_list(name, text)) target.push_back(parse_number(name, part, range));
          },
          help)
      ->type_name("N[,N...]");
}

void add_plans(CLI::App& command, const std::string& name, std::vector<std::string>& target, const std::string& help) {
  command
      .add_option_function<std::string>(
          name,
          [&target, name](const std::string& text) {
            target = comma_list(name, text);
            for (const std::string& plan : target)
              if (!names_file(plan)) check_preset(name, plan);
          },
          help)
      ->type_name("PLAN[,PLAN...]");
}

std::string name_of(const TokenOrder& order) {
  return order.tile_h == 0 ? "rows" : fmt::format("{}x{}", order.tile_h, order.tile_w);
}

void add_token_orders(CLI::App& command, std::vector<TokenOrder>& target) {
  command
      .add_option_function<std::string>(
          "--token-order",
          [&target](const std::string& text) {
            target.clear();
            for (const std::string& part : comma_list("--token-order", text)) {
              const std::size_t cross = part.find('x');
              if (part != "rows" && cross == std::string::npos)
                throw CLI::ValidationError("--token-order", fmt::format("expected rows or HxW, found '{}'", part));
              const Range<int> sides{1, 1024};
              target.push_back(part == "rows"
                                   ? TokenOrder()
                                   : TokenOrder{parse_number("--token-order", part.substr(0, cross), sides),
                                                parse_number("--token-order", part.substr(cross + 1), sides)});
            }
          },
          "How the tokens of a scale lie inside the transformer: row by row, or in tiles of HxW; one or a list (rows)")
      ->type_name("rows|HxW[,...]");
}

std::string BenchTable::to_string(TableFormat format) const {
  if (format == TableFormat::csv) return csv(rows_);
  if (format == TableFormat::json) {
    const Machine machine = this_machine();
    return dump({{"title", title_},
                 {"machine",
                  {{"processor", machine.processor}, {"cores", machine.cores}, {"memory_bytes", machine.memory_bytes}}},
                 {"version", SPARVAR_VERSION},
                 {"commit", commit()},
                 {"rows", rows_}});
  }
  return fmt::format("{}\n{}\n\n{}", title_, machine_line(), table(rows_, format == TableFormat::markdown));
}

Json against_dense(const BenchTable& table, const Json& row, const std::vector<std::string>& alike,
                   const std::string& seconds) {
  if (row.at("attention") == "dense" || row.at(seconds).is_null()) return {};
  for (const Json& other : table.rows()) {
    if (other.at("attention") != "dense" || other.at(seconds).is_null()) continue;
    if (std::all_of(alike.begin(), alike.end(), [&](const std::string& key) { return other.at(key) == row.at(key); }))
      return other.at(seconds).get<double>() / row.at(seconds).get<double>();
  }
  return {};
}

void tell(const BenchGrid& grid, const std::string& what) {
  if (!grid.quiet) fmt::print(stderr, "{}\n", what);
}

}  // namespace sparvar::cli
